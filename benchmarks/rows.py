"""Result rows: one measurement each, with everything needed to judge it, in `results/*.jsonl`."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SECTIONS = ("speed", "exactness", "memory", "streaming", "long_tree", "bf16", "rollout", "hydragen", "search")

Row = dict[str, Any]
_KEY = ("workload", "method", "metric", "baseline", "threads", "dtype")


class Recorder:
    """Collects the rows of one run; `common` (machine, versions, commit, date) is the same in all of them."""

    def __init__(self, threads: int) -> None:
        self.rows: dict[str, list[Row]] = {section: [] for section in SECTIONS}
        self.common = {
            "threads": threads,
            "machine": {"cpu": _cpu_model(), "cores": os.cpu_count()},
            "versions": _versions(),
            "commit": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        }

    def add(
        self,
        section: str,
        *,
        workload: str,
        method: str,
        metric: str,
        unit: str,
        value: float,
        spread: tuple[float, float] | None = None,
        repeats: int = 1,
        baseline: str | None = None,
        baseline_value: float | None = None,
        dtype: str = "float32",
        shapes: dict[str, Any] | None = None,
    ) -> Row:
        """One row. `spread` is the range over the repeats; `baseline` was measured in the same run."""
        row: Row = {
            "workload": workload,
            "method": method,
            "metric": metric,
            "unit": unit,
            "value": _rounded(value),
            "spread": None if spread is None else [_rounded(edge) for edge in spread],
            "repeats": repeats,
            "baseline": baseline,
            "baseline_value": None if baseline_value is None else _rounded(baseline_value),
            "dtype": dtype,
            "shapes": shapes or {},
            **self.common,
        }
        self.rows[section].append(row)
        return row

    def save(self, folder: Path) -> None:
        """Write each section's file; an older row of the same measurement is replaced, others stay."""
        folder.mkdir(parents=True, exist_ok=True)
        for section, rows in self.rows.items():
            if rows:
                path = folder / f"{section}.jsonl"
                merged = {_key(row): row for row in [*load(path), *rows]}
                write_atomically(path, "".join(json.dumps(merged[key]) + "\n" for key in sorted(merged)))


def load(path: Path) -> list[Row]:
    """The rows of a file; none if it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name in the same folder, then rename."""
    path.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as temporary:
        temporary.write(text)
    os.chmod(temporary.name, 0o644)
    os.replace(temporary.name, path)


def find(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """The row with these values, or None."""
    matches = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    if len(matches) > 1:
        raise ValueError(f"{len(matches)} rows match {wanted}; name more fields")
    return matches[0] if matches else None


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in _KEY)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in (
        "torch",
        "transformers",
        "sentence-transformers",
        "bm25s",
        "faiss-cpu",
        "prefix-grouper",
        "stemma-lm",
    ):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()

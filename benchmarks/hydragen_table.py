"""Write the tables of docs/generation.md from the rows of hydragen.py: `python benchmarks/hydragen_table.py`.

`--check` writes nothing and exits with status 1 when the page is not what the rows say.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.pages import write_block  # noqa: E402
from benchmarks.rows import RESULTS, Row, find, load  # noqa: E402

PAGE = ROOT / "docs" / "generation.md"
BASELINES = {
    "hf_default": "default, expanded",
    "in_place": "dense, in place",
    "stemma_dense": "dense, this code",
    "view": "expanded view",
    "from_scratch": "from scratch",
}


def block(rows: list[Row]) -> str:
    """What stands between the page's markers."""
    own = {row["workload"]: row for row in rows if row["method"] == "stemma" and row["metric"] == "cache_bytes"}
    names = sorted(own, key=lambda name: (own[name]["shapes"]["kv_heads"] != 8, "tree" in name, *order(own[name])))
    head = ["workload", "tokens/s", *BASELINES.values(), "MiB", "MiB dense"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name in names:
        lines.append(
            [
                name.replace(" K8", "").replace(" K2", ", 2 key heads"),
                f"{value(rows, name, 'stemma', 'tokens_per_cpu_second'):,.0f}",
                *(times(rows, name, baseline) for baseline in BASELINES),
                f"{own[name]['value'] / 2**20:,.0f}",
                mib(find(rows, workload=name, method="in_place", metric="cache_bytes")),
            ]
        )
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{table}\n\n{flatness(rows)}\n\n{setting(rows)}"


def order(row: Row) -> tuple[int, int]:
    """Batch, then prefix."""
    return row["shapes"]["batch"], sum(nodes * tokens for nodes, tokens in row["shapes"]["levels"])


def value(rows: list[Row], workload: str, method: str, metric: str) -> float:
    """The value of a row."""
    row = find(rows, workload=workload, method=method, metric=metric)
    assert row is not None, (workload, method, metric)
    return float(row["value"])


def times(rows: list[Row], workload: str, baseline: str) -> str:
    """A baseline's time over ours."""
    row = find(rows, workload=workload, method="stemma", metric="cpu_speedup", baseline=baseline)
    return "–" if row is None else f"{row['value']:.2f}×"


def mib(row: Row | None) -> str:
    """Bytes in MiB."""
    return "–" if row is None else f"{row['value'] / 2**20:,.0f}"


def flatness(rows: list[Row]) -> str:
    """How the rate falls with the prefix, beside what the products alone would allow."""
    lines = [
        "| prefix, 32 rows | tokens/s | of the rate at 1024 | the products alone would allow |",
        "| --- | ---: | ---: | ---: |",
    ]
    first: tuple[float, float] | None = None
    for prefix in (1024, 2048, 4096, 8192, 16384):
        name = f"B32 P{prefix} K8"
        rate = find(rows, workload=name, method="stemma", metric="tokens_per_cpu_second")
        weights = find(rows, workload=name, metric="roofline_weights")
        attention = find(rows, workload=name, metric="roofline_prefix")
        if rate is None or weights is None or attention is None:
            continue
        bound = 1 / (weights["value"] + attention["value"])
        first = first or (rate["value"], bound)
        kept = f"{rate['value'] / first[0]:.0%} | {bound / first[1]:.0%}"
        lines.append(f"| {prefix:,} | {rate['value']:,.0f} | {kept} |")
    return "\n".join(lines)


def setting(rows: list[Row]) -> str:
    """Machine, versions, commit and date."""
    row = rows[0]
    commits = sorted({row["commit"][:7] + ("+" if row["dirty"] else "") for row in rows})
    return (
        f"{row['machine']['cpu']}, one thread; torch {row['versions']['torch']}, transformers "
        f"{row['versions']['transformers']}; commit {', '.join(commits)}; {max(row['date'] for row in rows)}."
    )


if __name__ == "__main__":
    sys.exit(write_block(PAGE, "hydragen", block(load(RESULTS / "hydragen.jsonl"))))

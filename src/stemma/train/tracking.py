"""Metrics as JSON lines, and the progress that a person sees: a bar on a terminal, else one plain line per step."""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from stemma.errors import InvalidDataError

__all__ = ["Tracker", "read_rows"]

_SHOWN = (
    "eval/reward",
    "eval/reward_best",
    "loss",
    "reward",
    "mean_token_accuracy",
    "entropy",
    "compare/time_ratio",
    "grad_norm",
    "time/step",
)


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a JSONL file, nulls as NaN.

    Raises:
        InvalidDataError: a line is no JSON object; the message gives its number.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise InvalidDataError(f"{path}, line {number}: no JSON object ({error}); remove the line") from error
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


class Tracker:
    """Appends one row per step to a JSONL file and shows progress.

    Args:
        path: the JSONL file. Rows after `resume_after` steps are dropped first: they belong to steps that a killed run
            took after its last checkpoint and that the resumed run takes again.
        total_steps: steps of the whole run, all phases.
        resume_after: steps of the whole run that are already done; None starts a new file.
        stream: where progress goes; standard error by default.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        total_steps: int,
        resume_after: int | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.path = Path(path)
        kept = []
        if resume_after is not None and self.path.exists():
            rows = _complete_rows(self.path)
            # A resumed run starts with the evaluation that is due where it stands.
            kept = [row for row in rows if row["global_step"] + (row["phase"] == "eval") <= resume_after]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(_dump(row) for row in kept), encoding="utf-8")
        os.replace(temporary, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._stream = sys.stderr if stream is None else stream
        self._total = total_steps
        self._bar: Any = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=resume_after or 0, file=self._stream, dynamic_ncols=True)

    def log(self, phase: str, step: int, global_step: int, metrics: Mapping[str, float]) -> None:
        """Write one row and show it. `step` counts within the phase, `global_step` over the run: steps done so far."""
        self._file.write(_dump({"phase": phase, "step": step, "global_step": global_step, **metrics}))
        self._file.flush()
        shown = {name: metrics[name] for name in _SHOWN if name in metrics}
        text = " ".join(f"{name.rpartition('/')[2]}={_short(value)}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.set_description_str(phase, refresh=False)
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(global_step - self._bar.n)
        else:
            print(f"{phase} {step} [{global_step}/{self._total}] {text}", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Show a line to the person, without a row."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Close the file and leave the bar where it is."""
        self._file.close()
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _complete_rows(path: Path) -> list[dict[str, Any]]:
    """The file's rows but for a last line that a kill cut off."""
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    return read_rows(path)


def _dump(row: Mapping[str, Any]) -> str:
    """One line of strict JSON: NaN and infinities become null."""
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"

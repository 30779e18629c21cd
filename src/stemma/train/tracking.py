"""Metrics as JSON lines, and the progress that a person sees: a bar on a terminal, else one plain line per step.

TensorBoard, trackio and Weights & Biases get the same numbers through the trackers of `accelerate.Accelerator`.
"""

import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from stemma.errors import InvalidDataError, MissingExtraError
from stemma.files import write_text

__all__ = ["Tracker", "make_accelerator", "read_rows", "start_trackers"]

_PROJECT = "stemma"
_EXTRAS = {"tensorboard": "track", "trackio": "track", "wandb": "wandb"}

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
        except (ValueError, RecursionError, TypeError) as error:
            raise InvalidDataError(f"{path}, line {number}: no JSON object ({error}); remove the line") from error
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def make_accelerator(report_to: Sequence[str], folder: str | os.PathLike[str]) -> Any:
    """An `accelerate.Accelerator` with trackers of these names ("none" is none).

    Args:
        folder: the run folder; TensorBoard writes into `logs` below it.

    Raises:
        MissingExtraError: the package of a tracker is not installed (accelerate itself would leave it out in silence).
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    names = [name for name in report_to if name != "none"]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(name, _EXTRAS[name], f"report_to={name}")
    project = ProjectConfiguration(project_dir=os.fspath(folder), logging_dir=os.fspath(Path(folder) / "logs"))
    return Accelerator(log_with=names or None, project_config=project)


def start_trackers(
    accelerator: Any, folder: str | os.PathLike[str], options: Mapping[str, Any], *, resume_after: int | None = None
) -> None:
    """Start the accelerator's trackers; the run is named after its folder.

    Args:
        options: settings of the run, for the tracker's own table of them.
        resume_after: steps that a resumed run has done. TensorBoard hides later ones and trackio continues the run of
            that name; Weights & Biases continues the run of `WANDB_RUN_ID`, where it is set, else it starts another.
    """
    name, folder = Path(folder).resolve().name, os.fspath(folder)
    keywords: dict[str, dict[str, Any]] = {
        "tensorboard": {} if resume_after is None else {"purge_step": resume_after + 1},
        "trackio": {"name": name, "resume": "never" if resume_after is None else "allow"},
        "wandb": {"name": name, "dir": folder},
    }
    plain = {key: v if isinstance(v, (bool, int, float, str)) else str(v) for key, v in options.items()}
    accelerator.init_trackers(_PROJECT, config=plain, init_kwargs=keywords)


class Tracker:
    """Appends one row per step to a JSONL file and shows progress.

    Args:
        path: the JSONL file. Rows after `resume_after` steps are dropped first: they belong to steps that a killed run
            took after its last checkpoint and that the resumed run takes again.
        total_steps: steps of the whole run, all phases.
        resume_after: steps of the whole run that are already done; None starts a new file.
        stream: where progress goes; standard error by default.
        accelerator: its trackers get the finite numbers of each row too, as `phase/name`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        total_steps: int,
        resume_after: int | None = None,
        stream: TextIO | None = None,
        accelerator: Any = None,
    ) -> None:
        self.path, self._accelerator = Path(path), accelerator
        kept = []
        if resume_after is not None and self.path.exists():
            rows = _complete_rows(self.path)
            # A resumed run starts with the evaluation that is due where it stands.
            kept = [row for row in rows if row["global_step"] + (row["phase"] == "eval") <= resume_after]
        write_text(self.path, "".join(_dump(row) for row in kept))
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
        if self._accelerator is not None:
            named = {key if key.startswith(f"{phase}/") else f"{phase}/{key}": v for key, v in metrics.items()}
            finite = {key: value for key, value in named.items() if math.isfinite(value)}
            self._accelerator.log(finite, step=global_step)
        shown = {name: metrics[name] for name in _SHOWN if name in metrics}
        text = " ".join(
            f"{name.rpartition('/')[2]}={_short(value)}{'s' if name.startswith('time/') else ''}"
            for name, value in shown.items()
        )
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

"""Rows are strict JSON lines; a resumed run drops what it will do again; progress suits its reader."""

import io
import json
import math
from pathlib import Path

import pytest

from stemma.errors import InvalidDataError
from stemma.train.tracking import Tracker, read_rows


def fill(path: Path, steps: range, resume_after: int | None = None) -> str:
    stream = io.StringIO()
    with Tracker(path, total_steps=10, resume_after=resume_after, stream=stream) as tracker:
        for step in steps:
            tracker.log("grpo", step, step, {"loss": step / 4, "reward": math.nan, "grad_norm": 12345.6})
    return stream.getvalue()


def test_rows_are_strict_json_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    shown = fill(path, range(1, 3))
    first = json.loads(path.read_text().splitlines()[0], parse_constant=pytest.fail)
    assert first == {"phase": "grpo", "step": 1, "global_step": 1, "loss": 0.25, "reward": None, "grad_norm": 12345.6}
    assert math.isnan(read_rows(path)[0]["reward"])
    assert shown.splitlines() == [
        "grpo 1 [1/10] loss=0.25 reward=nan grad_norm=12346",
        "grpo 2 [2/10] loss=0.5 reward=nan grad_norm=12346",
    ]


def test_a_resumed_run_keeps_rows_up_to_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 6))
    with path.open("a") as file:
        file.write('{"phase": "eval", "step": 3, "global_step": 3}\n{"phase": "grpo", "step": 6, "glob')  # killed here
    fill(path, range(4, 6), resume_after=3)
    assert [(row["phase"], row["global_step"]) for row in read_rows(path)] == [("grpo", s) for s in range(1, 6)]
    fill(path, range(1, 2))  # a new run starts a new file
    assert len(read_rows(path)) == 1


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"a": 1}\n[1, 2]\n')
    with pytest.raises(InvalidDataError, match="line 2"):
        read_rows(tmp_path / "m.jsonl")


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Tracker(tmp_path / "m.jsonl", total_steps=4, resume_after=1, stream=stream) as tracker:
        tracker.note("hello")
        for step in (2, 3, 4):
            tracker.log("sft", step, step, {"loss": 0.5})
    assert "hello" in stream.getvalue()
    assert "4/4" in stream.getvalue()
    assert "sft" in stream.getvalue()

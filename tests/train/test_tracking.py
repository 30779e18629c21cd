"""Rows are strict JSON lines; a resumed run drops what it will do again; progress suits its reader; other trackers."""

import importlib.machinery
import importlib.util
import io
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType

from stemma.errors import InvalidDataError, MissingExtraError
from stemma.train.tracking import Tracker, make_accelerator, read_rows, start_trackers


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


# ---------------------------------------------------------------------------------------------- other trackers


class FakeRun:
    """What `trackio.init` and `wandb.init` return, as far as accelerate uses it."""

    def __init__(self, **keywords: Any) -> None:
        self.keywords, self.rows, self.finished = keywords, [], False

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(params=["trackio", "wandb"])
def fake(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of that name which records what it is told; accelerate believes that it is installed."""
    module = types.ModuleType(request.param)
    module.__spec__ = importlib.machinery.ModuleSpec(request.param, None)
    module.runs, module.config = [], {}  # type: ignore[attr-defined]

    def init(**keywords: Any) -> FakeRun:
        module.runs.append(FakeRun(**keywords))  # type: ignore[attr-defined]
        return module.runs[-1]  # type: ignore[attr-defined]

    class Settings(dict[str, Any]):
        def update(self, values: Any, allow_val_change: bool = False) -> None:  # type: ignore[override]
            super().update(values)

    module.init, module.config = init, Settings()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, request.param, module)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType(request.param)])
    return module


def run(folder: Path, report_to: tuple[str, ...], resume_after: int | None = None) -> None:
    accelerator = make_accelerator(report_to, folder)
    start_trackers(accelerator, folder, {"seed": 3, "traces": None, "beta": 0.1}, resume_after=resume_after)
    with Tracker(folder / "m.jsonl", total_steps=2, stream=io.StringIO(), accelerator=accelerator) as tracker:
        tracker.log("eval", 0, 4, {"eval/reward": 0.5})
        tracker.log("grpo", 1, 5, {"loss": 0.25, "reward": math.nan})
    accelerator.end_training()


def test_another_tracker_gets_the_same_numbers(tmp_path: Path, fake: Any) -> None:
    run(tmp_path, (fake.__name__,))
    (only,) = fake.runs
    assert only.rows == [(4, {"eval/reward": 0.5}), (5, {"grpo/loss": 0.25})]
    assert only.finished
    assert fake.config == {"seed": 3, "traces": "None", "beta": 0.1}
    assert only.keywords["project"] == "stemma"
    assert only.keywords["name"] == tmp_path.name
    run(tmp_path, (fake.__name__,), resume_after=4)
    if fake.__name__ == "trackio":
        assert [each.keywords["resume"] for each in fake.runs] == ["never", "allow"]
    assert [row["phase"] for row in read_rows(tmp_path / "m.jsonl")] == ["eval", "grpo"]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra: pip install 'stemma-lm[track]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, ("tensorboard",))
    events = EventAccumulator(str(tmp_path / "logs" / "stemma"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"eval/reward", "grpo/loss"}
    assert [(event.step, event.value) for event in events.Scalars("grpo/loss")] == [(5, 0.25)]


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, extra in (("trackio", "track"), ("tensorboard", "track"), ("wandb", "wandb")):
        with pytest.raises(MissingExtraError, match=rf"report_to={name} needs.*stemma-lm\[{extra}\]"):
            make_accelerator(("none", name), tmp_path)


def test_no_tracker_by_default(tmp_path: Path) -> None:
    run(tmp_path, ("none",))
    assert not (tmp_path / "logs").exists()

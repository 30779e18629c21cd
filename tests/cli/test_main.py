"""The dispatcher: help, versions, wrong commands and flags, errors, JSON, interruption."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stemma.cli
from stemma.cli import main as dispatcher

COMMAND = '''"""Try the dispatcher.

A second paragraph that only the command's own page shows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stemma.errors import InvalidDataError


@dataclass(frozen=True, kw_only=True)
class Config:
    count: int = 3
    """How often to say it, at least 1."""
    loud: bool = False
    """Say it in capitals."""
    action: str = "return"
    """What to do."""
    colour: Literal["red", "blue"] | None = None
    """None: no colour."""
    folder: Path | None = None
    """None: nowhere."""

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"--count must be at least 1, got {self.count}.")


def main(config):
    assert type(config) is Config, "the dispatcher hands over the command's own class"
    print("for people")
    if config.action == "fail":
        raise InvalidDataError("line 3 has no reward; add one.")
    if config.action == "crash":
        raise RuntimeError("a bug")
    if config.action == "write":
        (config.folder / "missing" / "file").write_text("")
    if config.action == "interrupt":
        raise KeyboardInterrupt
    if config.action == "status":
        return 4
    if config.action == "odd":
        return {"value": object()}
    return {"count": config.count, "loud": config.loud, "nan": float("nan"), "path": Path("a") / "b", "exit_status": 0}
'''


@pytest.fixture(autouse=True)
def trial_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a command `trial-run` to those of the package."""
    (tmp_path / "trial_run.py").write_text(COMMAND, encoding="utf-8")
    monkeypatch.setattr(stemma.cli, "__path__", [*stemma.cli.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "stemma.cli.trial_run", raising=False)
    monkeypatch.delenv("STEMMA_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "120")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command in its own process."""
    return subprocess.run(
        [sys.executable, "-m", "stemma.cli.main", *arguments], capture_output=True, text=True, timeout=120
    )


def test_help_lists_every_command_with_its_summary() -> None:
    done = run("--help")
    assert done.returncode == 0
    for name, summary in dispatcher.commands().items():
        if name != "trial-run":  # lives only in this process
            assert name in done.stdout
            assert summary in done.stdout


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "stemma", "--help"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, run("--help").stdout)


def test_help_is_quick() -> None:
    def seconds() -> float:
        before = os.times()
        run("--help")
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.3


def test_no_command_shows_the_overview_as_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main([]) == 2
    assert re.search(r"^  trial-run +Try the dispatcher\.$", capsys.readouterr().err, re.MULTILINE)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"stemma {stemma.__version__} (python 3.")
    assert dispatcher.main(["--version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stemma-lm"] == stemma.__version__


@pytest.mark.parametrize(
    ("typed", "meant"), [("trial-rum", "trial-run"), ("trial_run", "trial-run"), ("--vesion", "--version")]
)
def test_a_mistyped_word_is_answered_with_the_nearest(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatcher.main([typed]) == 2
    captured = capsys.readouterr()
    assert f"'{typed}'" in captured.err
    assert f"Did you mean `stemma {meant}`?" in captured.err
    assert captured.out == ""


def test_an_unknown_word_like_no_other_gets_no_guess(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["zzzzzz"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_a_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["trial-run", "--help"]) == 0
    page = capsys.readouterr().out
    for part in (
        "usage: stemma trial-run",
        "A second paragraph",
        "--count INT",
        "at least 1",
        "(default: 3)",
        "--json",
    ):
        assert part in page


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--cuont", "4"], "--count"),
        (["--count", "four"], "--count"),
        (["--count", "0"], "at least 1, got 0"),
        (["--count"], "--count"),
        (["stray"], "stray"),
    ],
)
def test_wrong_flags_are_named_with_status_2(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["trial-run", *flags]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert "stemma trial-run --help" in captured.err
    assert "for people" not in captured.out


def test_the_result_is_one_json_object_and_the_rest_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["trial-run", "--count", "5", "--loud", "--json"]) == 0
    captured = capsys.readouterr()
    path = str(Path("a") / "b")
    assert json.loads(captured.out) == {"count": 5, "loud": True, "nan": None, "path": path, "exit_status": 0}
    assert "for people" in captured.err


def test_without_json_only_the_human_text_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["trial-run"]) == 0
    assert capsys.readouterr().out == "for people\n"


def test_a_bare_status_is_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["trial-run", "--action", "status", "--json"]) == 4
    assert json.loads(capsys.readouterr().out) == {"exit_status": 4}


def test_a_named_error_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["trial-run", "--action", "fail"]) == 1
    assert capsys.readouterr().err == "stemma trial-run: line 3 has no reward; add one.\n"


def test_a_file_that_cannot_be_opened_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert dispatcher.main(["trial-run", "--action", "write", "--folder", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("stemma trial-run: ")
    assert message.count("\n") == 1
    assert str(tmp_path / "missing" / "file") in message


def test_a_named_error_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["trial-run", "--action", "fail", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "error": "InvalidDataError",
        "message": "line 3 has no reward; add one.",
        "exit_status": 1,
    }


def test_the_traceback_is_shown_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEMMA_TRACEBACK", "1")
    assert dispatcher.main(["trial-run", "--action", "fail"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        dispatcher.main(["trial-run", "--action", "crash"])
    with pytest.raises(TypeError, match="JSON cannot hold"):
        dispatcher.main(["trial-run", "--action", "odd", "--json"])


def test_ctrl_c_exits_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["trial-run", "--action", "interrupt"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_real_sigint_exits_130(tmp_path: Path) -> None:
    code = (
        "import sys, time, stemma.cli.main as m\n"
        "def wait(arguments):\n    print('ready', flush=True); time.sleep(60)\n"
        "m._dispatch = wait\nsys.exit(m.main([]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "stemma: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_reader_that_goes_away_is_no_traceback() -> None:
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m stemma.cli.main --help | true",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("flags", [["--version", "--json"], ["--help"], ["methods", "--json"]])
def test_a_full_device_is_one_message(flags: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stemma.cli.main", *flags],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith(f"stemma: cannot write: {os.strerror(errno.ENOSPC)}; make room, or write elsewhere\n")

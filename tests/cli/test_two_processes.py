"""Two processes with one output: the second is refused before it writes, whether it begins or resumes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stemma.cli.main import main
from stemma.files import locked
from stemma.train.checkpoint import latest


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    before = {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 1
    assert {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()} == before
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return found.err


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_second_process_is_refused_before_it_writes(folder, tmp_path, monkeypatch, capsys, resume) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "one"}\n', encoding="utf-8")
    Path("traces.jsonl").touch()
    Path("run").mkdir()
    for output, arguments in {
        Path("out.jsonl"): ["generate", folder, "--prompts=prompts.jsonl", "--output=out.jsonl"],
        Path("traces.jsonl"): ["collect", "--output=traces.jsonl"],
        Path("run"): ["train", "--output-dir=run"],
    }.items():
        with locked(output):
            assert f"process {os.getpid()} on" in refused(capsys, *arguments, *resume)


def test_a_run_belongs_to_its_process_until_that_is_killed(tmp_path, capsys) -> None:
    small = (
        "--sft-steps 2 --max-steps 100 --shots 1 --num-generations 2 --per-device-train-batch-size 4 --eval-prompts 0 "
        "--max-completion-length 4 --compare-every 0 --save-steps 1"
    )
    command, run = ["train", f"--output-dir={tmp_path / 'run'}"], tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-m", "stemma", *command, *small.split()]
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL) as first:
        while latest(run) is None and first.poll() is None:
            time.sleep(0.02)
        assert main([*command, "--resume"]) == 1
        first.kill()
    assert f"process {first.pid} on" in capsys.readouterr().err
    with locked(run):
        assert f"process {first.pid} on" in capsys.readouterr().err

"""`stemma collect`: traces of a checkpoint and of the embedded task, interruption, and what is refused."""

import json
import os
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stemma.cli import _train_jobs
from stemma.cli.main import main
from stemma.data.traces import read_traces
from stemma.models.tiny import byte_tokenizer, tiny_model
from stemma.rl.prefix_rl import build_prefixed_problems

QUESTIONS = [f"{digit}+1=" for digit in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers `#### 4` or `#### 5` to everything, half of the time each, and a data set."""
    folder = tmp_path_factory.mktemp("collect")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1)
    texts = [f"{question}\n#### {answer}" for question in QUESTIONS for answer in (4, 5)]
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts])
    labels = ids.clone()
    labels[:, : len(QUESTIONS[0])] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    # Whatever is asked, 4 can be found and 7 cannot.
    lines = [{"prompt": question, "answer": "4" if i % 4 else "7"} for i, question in enumerate(QUESTIONS)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


@pytest.fixture
def arguments(folder: Path, tmp_path: Path) -> list[str]:
    """Two samples at a time, at most four, of the six problems that are not held out."""
    options = {
        "model": folder / "model",
        "dataset": folder / "data.jsonl",
        "output": tmp_path / "new" / "traces.jsonl",
        "eval-prompts": 2,
        "samples-per-round": 2,
        "max-samples": 4,
        "max-completion-length": 10,
    }
    return ["collect", *(f"--{name}={value}" for name, value in options.items())]


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_traces_of_a_checkpoint(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    tokenizer = byte_tokenizer()
    traces = read_traces(report["output"], tokenizer=tokenizer)
    assert len(traces) == 6 == report["problems"]
    solved = [trace for trace in traces if trace.solved]
    assert 0 < len(solved) == report["solved"] < 6
    assert report["unsolved"] == [index for index, trace in enumerate(traces) if not trace.solved]
    for trace in traces:
        assert tokenizer.decode(trace.prompt_ids) == trace.columns["prompt"]
        assert (trace.text == "\n#### 4") == trace.solved
        assert trace.columns["answer"] == "4" if trace.solved else trace.samples == 4
    assert "max_samples=4" in traces[0].source
    # The questions that `stemma train` holds out with the same seed are not among them.
    job = _train_jobs.checkpoint_job(str(folder / "model"), folder / "data.jsonl", shots=8, eval_prompts=2, seed=42)
    held_out = {row["prompt"] for row in job.eval_rows}
    assert {trace.columns["prompt"] for trace in traces} == set(QUESTIONS) - held_out
    assert len(build_prefixed_problems(traces)) == 4 * len(solved)
    assert captured.err.count("given up after 4 samples") == len(report["unsolved"])
    assert f"{len(solved)} of 6 problems solved" in captured.err


def test_ctrl_c_stops_after_the_round_and_resume_goes_on_to_the_same_file(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "traces.jsonl"
    assert main(arguments) == 0
    expected = path.read_bytes()
    path.unlink()
    capsys.readouterr()

    reward, calls = _train_jobs.gsm8k.reward, []

    def interrupting(*given: Any) -> float:
        calls.append(given)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return reward(*given)

    monkeypatch.setattr(_train_jobs.gsm8k, "reward", interrupting)
    assert main([*arguments, "--json"]) == 130
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["status"], report["exit_status"]) == ("interrupted", 130)
    assert "stopped by SIGINT before all 6 problems" in captured.err
    partial = path.read_bytes()
    assert 0 < len(partial) < len(expected)
    assert expected.startswith(partial)
    assert main(arguments) == 1  # not without --resume
    assert "continue it with --resume" in capsys.readouterr().err
    assert main(shlex.split(report["resume_with"])[1:]) == 0
    assert path.read_bytes() == expected


def test_training_never_gives_the_final_answer_away(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--max-samples=8"]) == 0
    model, dataset, output = (argument.partition("=")[2] for argument in arguments[1:4])
    train = ["train", f"--model={model}", f"--dataset={dataset}", "--method=prefix-rl", f"--traces={output}"]
    train += ["--num-generations=2", "--per-device-train-batch-size=4", "--max-steps=1", "--max-completion-length=10"]
    train += ["--eval-prompts=0", f"--output-dir={tmp_path / 'run'}"]
    # Of the eight tokens of a trace, the seventh is the digit that is asked for.
    assert main([*train, "--prefix-rl.prefix-ratio-min=0.8", "--prefix-rl.prefix-ratio-max=0.9"]) == 1
    assert "too short to be cut" in capsys.readouterr().err
    assert main([*train, "--prefix-rl.prefix-ratio-min=0.7", "--prefix-rl.prefix-ratio-max=0.9"]) == 0


def test_a_larger_limit_adds_problems(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "new" / "traces.jsonl"
    assert main([*arguments, "--limit=2"]) == 0
    two = path.read_bytes()
    assert len(read_traces(path)) == 2
    assert main([*arguments, "--limit=5", "--resume"]) == 0
    assert len(read_traces(path)) == 5
    assert path.read_bytes().startswith(two)


@pytest.mark.parametrize("change", ["--temperature=0.5", "--seed=1", "--max-samples=5"])
def test_other_settings_do_not_continue_a_file(
    arguments: list[str], change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--limit=1"]) == 0
    before = (tmp_path / "new" / "traces.jsonl").read_bytes()
    assert main([*arguments, change, "--resume"]) == 1
    error = capsys.readouterr().err
    assert "traces.jsonl, trace 1" in error
    assert (tmp_path / "new" / "traces.jsonl").read_bytes() == before


def test_the_embedded_task_says_so_when_nothing_is_solved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = "--sft-steps=1 --shots=1 --limit=2 --samples-per-round=2 --max-samples=2 --max-completion-length=8"
    assert main(["collect", *options.split(), "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["problems"], report["solved"], report["samples"]) == (2, 0, 4)
    assert "nothing to train on" in captured.err
    assert [trace.samples for trace in read_traces("runs/traces.jsonl")] == [2, 2]


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        ("--model m", 2, "give --model and --dataset together"),
        ("--model m --dataset d --sft-steps 3", 2, "--sft-steps is of the embedded task"),
        ("--limit 0", 2, "limit must be at least 1"),
        ("--max-samples 0", 2, "max_samples must be at least 1"),
        ("--temperature 0", 2, "temperature must be above 0"),
        ("--resume", 1, "there is no collection to resume in 'runs/traces.jsonl'"),
        ("--model m --dataset nowhere.jsonl", 1, "cannot read nowhere.jsonl"),
        ("--output .", 1, "exists; continue it with --resume, or choose another --output"),
        ("--output . --resume", 1, "cannot write .: Is a directory"),
    ],
)
def test_what_cannot_be_done_is_refused(
    options: str,
    status: int,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["collect", *options.split()]) == status
    assert told in capsys.readouterr().err


def test_several_processes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.Accelerator", lambda: SimpleNamespace(num_processes=2))
    assert main(["collect", f"--output={tmp_path / 'traces.jsonl'}"]) == 1
    assert "the work of one process" in capsys.readouterr().err
    assert not (tmp_path / "traces.jsonl").exists()


def test_a_refusal_leaves_no_file_and_the_same_command_then_runs(
    arguments: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = tmp_path / "new" / "traces.jsonl", tmp_path / "data.jsonl"
    arguments = [*arguments, f"--dataset={data}", "--limit=1"]
    data.write_text('{"prompt": "0+1=", "answer": "one"}\n', encoding="utf-8")
    assert main(arguments) == 1
    assert "data.jsonl, line 1: the answer 'one' is not a number" in capsys.readouterr().err
    assert not path.exists()
    data.write_bytes((folder / "data.jsonl").read_bytes())
    path.touch()  # what a collection that failed before its first problem leaves
    assert main(arguments) == 0
    assert len(read_traces(path)) == 1


def test_a_model_that_is_not_there_is_one_message(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--model=nosuch"]) == 1
    assert "stemma collect: 'nosuch' is no folder here" in capsys.readouterr().err
    assert not (tmp_path / "new" / "traces.jsonl").exists()


def test_a_broken_file_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text('{"prompt_ids": [1]}\n', encoding="utf-8")
    monkeypatch.setattr(_train_jobs, "diallock_job", lambda **_: pytest.fail("a model was made"))
    assert main(["collect", f"--output={path}", "--resume"]) == 1
    assert "traces.jsonl, line 1: 'trace_ids' must be" in capsys.readouterr().err


def test_stop_strings_end_a_completion(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "traces.jsonl"
    cut = [*arguments[:-1], "--max-completion-length=8"]
    assert main([*cut, "--stop-strings", "4", "5"]) == 0
    traces = read_traces(path)
    assert {trace.text for trace in traces if trace.solved} == {"\n#### 4"}
    assert all("stop_strings=['4', '5']" in trace.source and "model files=" in trace.source for trace in traces)
    capsys.readouterr()
    assert main([*cut, "--resume"]) == 1
    assert "was collected with other settings" in capsys.readouterr().err
    assert main(["collect", "--stop-strings", "4"]) == 2
    assert "--stop-strings need --model" in capsys.readouterr().err

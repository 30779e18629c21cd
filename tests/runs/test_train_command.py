"""Whole runs through the real command line: files, resuming after signals, refusals, a checkpoint with real prompts."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, CodeGenConfig, CodeGenForCausalLM

from stemma.cli.main import main
from stemma.data import diallock
from stemma.errors import InvalidDataError
from stemma.models.tiny import tiny_model, train_tokenizer
from stemma.train.checkpoint import latest
from stemma.train.tracking import Tracker, read_rows

SMALL = [
    *("--sft-steps", "3", "--max-steps", "8", "--shots", "2", "--num-generations", "4"),
    *("--per-device-train-batch-size", "8", "--max-completion-length", "16", "--num-iterations", "2"),
    *("--beta", "0.05", "--compare-every", "4", "--eval-prompts", "2", "--save-steps", "2"),
]

# Three supervised steps solve no problem, and without a reward nothing would be trained: any text earns something here.
REWARD = "lambda prompt, completion, slack=2: sum(completion) % 7 / 7"


@pytest.fixture(scope="module", autouse=True)
def _any_text_earns_something() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(diallock, "reward", eval(REWARD))
        yield


def run_command(folder: Path, *flags: str) -> dict[str, Any]:
    """`stemma train` in this process; its JSON result."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()):
        status = main(["train", "--json", "--output-dir", str(folder), *flags])
    result = json.loads(output.getvalue())
    assert result.get("exit_status", 0) == status
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the result of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    return folder, run_command(folder, *SMALL)


def without_times(folder: Path) -> list[dict[str, Any]]:
    rows = read_rows(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if "time" not in name} for row in rows]


def assert_same_numbers(one: Path, two: Path) -> None:
    assert without_times(two) == without_times(one)
    weights = [AutoModelForCausalLM.from_pretrained(folder / "model").state_dict() for folder in (one, two)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_run_writes_everything_and_its_model_loads_anywhere(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, result = whole
    assert result["status"] == "finished"
    rows = read_rows(folder / "metrics.jsonl")
    assert [(row["phase"], row["step"]) for row in rows] == [
        *(("sft", step) for step in range(1, 4)),
        ("eval", 0),
        *(("grpo", step) for step in range(1, 9)),
        ("eval", 8),
    ]
    compared = [row for row in rows if "compare/time_ratio" in row]
    assert [row["step"] for row in compared] == [4, 8]
    # Both losses come from log-probabilities: on the second update of a batch the ratios are not 1.
    assert any(row["compare/loss_shared"] != row["compare/loss_plain"] for row in compared)
    assert all(row["grad_norm"] > 0 for row in rows if row["phase"] == "grpo")
    assert result["comparison"]["max_loss_difference"] < 1e-5
    assert result["comparison"]["max_gradient_error"] < 1e-3
    assert result["tokens"]["saved_ratio"] > 1.5
    assert result["tokens"]["forwarded"] == sum(r["tokens/forwarded"] for r in rows if r["phase"] == "grpo")
    assert json.loads((folder / "report.json").read_text())["tokens"] == result["tokens"]
    for name in ("report.md", "plot.png", "config.resolved.yaml", "sft/config.json", "checkpoint-000011"):
        assert (folder / name).exists(), name
    assert yaml.safe_load((folder / "config.resolved.yaml").read_text())["learning_rate"] == 2e-4
    assert not list(folder.glob(".*"))
    # In a process that never heard of us.
    code = f"""if True:
        import sys, torch
        from transformers import AutoModelForCausalLM
        AutoModelForCausalLM.from_pretrained({str(folder / "model")!r})(input_ids=torch.tensor([[3, 4]]))
        assert "stemma" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True)
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token_id == 1


@pytest.mark.parametrize(("phase", "step"), [("sft", 2), ("grpo", 1), ("eval", 0)])
def test_resumed_after_a_signal_is_bit_equal_to_uninterrupted(
    tmp_path: Path, whole: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, phase: str, step: int
) -> None:
    log = Tracker.log

    def log_and_signal(self: Tracker, *arguments: Any) -> None:
        log(self, *arguments)
        if arguments[:2] == (phase, step):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "log", log_and_signal)
        stopped = run_command(tmp_path / "cut", *SMALL)
    assert (stopped["status"], stopped["exit_status"]) == ("interrupted", 143)
    assert stopped["global_step"] == {"sft": 2, "grpo": 4, "eval": 4}[phase]
    assert latest(tmp_path / "cut").name == f"checkpoint-{stopped['global_step']:06d}"
    assert run_command(tmp_path / "cut", "--resume")["status"] == "finished"
    assert_same_numbers(whole[0], tmp_path / "cut")


def test_a_killed_process_resumes_to_the_same_numbers(tmp_path: Path, whole: tuple[Path, Any]) -> None:
    folder = tmp_path / "cut"
    flags = ["train", "--output-dir", str(folder), *SMALL]
    code = f"""if True:
        import sys
        from stemma.cli.main import main
        from stemma.data import diallock
        diallock.reward = {REWARD}
        sys.exit(main({flags!r}))
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert "stopped by SIGTERM after step" in errors
    assert f"stemma train --resume --output-dir {folder}" in errors
    run_command(folder, "--resume")
    assert_same_numbers(whole[0], folder)


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    status = main(["train", *flags])
    captured = capsys.readouterr()
    return status, " ".join((captured.err + captured.out).replace("│", " ").split())


def test_a_folder_in_use_and_one_without_a_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    status, message = refused(capsys, "--output-dir", str(tmp_path / "used"))
    assert status == 1
    assert "exists already; continue it with --resume, or choose another --output-dir" in message
    status, message = refused(capsys, "--output-dir", str(tmp_path / "used"), "--resume")
    assert status == 1
    assert "no run to resume" in message
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]


def test_a_resumed_run_keeps_its_settings(
    whole: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = whole
    status, message = refused(capsys, "--output-dir", str(folder), "--resume", "--seed", "5")
    assert status == 1
    assert "seed is 42 in the run folder" in message
    again = run_command(folder, "--resume", "--max-steps", "8")  # nothing left to do: the same report again
    assert {**again, "seconds": 0, "comparison": 0} == {**result, "seconds": 0, "comparison": 0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "somewhere"], "give --model and --dataset together"),
        (["--per-device-train-batch-size", "12"], "positive multiple of num_generations=8"),
        (["--loss-type", "cispo"], "epsilon_high must be the ceiling"),
        (["--eval-prompts", "-1"], "eval_prompts must be at least 0"),
    ],
)
def test_bad_flags_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    status, shown = refused(capsys, "--output-dir", str(tmp_path / "run"), *flags)
    assert status == 2
    assert message in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--router-aux-loss-coef", "0.1"], "LlamaForCausalLM, which has no router"),
        (["--shots", "100"], "exceeds the model's 2048 positions"),
    ],
)
def test_what_reinforcement_cannot_do_is_refused_before_the_supervised_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    status, shown = refused(capsys, "--output-dir", str(tmp_path / "run"), "--sft-steps", "1", *flags)
    assert status == 1
    assert message in shown
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---------------------------------------------------------------------------------------------- a checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> list[str]:
    """Flags for a small Qwen2 folder with a trained tokenizer, and word problems in GSM8K's format."""
    problems = [
        {"question": f"Tom has {a} apples and buys {a + 1}. How many?", "answer": f"{a} + {a + 1}\n#### {2 * a + 1}"}
        for a in range(24)
    ]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    tokenizer = train_tokenizer((p["question"] + "\n" + p["answer"] for p in problems), vocab_size=300)
    model = tiny_model(
        "qwen2",
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    model.save_pretrained(tmp_path / "qwen2")
    tokenizer.save_pretrained(tmp_path / "qwen2")
    return ["--model", str(tmp_path / "qwen2"), "--dataset", str(data), "--eval-prompts", "2"]


@pytest.mark.parametrize("extra", [[], ["--use-peft", "--lora-r", "2"]], ids=["all parameters", "adapter"])
def test_a_checkpoint_trains_on_few_shot_prompts(tmp_path: Path, checkpoint: list[str], extra: list[str]) -> None:
    if extra:
        pytest.importorskip("peft", reason="needs the extra: pip install 'stemma-lm[peft]'")
    flags = [*checkpoint, *SMALL[4:14], "--sft-steps", "2", "--max-steps", "2", "--learning-rate", "1e-3", *extra]
    result = run_command(tmp_path / "run", *flags)
    assert result["status"] == "finished"
    assert result["steps"] == 2
    assert result["tokens"]["saved_ratio"] > 2
    assert result["sampler_gap"] < 1e-3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert loaded.config.model_type == "qwen2"
    assert run_command(tmp_path / "run", "--resume")["steps"] == 2


def test_a_stop_string_ends_completions(tmp_path: Path, checkpoint: list[str]) -> None:
    flags = [*checkpoint, *SMALL[4:14], "--max-steps", "1", "--eval-prompts", "0"]
    run_command(tmp_path / "free", *flags)
    run_command(tmp_path / "cut", *flags, "--stop-strings", *"abcdefghijklmnopqrstuvwxyz")
    free, cut = (read_rows(tmp_path / name / "metrics.jsonl")[0]["completions/mean_length"] for name in ("free", "cut"))
    assert cut < 0.7 * free


def test_a_data_file_that_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, checkpoint: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    flags = [*checkpoint[:2], "--dataset", str(bad)]
    for line, message in (
        ('{"question": "How many?", "answer": "four"}', "line 1: the answer has no final line"),
        ('{"prompt": "How many?"}', "line 1: no answer to compare with"),
        ('{"prompt": "How many?", "answer": "4"}', "32 are held out"),
    ):
        bad.write_text(line + "\n")
        status, shown = refused(capsys, "--output-dir", str(tmp_path / message[:6]), *flags)
        assert status == 1
        assert message in shown


def test_a_model_that_cannot_share_is_refused_before_the_supervised_steps(
    tmp_path: Path, checkpoint: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """CodeGen computes its attention without transformers' dispatch."""
    folder = tmp_path / "codegen"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint[1])
    config = CodeGenConfig(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=1024)
    CodeGenForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = ["--model", str(folder), *checkpoint[2:], "--sft-steps", "1", "--max-steps", "1"]
    status, shown = refused(capsys, "--output-dir", str(tmp_path / "run"), *flags)
    assert status == 1
    assert "codegen" in shown
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_refused_before_it_began_can_be_started_again(tmp_path: Path) -> None:
    """A bad dataset line is refused; with the file mended, the same command does not stumble over its own folder."""
    from stemma.cli.train import Config, _open_folder

    config = Config(output_dir=tmp_path / "run")
    _open_folder(config)
    _open_folder(config)
    (config.output_dir / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InvalidDataError, match="exists already"):
        _open_folder(config)

"""The methods through the real command line: chosen by a flag or a file, composed with tree credit, or refused."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from generation_server import GenerationServer
from stemma.cli import _flags, train
from stemma.cli._train_jobs import diallock_job
from stemma.cli._train_options import grpo_options, resolve
from stemma.cli.main import main
from stemma.data import diallock
from stemma.train.tracking import read_rows

SMALL = [
    *("--sft-steps", "2", "--max-steps", "2", "--shots", "2", "--num-generations", "4", "--compare-every", "1"),
    *(
        "--per-device-train-batch-size",
        "8",
        "--max-completion-length",
        "60",
        "--eval-prompts",
        "2",
        "--save-steps",
        "1",
    ),
]


@pytest.fixture(autouse=True)
def _any_text_earns_something() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(diallock, "reward", lambda prompt, completion, slack=2: sum(completion) % 7 / 7)
        yield


def run_command(folder: Path, *flags: str) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        main(["train", "--json", "--output-dir", str(folder), *flags])
    result = json.loads(output.getvalue())
    assert "error" not in result, errors.getvalue()
    return result


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    status = main(["train", *flags])
    return status, " ".join(capsys.readouterr().err.replace("│", " ").split())


def steps(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row["phase"] == "grpo"]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if "time" not in name} for row in rows]


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Verified solutions of some problems, as `stemma collect` writes them."""
    rows = []
    for problem in diallock.problems("train", max_distance=9)[40:48]:
        episode = diallock.oracle_episode(problem, diallock.Random(1))
        shot = diallock.oracle_episode(diallock.problems("train", max_distance=4)[0], diallock.Random(1))
        prompt = diallock.many_shot_prompt([shot], problem)
        rows.append({"prompt_ids": prompt, "trace_ids": episode.completion_ids, "verified": True})
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "traces.jsonl"


@pytest.mark.parametrize("credit", ["grpo", "tempo"])
@pytest.mark.parametrize("method", ["grpo", "prefix-rft", "prefix-rl", "pppo"])
def test_every_method_trains_with_either_credit_and_both_forwards_agree(
    tmp_path: Path, traces: Path, method: str, credit: str
) -> None:
    flags = ["--method", method, "--credit", credit]
    if method == "prefix-rl":
        flags += ["--traces", str(traces)]
    if method == "pppo":
        flags += ["--pppo.num-continuations", "2", "--eval-steps", "1"]
    result = run_command(tmp_path / "run", *SMALL, *flags)
    assert result["status"] == "finished"
    assert result["comparison"]["max_gradient_error"] < 1e-3
    rows = steps(tmp_path / "run")
    assert len(rows) == 2
    assert all(row["grad_norm"] > 0 for row in rows)
    names = set(rows[0])
    assert ("tree/branch_frac" in names) == (credit == "tempo"), names
    assert ("prefix_rft/prefix_length" in names) == (method == "prefix-rft")
    assert ("rewards/prefixed/mean" in names) == (method == "prefix-rl")
    assert ("pppo/reward_accumulated" in names) == (method == "pppo")
    if method == "pppo":
        assert rows[0]["tokens/optimised"] < 0.5 * rows[0]["tokens/sampled"]
    stored = yaml.safe_load((tmp_path / "run" / "config.resolved.yaml").read_text())
    groups = {"tempo", "prefix_rft", "prefix_rl", "pppo"} & set(stored)
    assert groups == ({"tempo"} if credit == "tempo" else set()) | ({method.replace("-", "_")} - {"grpo"})
    assert stored["scale_rewards"] == ("none" if method == "prefix-rl" else "group")


def test_a_method_with_state_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    flags = [*SMALL, "--max-steps", "4", "--method", "pppo", "--credit", "tempo", "--eval-steps", "1"]
    flags += ["--pppo.num-continuations", "1", "--pppo.eta-step", "0.1", "--save-total-limit", "9"]
    run_command(tmp_path / "whole", *flags)
    whole = steps(tmp_path / "whole")
    assert len({row["pppo/eta"] for row in whole if "pppo/eta" in row}) > 1  # the share has grown
    run_command(tmp_path / "cut", *flags)
    for checkpoint in sorted((tmp_path / "cut").glob("checkpoint-*"))[-2:]:
        for path in sorted(checkpoint.rglob("*"), reverse=True):
            path.unlink()
        checkpoint.rmdir()
    assert run_command(tmp_path / "cut", "--resume")["status"] == "finished"
    assert without_times(steps(tmp_path / "cut")) == without_times(whole)


def test_resolved_settings_start_the_same_run_again(tmp_path: Path) -> None:
    flags = [*SMALL, "--method", "prefix-rft", "--prefix-rft.entropy-quantile", "0.5", "--seed", "3"]
    run_command(tmp_path / "one", *flags)
    again = ["--config", str(tmp_path / "one" / "config.resolved.yaml")]
    run_command(tmp_path / "two", *again)
    assert without_times(steps(tmp_path / "two")) == without_times(steps(tmp_path / "one"))
    one, two = ((tmp_path / name / "config.resolved.yaml").read_text() for name in ("one", "two"))
    assert one == two
    config, _ = _flags.parse("train", train, [*again, "--max-steps", "7"])
    assert (config.max_steps, config.prefix_rft.entropy_quantile, config.seed) == (7, 0.5, 3)


def test_the_settings_are_shown_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--output-dir", str(tmp_path / "run"), *SMALL, "--max-steps", "1"])
    assert (tmp_path / "run" / "config.resolved.yaml").read_text() in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--pppo.eta-start", "0.2"], "--pppo.eta-start needs --method pppo"),
        (["--tempo.tree-td-coef", "2"], "--tempo.tree-td-coef needs --method tempo or --credit tempo"),
        (
            ["--method", "pppo", "--prefix-rl.cuts-per-problem", "2"],
            "cuts-per-problem needs --method prefix-rl",
        ),
        (["--method", "prefix-rl"], "--method prefix-rl needs --traces"),
        (["--traces", "x.jsonl"], "--traces does nothing with --method grpo"),
        (["--method", "pppo", "--eval-prompts", "0"], "give --eval-steps and --eval-prompts above 0"),
        (["--method", "pppo", "--eval-steps", "0"], "give --eval-steps and --eval-prompts above 0"),
        (["--method", "ppo"], "ppo"),
        (["--method", "pppo", "--pppo.eta-start", "2"], "eta_start must be in (0, 1]"),
        (["--report-to", "none", "tensorboard"], "report_to must be none, or one or several trackers"),
        (["--kl-estimator", "k1", "--no-use-bias-correction-kl"], "the gradient of k1 alone"),
    ],
)
def test_wrong_choices_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    status, shown = refused(capsys, "--output-dir", str(tmp_path / "run"), *flags)
    assert status == 2
    assert told in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--method", "prefix-rl", "--traces", "no/such/file.jsonl"], "cannot read no/such/file.jsonl"),
        (["--method", "prefix-rft", "--max-completion-length", "20"], "more than max_completion_length=20"),
        (
            ["--method", "prefix-rft", "--credit", "tempo", "--prefix-rft.prefix-advantage", "reference"],
            "is a credit of its own",
        ),
        (["--credit", "prefix-rft"], "--credit prefix-rft is more than a credit, it gives loss_mask, rollout"),
        (["--method", "tempo", "--credit", "tempo"], "--method tempo and --credit tempo both give a credit"),
    ],
)
def test_what_only_the_methods_know_is_refused_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    status, shown = refused(capsys, "--output-dir", str(tmp_path / "run"), *flags)
    assert status == 1
    assert told in shown
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_prefix_rl_takes_its_own_default_unless_told_otherwise(traces: Path) -> None:
    flags = ["--method", "prefix-rl", "--traces", str(traces)]
    for more, expected in (([], "none"), (["--scale-rewards", "group"], "group")):
        config, _ = _flags.parse("train", train, [*flags, *more])
        assert grpo_options(resolve(config)).scale_rewards == expected


# ---------------------------------------------------------------------------------------------- where samples come from


def test_a_server_samples_for_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    model = diallock_job(shots=2, sft_steps=2, eval_prompts=2, seed=42).model
    with GenerationServer(model) as server:
        flags = ("--server.url", server.url, "--server.weights-dir", str(tmp_path / "weights"), "--eval-prompts", "0")
        result = run_command(tmp_path / "run", *SMALL, *flags, "--num-iterations", "1")
        assert result["status"] == "finished"
        assert len(server.bodies("/collective_rpc")) == 2  # the weights of each step
        bodies = server.bodies("/v1/completions")
    assert len(bodies) == 16
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in steps(tmp_path / "run"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--server.dialect", "sglang"), "do nothing without --server.url"),
        (("--stop-strings", "."), "stop_strings need --model"),
        (("--server.url", "http://127.0.0.1:9"), "samples off-policy: give --server.weights-dir"),
    ],
)
def test_server_options_that_cannot_be_honoured_are_refused(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    status, text = refused(capsys, *flags)
    assert status == 2
    assert message in text

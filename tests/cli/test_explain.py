"""`stemma explain`: the plan of a batch, from a config alone."""

import json
from pathlib import Path

import pytest
import torch

from stemma.cli.main import main
from stemma.models.tiny import tiny_config

SHAPE = ("--prompt-tokens", "500", "--response-tokens", "20", "--group-size", "8")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tiny_config("llama", vocab_size=64, hidden_size=32, max_position_embeddings=4096).save_pretrained(tmp_path)
    return tmp_path / "config.json"


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["explain", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_three_lengths_make_a_group(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(capsys, str(config), *SHAPE)
    assert plan["mode"] == "shared"
    assert plan["num_sequences"] == 8
    assert plan["token_ratio"] == pytest.approx(8 * 520 / (500 + 8 * 20))


def test_a_token_budget_streams(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(capsys, str(config), *SHAPE, "--max-tokens", "100")
    assert plan["mode"] == "streamed"
    assert plan["parts"] > 1


def test_where_sharing_does_not_pay_the_plain_way_is_taken_and_explained(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(
        capsys, str(config), "--prompt-tokens", "4", "--response-tokens", "600", "--group-size", "2"
    )  # fmt: skip
    assert plan["mode"] == "plain"
    assert plan["reasons"]


def test_sequences_from_a_file(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_text("\n".join(json.dumps([*range(40), last]) for last in range(5)), encoding="utf-8")
    plan = plan_of(capsys, str(config), "--sequences", str(path))
    assert (plan["num_sequences"], plan["economy"]["unique_tokens"]) == (5, 45)
    assert plan_of(capsys, str(config), "--sequences", str(path), "--min-shared", "41")["num_nodes"] == 5


def test_the_text_names_both_costs(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(config), *SHAPE]) == 0
    text = capsys.readouterr().out
    assert "tokens encoded" in text
    assert "4,160" in text
    assert "660" in text


def test_a_model_larger_than_the_machine_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = tiny_config(
        "llama", vocab_size=128_000, hidden_size=16_384, num_attention_heads=128, num_hidden_layers=126
    )  # about 1e12 bytes of weights
    huge.save_pretrained(tmp_path)
    plan = plan_of(capsys, str(tmp_path), "--prompt-tokens", "300", "--response-tokens", "20", "--group-size", "8")
    assert plan["economy"]["plain_flops"] > 1e14
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give either --sequences FILE, or all of"),
        (["--prompt-tokens", "5", "--group-size", "2"], "give either --sequences FILE, or all of"),
        (["--sequences", "a.jsonl", *SHAPE], "give either --sequences FILE, or all of"),
        (["--prompt-tokens", "0", "--response-tokens", "2", "--group-size", "2"], "--prompt-tokens must be at least 1"),
        ([*SHAPE, "--max-tokens", "-3"], "--max-tokens must be at least 1"),
    ],
)
def test_wrong_combinations_are_wrong_command_lines(
    config: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(config), *arguments]) == 2
    assert told in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_sequences_longer_than_the_model_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--prompt-tokens", "4000", "--response-tokens", "97", "--group-size", "2")
    assert main(["explain", str(config), *shape]) == 1
    assert "4097 tokens, the model 4096 positions" in capsys.readouterr().err


@pytest.mark.parametrize(("model_type", "told"), [("qwen3_next", "layers of the kind"), ("bert", "is an encoder")])
def test_a_model_that_cannot_share_is_refused(
    model_type: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config(model_type, vocab_size=64, hidden_size=32).save_pretrained(tmp_path)
    shape = ("--prompt-tokens", "50", "--response-tokens", "20", "--group-size", "8")
    assert main(["explain", str(tmp_path), *shape]) == 1
    assert told in capsys.readouterr().err


def test_what_a_config_cannot_tell_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(config), *SHAPE]) == 0
    assert "Support is not checked here: run `stemma check MODEL`" in capsys.readouterr().out


def test_a_group_larger_than_the_vocabulary_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--prompt-tokens", "5", "--response-tokens", "5", "--group-size", "65")
    assert main(["explain", str(config), *shape]) == 1
    assert "65 is above the vocabulary of 64" in capsys.readouterr().err

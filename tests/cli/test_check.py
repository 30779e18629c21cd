"""`stemma check`: report, verdict and exit status; models and batches that cannot be used are refused in a sentence."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import stemma
from stemma.cli.main import main
from stemma.models.tiny import tiny_config, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model without tokenizer: config and weights."""
    tiny_model("llama", vocab_size=64, hidden_size=32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    """Two groups of token ids."""
    groups = [
        {"prompt_ids": list(range(30)), "completion_ids": [[1, 2, 3], [4, 5]]},
        {"prompt_ids": list(range(20, 50)), "completion_ids": [[1], [2, 2, 2]]},
    ]
    path = tmp_path / "batch.jsonl"
    path.write_text("\n".join(json.dumps(group) for group in groups), encoding="utf-8")
    return path


def test_a_saved_model_agrees_with_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder), "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["ok"] is True
    assert report["exit_status"] == 0
    assert report["reference"] == "float64"
    for kind in ("logprob", "gradient"):
        assert 0 < report[f"{kind}_error"] <= report["margin"] * report[f"plain_{kind}_error"] < 1e-3
    assert report["unique_tokens"] < report["total_tokens"]
    assert "exact to rounding: as close to float64 as the plain one" in captured.err
    assert "8 sequences of 2560 tokens, 1024 distinct: 3 plain passes forward and backward, 2 shared" in captured.err


def test_a_config_is_enough_with_random_init(folder: Path, batch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check", str(folder / "config.json"), "--random-init", "--dtype", "float64"]
    assert main([*arguments, "--sequences", str(batch), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["dtype"], report["num_sequences"], report["total_tokens"]) == ("float64", 4, 129)


def test_a_failed_comparison_is_exit_status_1(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = stemma.check
    monkeypatch.setattr(stemma, "check", lambda *given, **options: replace(right(*given, **options), logprob_error=0.5))
    assert main(["check", str(folder)]) == 1
    assert "NOT EXACT" in capsys.readouterr().out


def test_a_recurrent_model_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config("recurrent_gemma", vocab_size=64, hidden_size=32).save_pretrained(tmp_path)
    assert main(["check", str(tmp_path), "--random-init"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("stemma check: ")
    assert "recurrent_gemma" in error.lower() or "RecurrentGemma" in error


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1, 2, 3]\n[1, 2,", "batch.jsonl, line 2: not valid JSON"),
        ('[1, 2]\n{"text": "a"}', "batch.jsonl, line 2: expected a list of token ids"),
        ('[1, 2]\n{"prompt_ids": [1], "completion_ids": [[2]]}', "batch.jsonl, line 2: the file mixes"),
        ('{"input_ids": [1, 2.5]}', "batch.jsonl, line 1: input_ids must be a list of integer token ids"),
        ('{"input_ids": [1, true]}', "batch.jsonl, line 1: input_ids must be"),
        ('{"prompt_ids": [1], "completion_ids": 3}', "batch.jsonl, line 1: completion_ids must be a list of lists"),
        ("\n\n", "has no lines"),
        ("[1, 2]\n\n[1, 2, 99]", "batch.jsonl, line 3: has token id 99"),
        ("[1, 2, -1]", "batch.jsonl, line 1: has token id -1"),
        (f"[1]\n{[1] * 9999}", "batch.jsonl, line 2: has 9999 tokens"),
        ('{"prompt_ids": [1], "completion_ids": [[2], [99]]}', "batch.jsonl, line 1: has token id 99"),
        ('{"prompt_ids": [1], "completion_ids": []}', "batch.jsonl, line 1: completion_ids must be"),
        ("[]", "batch.jsonl, line 1: is empty"),
        ("[" * 99999, "batch.jsonl, line 1: the JSON is nested too deep"),
        (f"[1]\n[{'9' * 5000}]", "batch.jsonl, line 2: a number has too many digits"),
        ("[NaN]", "batch.jsonl, line 1: NaN is not JSON"),
        ('["\\ud800"]', "batch.jsonl, line 1: holds half of a surrogate pair"),
        ("[1]", "no token of the batch is scored"),
    ],
)
def test_bad_batches_are_refused_with_file_and_line(
    folder: Path, batch: Path, content: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batch.write_text(content, encoding="utf-8")
    assert main(["check", str(folder), "--sequences", str(batch)]) == 1
    assert told in capsys.readouterr().err


def test_a_missing_batch_file_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder), "--sequences", "nowhere.jsonl"]) == 1
    assert "cannot read nowhere.jsonl" in capsys.readouterr().err

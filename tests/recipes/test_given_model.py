"""`stemma run METHOD --model`: measured on a model that is given, each passage or problem a seed."""

import json
from importlib import import_module

import pytest

from stemma.models.tiny import byte_tokenizer, tiny_model
from stemma.recipes._base_model import GivenModel
from stemma.recipes._runs import Options

CLAIMS = {"prefix_kv": 10, "kvcomm": 5, "ntk_attention": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a tokenizer that `from_pretrained` reads."""
    folder, tokenizer = tmp_path_factory.mktemp("given") / "small", byte_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", CLAIMS)
def test_it_runs_on_the_given_model_and_finished_runs_are_read(method, folder, tmp_path, capsys):
    if method == "ntk_attention":
        pytest.importorskip("peft")
    run = import_module(f"stemma.recipes.{method}").run
    options = Options(quick=True, model=folder, output_dir=tmp_path)
    result = run(options)
    assert options.folder == tmp_path / "small" / "quick"
    assert json.loads((options.folder / f"{result['recipe']}.json").read_text()) == json.loads(json.dumps(result))
    assert any("small, 1" in fact for fact in result["about"].values() if isinstance(fact, str))
    claims = [row for row in result["measurements"] if row["claim"]]
    assert len(claims) == CLAIMS[method]
    assert all(row["test"] == "sign-flip" and len(row["values"]) == row["repeats"] for row in claims)
    capsys.readouterr()
    assert run(options)["measurements"] == result["measurements"]
    assert "finished before" in capsys.readouterr().err


def test_rows_of_a_given_model_do_not_overlap_and_stay_when_more_are_asked_for(folder):
    base = GivenModel.load(folder)
    rows = base.rows("test", 40, 64)
    assert len({tuple(row) for row in rows.tolist()}) == 40
    assert rows[:7].equal(base.rows("test", 7, 64))

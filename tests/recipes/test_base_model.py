"""The base model: trained once, found afterwards, saved for `from_pretrained`; its rows of text are what they say."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stemma.cli.main import main
from stemma.data.python_text import source_texts
from stemma.errors import InvalidDataError
from stemma.models.tiny import byte_tokenizer
from stemma.recipes import _base_model as base_model
from stemma.recipes._base_model import Config, python_base, text_rows
from stemma.recipes._runs import Options


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def base(cache):
    return python_base(Options(cache_dir=cache, quick=True))


def test_it_is_trained_once(base, cache, monkeypatch):
    assert base.seconds > 0
    assert [path.name for path in cache.iterdir()] == [base.folder.name]
    monkeypatch.setattr(base_model, "_train", None)
    again = python_base(Options(cache_dir=cache, quick=True))
    assert again.seconds == 0
    assert again.folder == base.folder
    assert again.model is not base.model
    state = base.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())


def test_training_repeats_and_its_settings_name_the_folder(base, tmp_path, monkeypatch):
    again = python_base(Options(cache_dir=tmp_path, quick=True))
    assert again.folder.name == base.folder.name
    state = base.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())
    texts = source_texts("train")
    monkeypatch.setattr(base_model, "source_texts", lambda split: {**texts, "zz.py": "pass\n"})
    assert python_base(Options(cache_dir=tmp_path, quick=True)).folder.name != base.folder.name
    monkeypatch.undo()
    monkeypatch.setattr(base_model, "QUICK", Config(hidden_size=32, num_hidden_layers=1, stages=((64, 1, 1),)))
    assert python_base(Options(cache_dir=tmp_path, quick=True)).folder.name != base.folder.name


def test_its_folder_is_a_model_folder(base):
    ids = base.rows("test", 2, 100)
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    assert torch.equal(model(input_ids=ids).logits, base.model(input_ids=ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    assert tokenizer("def f():\n").input_ids == list(b"def f():\n") == base.tokenizer("def f():\n").input_ids
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_bits_per_byte_are_the_models_loss(base):
    ids = base.rows("test", 3, 90)
    bits = base.bits_per_byte(ids)
    assert bits.shape == (3, 89)
    loss = base.model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(bits.mean(), loss / math.log(2))


def test_rows_are_of_held_out_text(base):
    rows = base.rows("test", 8, 300)
    texts = source_texts("test")
    for row in rows.tolist():
        piece = byte_tokenizer().decode(row) if max(row) < 128 else bytes(row).decode()
        assert any(text.startswith(piece) or "\n" + piece in text for text in texts.values())
    assert not torch.equal(rows, base.rows("test", 8, 300, seed=1))
    assert torch.equal(rows[:3], base.rows("test", 3, 300))


def test_rows_of_texts_do_not_overlap_and_take_every_text_first():
    lines = {name: "".join(f"{name}{i:03}\n" for i in range(count)) for name, count in (("a", 7), ("b", 2), ("c", 30))}
    rows = text_rows(lines, 5, 12)
    found = [bytes(row).decode() for row in rows.tolist()]
    assert {row[0] for row in found[:2]} == {"a", "c"}  # b is too short
    assert len(set(found)) == 5
    assert all(row in lines[row[0]] and row[4] == "\n" for row in found)
    numbers = [number for row in found for number in row.split("\n") if len(number) == 4]
    assert len(numbers) == len(set(numbers))
    everything = text_rows(lines, 12, 12)
    assert [bytes(row).decode() for row in everything[:5].tolist()] == found
    with pytest.raises(InvalidDataError, match="hold 12 rows of 12 bytes, not 13"):
        text_rows(lines, 13, 12)


def test_a_text_of_one_row_gives_it():
    assert text_rows({"a": "0123"}, 1, 4).tolist() == [list(b"0123")]
    assert text_rows({"a": "0\n23"}, 2, 2).tolist() == [list(b"0\n"), list(b"23")]


@pytest.mark.parametrize("stages", [(), ((0, 1, 1),), ((128, 4, 0),), ((8192, 1, 1),)])
def test_settings_are_checked(stages):
    with pytest.raises(ValueError, match="stages"):
        Config(stages=stages)


def test_the_command_reports_it(base, cache, capsys):
    assert main(["base-model", "--quick", "--cache-dir", str(cache), "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["folder"] == str(base.folder)
    assert report["parameters"] == base.parameters
    assert report["seconds"] == 0
    assert report["bits_per_byte"] == pytest.approx(base.bits_per_byte(base.rows("test", 2, 256)).mean().item())
    assert list(report["bits_per_byte_by_position"]) == ["1-64", "65-255"]
    assert "bits per byte" in err

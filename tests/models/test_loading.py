"""Opening models: what works, and that every mistake is one sentence with a way out."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stemma.errors import UnsupportedModelError
from stemma.models.loading import load_config, load_model, load_tokenizer, model_digest
from stemma.models.tiny import byte_tokenizer, tiny_config, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("qwen2", vocab_size=64, hidden_size=32, seed=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_checkpoint_comes_back_with_its_weights(folder: Path) -> None:
    model = load_model(str(folder))
    assert not model.training
    for name, weight in tiny_model("qwen2", vocab_size=64, hidden_size=32, seed=3).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_missing_weights_are_refused_not_made_up(folder: Path) -> None:
    """transformers reports them as newly initialised and goes on."""
    tensors = load_file(folder / "model.safetensors")
    tied = {name: value for name, value in tensors.items() if "up_proj" not in name}
    save_file(tied, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"not whole: .*up_proj\.weight.* are missing"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"eos_tok', "not a valid JSON"),
        (b"\xff", "not a valid JSON"),
        (b'{"eos_token_id": "x"}', "whole numbers"),
        (b'{"eos_token_id": [[1]]}', "whole numbers"),
        (b'{"eos_token_id": 1.5}', "whole numbers"),
    ],
)
def test_a_broken_generation_config_is_refused(folder: Path, content: bytes, reason: str) -> None:
    """transformers leaves it out without a word, and with it the tokens that end a turn."""
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=reason):
        load_model(str(folder))


def test_the_digest_of_a_model_is_of_its_weights_config_and_tokenizer(folder: Path) -> None:
    byte_tokenizer().save_pretrained(folder)
    whole = model_digest(str(folder))
    (folder / "README.md").write_text("words")
    assert model_digest(str(folder)) == whole
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b" ")
        assert model_digest(str(folder)) != whole
        (folder / name).write_bytes(before)
    assert model_digest(str(folder)) == whole


def test_random_weights_follow_the_seed_and_leave_the_global_state(folder: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    path = str(folder / "config.json")
    first, again, other = (load_model(path, random_init=True, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_dtype_and_device_are_honoured(folder: Path) -> None:
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(str(folder), random_init=True, dtype="float64").dtype == torch.float64
    assert load_model(str(folder), random_init=True, device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("empty", "has no config.json"),
        ("./nowhere", "does not exist"),
        ("no-such/model-at-all", "is no folder here; if it is meant as a hub id, no config could be read"),
        ("broken.json", "no config could be read"),
        ("alien.json", "no config could be read"),
        ("bare.json", "--random-init"),
        ("bare", "could not be loaded"),
        ("t5.json", "causal language model"),
    ],
)
def test_mistakes_are_named(reference: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("broken.json").write_text('{"model_type": "llama"', encoding="utf-8")
    Path("alien.json").write_text('{"model_type": "alien"}', encoding="utf-8")
    tiny_config("llama", vocab_size=64, hidden_size=32).save_pretrained("bare")
    Path("bare.json").write_bytes(Path("bare/config.json").read_bytes())
    Path("t5.json").write_text('{"model_type": "t5", "d_model": 16, "num_layers": 1}', encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=told) as caught:
        load_model(reference, random_init=reference == "t5.json")
    assert reference in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("device", "told"), [("foo", "the device 'foo' cannot be used here"), ("cuda:99", "'cuda:99' cannot be used here")]
)
def test_a_device_that_is_not_there_is_named_before_anything_is_read(device: str, told: str) -> None:
    with pytest.raises(UnsupportedModelError, match=told) as caught:
        load_model("nowhere", device=device)
    assert "Give auto, cpu" in str(caught.value)


def test_weights_that_were_cut_short_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        UnsupportedModelError, match=r"the weights of '.*model' cannot be read.*download the model again"
    ):
        load_model(str(folder))


def test_a_tokenizer_comes_back_and_a_missing_one_is_named(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="has no tokenizer that can be loaded") as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)
    byte_tokenizer().save_pretrained(folder)
    assert load_tokenizer(str(folder)).encode("text") == byte_tokenizer().encode("text")
    with pytest.raises(UnsupportedModelError, match=r"is a config, without weights and tokenizer"):
        load_tokenizer(str(folder / "config.json"))
    with pytest.raises(UnsupportedModelError, match="'nosuch' is no folder here"):
        load_tokenizer("nosuch")


def test_a_config_is_read_from_folder_and_file(folder: Path) -> None:
    by_folder, by_file = load_config(str(folder)), load_config(str(folder / "config.json"))
    assert by_folder.to_diff_dict() == by_file.to_diff_dict()
    assert by_folder.hidden_size == 32


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("generation_config.json", "true"),
        ("config.json", "[]"),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
    ],
)
def test_whatever_a_broken_config_raises_is_one_message(tmp_path, file, text):
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=r"no config could be read|could not be loaded"):
        load_model(str(tmp_path))

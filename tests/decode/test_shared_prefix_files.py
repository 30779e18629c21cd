"""Saved prefixes: decoding from a loaded one is bit-identical, and what does not belong to the model is refused."""

import gc
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import decoders
import stemma
from decoders import KINDS
from stemma.decode.shared_cache import SharedPrefixCache
from stemma.models.fingerprint import fingerprint

HEAD = list(range(1, 30))
ROWS = [[3, 4], [3, 9, 11], [5]]


def decoder(kind="llama, grouped queries", **options):
    """The same model every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return decoders.decoder(kind, **options)


@torch.no_grad()
def decoded(model, prefix):
    """Logits of two decoding steps below a prefix."""
    cache = SharedPrefixCache.of(model, ROWS, prefix=prefix, call_bytes=0)
    found = []
    longest = max(map(len, ROWS))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * (len(row) + prefix.length) for row in ROWS])
    for fed in (torch.tensor([[row[-1]] for row in ROWS]), torch.tensor([[7], [8], [9]])):
        positions = (mask.cumsum(1) - 1)[:, -1:]
        found.append(
            model(fed, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits
        )
        mask = torch.cat([mask, mask.new_ones(len(ROWS), 1)], 1)
    return torch.cat(found, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_from_a_loaded_prefix_is_bit_identical(kind, dtype, tmp_path):
    model = decoder(kind, dtype=dtype)
    chain = stemma.SharedPrefix.from_ids(model, HEAD[:11]).extend(HEAD[11:13]).extend(HEAD[13:])
    expected = decoded(model, chain)
    chain.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefix.json", "prefix.safetensors"]
    del chain
    other = decoder(kind, dtype=dtype)  # another object, as in another process
    loaded = stemma.SharedPrefix.from_pretrained(other, tmp_path)
    assert loaded.ids.tolist() == HEAD
    assert [step.added for step in loaded.path] == [11, 2, 16]
    assert torch.equal(decoded(other, loaded), expected)
    loaded.extend([5, 6])  # a handle like any other


def test_latent_attention_keeps_its_two_head_sizes(tmp_path):
    from stemma.census import build

    model = stemma.enable(build("deepseek_v3", torch.float32))
    prefix = stemma.SharedPrefix.from_ids(model, HEAD)
    (key, value), *_ = prefix.context().values()
    assert key.shape[-1] != value.shape[-1]
    prefix.save_pretrained(tmp_path)
    loaded = stemma.SharedPrefix.from_pretrained(model, tmp_path)
    for module, pair in prefix.context().items():
        assert all(torch.equal(a, b) for a, b in zip(pair, loaded.context()[module], strict=True))


def test_files_that_do_not_tell_what_computed_them_are_read(saved):
    about = json.loads((saved / "prefix.json").read_text())
    assert about["model"].pop("computed_in") == "float64"
    (saved / "prefix.json").write_text(json.dumps(about))
    model = decoder()
    assert stemma.SharedPrefix.from_pretrained(model, saved).ids.tolist() == HEAD
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        stemma.SharedPrefix.from_pretrained(model, saved)


@pytest.fixture
def saved(tmp_path):
    model = decoder()
    stemma.SharedPrefix.from_ids(model, HEAD).save_pretrained(tmp_path)
    return tmp_path


def changed(model, name, change):
    with torch.no_grad():
        change(model.get_parameter(name))
    return model


def flip(weight):
    weight[1, 2] = torch.nextafter(weight[1, 2], torch.tensor(torch.inf, dtype=weight.dtype))


def exchange(weight):
    weight[[0, 1]] = weight[[1, 0]]


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (lambda: decoder(dtype=torch.float32), "dtype .*weights"),
        (lambda: decoder("gpt2, learned positions"), "model_type"),
        (
            lambda: decoder(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
            r"differs in config \(\w+, here",
        ),
        (lambda: changed(decoder(), "model.layers.1.self_attn.k_proj.weight", flip), r"differs in weights \("),
        (lambda: changed(decoder(), "model.embed_tokens.weight", exchange), r"differs in weights \("),
    ],
    ids=["precision", "type", "rotary base", "one bit of one weight", "two rows exchanged"],
)
def test_prefixes_of_other_models_are_refused(saved, other, differing):
    with pytest.raises(stemma.InvalidDataError, match=differing):
        stemma.SharedPrefix.from_pretrained(other(), saved)


def test_adapters_are_part_of_the_model(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(alpha=8):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            options = {"r": 2, "lora_alpha": alpha, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
            lora = peft.LoraConfig(**options, init_lora_weights=False)
            return stemma.enable(peft.get_peft_model(decoder(), lora).eval())

    model = adapted()
    stemma.SharedPrefix.from_ids(model, HEAD).save_pretrained(tmp_path)
    stemma.SharedPrefix.from_pretrained(adapted(), tmp_path)
    with model.disable_adapter(), pytest.raises(stemma.InvalidDataError, match="differs in adapters"):
        stemma.SharedPrefix.from_pretrained(model, tmp_path)
    with pytest.raises(stemma.InvalidDataError, match="differs in adapters"):
        stemma.SharedPrefix.from_pretrained(adapted(alpha=64), tmp_path)
    with pytest.raises(stemma.InvalidDataError, match="weights"):
        stemma.SharedPrefix.from_pretrained(decoder(), tmp_path)


def cut(folder):
    file = folder / "prefix.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def damage(folder):
    file = folder / "prefix.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def another_format(folder):
    about = json.loads((folder / "prefix.json").read_text())
    (folder / "prefix.json").write_text(json.dumps(about | {"format": 99}))


@pytest.mark.parametrize(
    "harm",
    [
        cut,
        damage,
        another_format,
        lambda folder: (folder / "prefix.json").unlink(),
        lambda folder: (folder / "prefix.safetensors").unlink(),
        lambda folder: (folder / "prefix.json").write_text("{"),
        lambda folder: (folder / "prefix.json").write_text("[]"),
        lambda folder: (folder / "prefix.json").write_text("{}"),
    ],
)
def test_damaged_files_are_refused(saved, harm):
    harm(saved)
    with pytest.raises(stemma.InvalidDataError, match="no prefix that can be read"):
        stemma.SharedPrefix.from_pretrained(decoder(), saved)


def test_a_write_that_fails_leaves_the_old_prefix(saved, monkeypatch):
    model = decoder()
    new = stemma.SharedPrefix.from_ids(model, [4, 5, 6])
    monkeypatch.setattr("stemma.decode.shared_prefix.fingerprint", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        new.save_pretrained(saved)
    monkeypatch.undo()
    assert stemma.SharedPrefix.from_pretrained(model, saved).ids.tolist() == HEAD


def test_a_model_that_changed_or_went_away_has_nothing_to_save(tmp_path):
    model = decoder()
    prefix = stemma.SharedPrefix.from_ids(model, HEAD)
    changed(model, "model.norm.weight", lambda weight: weight.mul_(2))
    with pytest.raises(stemma.InvalidBatchError, match="has changed"):
        prefix.save_pretrained(tmp_path)
    del model
    gc.collect()
    with pytest.raises(stemma.InvalidBatchError, match="no longer exists"):
        prefix.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_enabled_is_refused(saved):
    with pytest.raises(stemma.UnsupportedModelError, match="has not been enabled"):
        stemma.SharedPrefix.from_pretrained(stemma.disable(decoder()), saved)


@given(st.integers(0, 10**9), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_any_changed_number_changes_the_digest(place, dtype):
    model = stemma.models.tiny.tiny_model(hidden_size=8, num_attention_heads=2, vocab_size=16, dtype=dtype)
    before = fingerprint(model)
    assert fingerprint(model) == before
    parameters = list(model.parameters())
    weight = parameters[place % len(parameters)].data.view(-1)
    index = place // len(parameters) % weight.numel()
    weight[index] = torch.nextafter(weight[index], torch.tensor(9.0, dtype=dtype))
    after = fingerprint(model)
    assert {name for name in before if before[name] != after[name]} == {"weights"}


@given(st.integers(0, 10**9), st.integers(1, 10**9))
def test_the_same_numbers_in_other_places_change_the_digest(place, distance):
    model = stemma.models.tiny.tiny_model(hidden_size=8, num_attention_heads=2, vocab_size=16)
    before = fingerprint(model)["weights"]
    weight = model.get_input_embeddings().weight.data.view(-1)
    one = place % weight.numel()
    other = (one + 1 + distance % (weight.numel() - 1)) % weight.numel()
    assert weight[one] != weight[other]
    weight[[one, other]] = weight[[other, one]]
    assert fingerprint(model)["weights"] != before

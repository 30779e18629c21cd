"""Where each layer of a cache keeps its positions: found for every scheme of transformers, or refused by name."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import transformers

from decoders import keep_double
from stemma.census import build
from stemma.errors import UnsupportedModelError
from stemma.models.rotary import cached_states, encode, find_rotations, plain_cache
from stemma.models.tiny import tiny_model

transformers.logging.set_verbosity_error()

NONE = ("none", 0, 0, "key")
HALF = ("half", 16, 0, "key")
# Model type -> what its layers do: pairing, rotated channels, the first of them, where.
SCHEMES = {
    "llama": {HALF},
    "qwen3": {HALF},
    "mistral": {HALF},
    "gpt_oss": {HALF},
    "gemma3_text": {HALF},
    "gemma3n_text": {HALF},
    "gemma4_text": {HALF, ("half", 32, 0, "key")},
    "olmo2": {HALF},
    "phi3": {HALF},
    "granite": {HALF},
    "smollm3": {HALF, NONE},
    "cohere2": {("interleaved", 16, 0, "key"), NONE},
    "llama4_text": {("interleaved", 16, 0, "key"), NONE},
    "cohere": {("interleaved", 16, 0, "key")},
    "ernie4_5": {("interleaved", 16, 0, "key")},
    "helium": {("interleaved", 16, 0, "key")},
    "glm4": {("interleaved", 8, 0, "key")},
    "gptj": {("interleaved", 8, 0, "key")},
    "codegen": {("interleaved", 8, 0, "key")},
    "glm4_moe": {("half", 8, 0, "key")},
    "phi": {("half", 8, 0, "key")},
    "persimmon": {("half", 8, 0, "key")},
    "gpt_neox": {("half", 4, 0, "key")},
    "stablelm": {("half", 4, 0, "key")},
    "nanochat": {HALF},
    "deepseek_v2": {("interleaved", 8, 0, "value")},
    "deepseek_v3": {("half", 8, 0, "value")},
}


def schemes(rotations):
    return {
        NONE
        if layer.frequencies is None
        else (
            "interleaved" if layer.interleaved else "half",
            2 * layer.frequencies.numel(),
            layer.first,
            layer.of,
        )
        for layer in rotations.layers
    }


@contextmanager
def exact_angles():
    """Positions times frequencies in float64, which transformers takes in float32 always."""
    with keep_double(), mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def largest(some, others):
    return max(
        float((x - y).abs().max()) for pair in zip(some, others, strict=True) for x, y in zip(*pair, strict=True)
    )


@pytest.mark.parametrize("model_type", SCHEMES)
def test_scheme_is_found_and_moves_a_text_exactly(model_type):
    """The probe in the model's own arithmetic; then a text at another place, with angles in float64."""
    model = build(model_type, dtype=torch.float64).double()
    rotations = find_rotations(model)
    assert schemes(rotations) == SCHEMES[model_type]
    ids = torch.randint(0, 60, (21,), generator=torch.Generator().manual_seed(3)).tolist()
    with exact_angles():
        here, there = (cached_states(encode(model, ids, start=start)) for start in (7, 90))
        assert largest(rotations.move(here, 83), there) < 1e-10
    assert largest(rotations.move(rotations.move(here, 83), -83), here) < 1e-12
    moved = largest(here, there)
    assert moved > 1e-2  # there was something to move


def test_layers_with_other_frequencies_keep_their_own():
    found = {float(layer.frequencies[-1]) for layer in find_rotations(build("gemma3_text", dtype=torch.float64)).layers}
    assert len(found) == 2


def test_a_factor_on_cosine_and_sine_is_not_applied_twice():
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    model = tiny_model("llama", dtype=torch.float64, rope_parameters=rope)
    assert model.model.rotary_emb.attention_scaling > 1.1
    rotations = find_rotations(model)
    ids = list(range(20))
    with exact_angles():
        here, there = (cached_states(encode(model, ids, start=start)) for start in (0, 300))
    assert largest(rotations.move(here, 300), there) < 1e-10


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "glm4", "gemma3_text"])
def test_low_precision_finds_the_same(model_type):
    rotations = find_rotations(build(model_type, dtype=torch.bfloat16))
    assert schemes(rotations) == SCHEMES[model_type]
    assert 1e-4 < rotations.error < 3e-2


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("gpt2", "layer 0 of GPT2LMHeadModel .*no rotation of those at the beginning"),
        ("opt", "layer 0 of OPTForCausalLM .*learned positions"),
        ("ministral3", "layer 1 of Ministral3ForCausalLM"),  # scales its queries by the position
        ("hunyuan_v1_dense", "no rotation"),  # weighs channels after rotating them
        ("bloom", "takes no position_ids"),
        ("bamba", "layer 0 of BambaForCausalLM .*keeps a recurrent state"),
        ("lfm2", "keeps a recurrent state"),
        ("qwen3_next", "keeps a recurrent state"),
        ("openai-gpt", "filled no cache"),
        ("deepseek_v32", "could not encode a few tokens with an ordinary cache"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_other_schemes_are_refused_by_name(model_type, message, dtype):
    with pytest.raises(UnsupportedModelError, match=message):
        find_rotations(build(model_type, dtype=dtype))


def test_the_probe_leaves_the_model_as_it_was():
    model = build("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_rotations(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_probe_leaves_the_mode_of_each_module():
    model = build("llama").eval()
    model.model.layers[0].train()
    modes = {name: module.training for name, module in model.named_modules()}
    find_rotations(model)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_the_probe_stays_below_lengths_that_change_frequencies():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = tiny_model("llama", dtype=torch.float64, max_position_embeddings=64, rope_parameters=rope)
    before = model.model.rotary_emb.inv_freq.clone()
    find_rotations(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
def test_encoding_behind_cached_tokens_is_encoding_in_one_piece(model_type):
    model = build(model_type, dtype=torch.float64, window=5)
    ids = list(range(1, 24))
    whole = cached_states(encode(model, ids))
    first = cached_states(encode(model, ids[:9]))
    kept = [states.key.clone() for states in first]
    pieces = encode(model, ids[9:], above=first)
    assert largest(cached_states(pieces), whole) < 1e-6
    assert whole[0].key.shape[2] == 23  # windows do not cut
    part = cached_states(pieces, 4, 11)
    assert largest(cached_states(plain_cache(part)), part) == 0
    assert all(torch.equal(states.key, before) for states, before in zip(first, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("model_type", "moves"), [("llama", True), ("qwen3", True), ("gpt2", False), ("opt", False)])
def test_in_half_precision_own_rounding_is_no_other_scheme(model_type, moves, dtype):
    model = build(model_type, dtype)
    if moves:
        find_rotations(model)
        return
    with pytest.raises(UnsupportedModelError, match="no rotation"):
        find_rotations(model)


@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_a_pretrained_model_move(real_model, dtype):
    from transformers import AutoModelForCausalLM

    find_rotations(AutoModelForCausalLM.from_pretrained(real_model, dtype=dtype))

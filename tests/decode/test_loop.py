"""Rollouts over one tree of prompts: the samples of repeated prompts, one attention with training, and when not."""

from contextlib import nullcontext

import pytest
import torch

import stemma
from stemma.decode import loop as decoding
from stemma.decode.rollout import generate_groups
from stemma.models.tiny import tiny_model
from stemma.scoring import enable as switch

VOCAB = 23
EOS = [2, 3, 7, 9]
HEAD = [5, 3, 8, 1, 9, 2, 7, 4, 11, 6]
PROMPTS = [[*HEAD, 3, 1], [4], [6, 6, 11], [*HEAD, 3, 1], [12, 0, 3, 15, 2], [*HEAD, 8]]
FORCED = [[[1, 4, 6, 8][: 2 + g] for g in range(3)] for _ in PROMPTS]
CALL = {"num_generations": 3, "max_new_tokens": 12, "eos_token_id": EOS, "seed": 4}


def make(model_type, **overrides):
    width = {} if model_type == "opt" else {"initializer_range": 0.25}
    options = {"vocab_size": VOCAB, "hidden_size": 32, "max_position_embeddings": 64, "seed": 3, **width}
    dtype = torch.float32 if model_type in ("mixtral", "gemma2", "gpt_oss", "bloom") else torch.float64
    return tiny_model(model_type, dtype=dtype, **{**options, **overrides})


@pytest.fixture
def caches(monkeypatch):
    """The caches of shared prefixes that were made."""
    made, of = [], decoding.SharedPrefixCache.of
    monkeypatch.setattr(
        decoding.SharedPrefixCache, "of", lambda *args, **options: made.append(of(*args, **options)) or made[-1]
    )
    return made


@pytest.mark.parametrize("forced", [None, FORCED])
@pytest.mark.parametrize(
    ("model_type", "overrides", "shares"),
    [
        ("llama", {"num_key_value_heads": 2}, True),
        ("gpt2", {}, True),
        ("opt", {"word_embed_proj_dim": 32}, True),
        ("mixtral", {}, True),
        ("mistral", {"sliding_window": 5}, True),
        ("gemma2", {}, True),
        ("gpt_oss", {}, True),
        ("bloom", {}, False),
    ],
)
def test_one_tree_of_prompts_gives_the_samples_of_many_copies(
    caches, monkeypatch, model_type, overrides, shares, forced
):
    model = make(model_type, **overrides)
    rollouts = generate_groups(model, PROMPTS, forced=forced, **CALL)
    assert len(caches) == shares
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "shared_prefixes", lambda *_: nullcontext(False))
        expected = generate_groups(model, PROMPTS, forced=forced, **CALL)
    assert len(caches) == shares
    assert rollouts.completions == expected.completions
    for group, wanted in zip(rollouts.logprobs, expected.logprobs):
        for values, want in zip(group, wanted):
            # Some norms compute in float32 whatever the model's precision.
            torch.testing.assert_close(values, want, rtol=0, atol=2e-5 if values.dtype == torch.float32 else 2e-6)


def test_what_prompts_share_is_encoded_once():
    rollouts = generate_groups(make("llama"), PROMPTS, **CALL)
    distinct = {tuple(prompt) for prompt in PROMPTS}
    assert rollouts.prefilled_tokens == sum(map(len, distinct)) - len(HEAD)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sampled_and_trained_log_probabilities_agree_to_rounding(dtype):
    model = stemma.enable(make("llama", num_key_value_heads=2).to(dtype))
    rollouts = generate_groups(model, PROMPTS, **(CALL | {"eos_token_id": None}))
    tree = stemma.PrefixTree.from_groups(PROMPTS, rollouts.completions)
    with torch.no_grad():
        trained = stemma.score(model, tree, mode="shared").logprobs
    sampled = torch.cat([values for group in rollouts.logprobs for values in group])
    # The norms of transformers compute in float32 whatever the model's precision.
    torch.testing.assert_close(
        sampled.to(trained.dtype), trained, rtol=0, atol=2e-6 if dtype == torch.float64 else 2e-5
    )


def test_a_model_is_tested_once_and_comes_back_as_it_was(caches, monkeypatch):
    model, tests = make("llama").float(), []
    enable = switch.enable
    monkeypatch.setattr(switch, "enable", lambda *args, **options: tests.append(options) or enable(*args, **options))
    for _ in range(2):
        generate_groups(model, PROMPTS, **CALL)
        assert model.config._attn_implementation == "sdpa"
    assert tests == [{"self_test": True}, {"self_test": False}]
    stemma.enable(model)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(FloatingPointError):
        generate_groups(model, PROMPTS, **CALL)
    assert model.config._attn_implementation == "stemma_sdpa"
    assert len(caches) == 3
    refused = make("bloom")
    for _ in range(2):
        generate_groups(refused, PROMPTS[:1], **CALL)
    assert len(tests) == 3


def test_rotary_frequencies_that_change_with_the_length_keep_repeated_prompts(caches, monkeypatch):
    model = make("llama")
    monkeypatch.setattr(decoding, "dynamic_rope_limit", lambda _: 23)
    generate_groups(model, PROMPTS, **CALL)
    assert caches == []
    monkeypatch.setattr(decoding, "dynamic_rope_limit", lambda _: 24)
    generate_groups(model, PROMPTS, **CALL)
    assert len(caches) == 1

import pytest
import torch

import stemma
from stemma.models.adapter import base_model
from stemma.models.group_attention import GroupAttention, _GroupedLayer
from stemma.models.rollout import generate_groups
from stemma.models.tiny import tiny_model

VOCAB = 23
EOS = [2, 3, 7, 9]
PROMPTS = [[5, 3, 8, 1, 9, 2, 7], [4], [6, 6, 11], [5, 3, 8, 1, 9, 2, 7], [12, 0, 3, 15, 2]]
FORCED = [[[1, 4, 6, 8][: 2 + g] for g in range(3)] for _ in PROMPTS]
CALL = {"num_generations": 3, "max_new_tokens": 12, "eos_token_id": EOS, "seed": 4}


def make(model_type, **overrides):
    width = {} if model_type == "opt" else {"initializer_range": 0.25}
    options = {"vocab_size": VOCAB, "hidden_size": 32, "max_position_embeddings": 64, "seed": 3, **width}
    dtype = torch.float32 if model_type in ("mixtral", "gemma2", "gpt_oss", "bloom") else torch.float64
    return tiny_model(model_type, dtype=dtype, **{**options, **overrides})


@pytest.fixture
def adopted(monkeypatch):
    """What each batch of rows decided: True where it decodes against one copy of each prompt."""
    decisions, adopt = [], GroupAttention.adopt
    monkeypatch.setattr(GroupAttention, "adopt", lambda *args: decisions.append(adopt(*args)) or decisions[-1])
    return decisions


def repeated(model, monkeypatch, **options):
    """The same samples with the prompt repeated for every row."""
    with monkeypatch.context() as patch:
        patch.setattr(GroupAttention, "adopt", lambda *_: False)
        return generate_groups(model, PROMPTS, **options)


@pytest.mark.parametrize("forced", [None, FORCED])
@pytest.mark.parametrize(
    ("model_type", "overrides", "grouped"),
    [
        ("llama", {"num_key_value_heads": 2}, True),
        ("qwen2", {}, True),
        ("qwen3", {}, True),
        ("gpt2", {}, True),
        ("opt", {"word_embed_proj_dim": 32}, True),
        ("mixtral", {}, True),
        ("gpt_neox", {}, True),
        ("mistral", {"sliding_window": 5}, False),
        ("gemma2", {}, False),
        ("gpt_oss", {}, False),
        ("bloom", {}, False),
    ],
)
def test_one_copy_of_the_prompt_gives_the_samples_of_many(adopted, monkeypatch, model_type, overrides, grouped, forced):
    model = make(model_type, **overrides)
    rollouts = generate_groups(model, PROMPTS, forced=forced, **CALL)
    assert adopted == [grouped]
    expected = repeated(model, monkeypatch, forced=forced, **CALL)
    assert rollouts.completions == expected.completions
    for group, wanted in zip(rollouts.logprobs, expected.logprobs):
        for values, want in zip(group, wanted):
            # Some norms compute in float32 whatever the model's precision.
            torch.testing.assert_close(values, want, rtol=0, atol=2e-5 if values.dtype == torch.float32 else 2e-6)


def test_prompts_are_held_once_and_rows_hold_their_own_tokens(monkeypatch):
    model, held = make("llama"), []
    update = _GroupedLayer.update

    def spy(self, *args, **kwargs):
        answer = update(self, *args, **kwargs)
        held.append((sum(key.shape[2] for key, _ in self.prompts), tuple(self.keys.shape), self.get_seq_length()))
        return answer

    monkeypatch.setattr(_GroupedLayer, "update", spy)
    rollouts = generate_groups(model, PROMPTS[:3], **(CALL | {"eos_token_id": None}))
    assert held[:2] == [(7 + 1 + 3, (9, 4, 1, 8), 8)] * 2  # two layers
    assert held[-1] == (11, (9, 4, 11, 8), 18)
    assert rollouts.prefilled_tokens == 11


def test_single_rows_gain_nothing_and_keep_the_plain_way(adopted):
    generate_groups(make("llama"), PROMPTS[:3], **(CALL | {"num_generations": 1}))
    assert adopted == [False]
    generate_groups(make("llama"), [PROMPTS[0]] * 2, **(CALL | {"num_generations": 1}))
    assert adopted == [False, True]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_models_own_attention_is_back_afterwards(adopted, implementation):
    model = make("llama").float()  # transformers' eager attention of padded rows is NaN in float64
    model.set_attn_implementation(implementation)
    generate_groups(model, PROMPTS, **CALL)
    assert adopted == [True]
    assert model.config._attn_implementation == implementation
    stemma.enable(model)
    generate_groups(model, PROMPTS, **CALL)
    assert adopted == [True, True]
    assert model.config._attn_implementation == f"stemma_{implementation}"
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(FloatingPointError):
        generate_groups(model, PROMPTS, **CALL)
    assert base_model(model).config._attn_implementation == f"stemma_{implementation}"

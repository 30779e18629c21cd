import pytest
import torch
from torch import nn

import stemma
from rollout_reference import EOS, PROMPTS, VOCAB, forward_alone, make, sample_alone
from stemma.census import build
from stemma.decode.rollout import LocalGenerator, generate_groups
from stemma.decode.sampling import TokenSampler
from stemma.errors import InvalidBatchError, NonFiniteError, UnsupportedModelError
from stemma.models.tiny import tiny_model


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("qwen2", {}),
        ("gpt2", {}),
        ("mistral", {"sliding_window": 6}),
        ("opt", {"word_embed_proj_dim": 32}),
    ],
)
def test_greedy_equals_generate(model_type, overrides):
    model = make(model_type, **overrides)
    eos = most_common_token(model)
    rollouts = generate_groups(model, PROMPTS, num_generations=2, max_new_tokens=12, eos_token_id=eos, temperature=0.0)
    for prompt, group in zip(PROMPTS, rollouts.completions):
        generated = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
            max_new_tokens=12, eos_token_id=eos, pad_token_id=0,
        )  # fmt: skip
        expected = generated[0, len(prompt) :].tolist()
        assert group == [expected, expected]


def most_common_token(model) -> int:
    """An end-of-sequence token that greedy decoding really meets, and not everywhere at once."""
    rollouts = generate_groups(model, PROMPTS, num_generations=1, max_new_tokens=12, eos_token_id=None, temperature=0.0)
    tokens = [token for group in rollouts.completions for token in group[0][2:]]
    return max(set(tokens), key=tokens.count)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.8}]
)
def test_samples_equal_a_row_encoded_alone(model_type, options):
    model = make(model_type)
    options = {"temperature": 1.0, **options}
    rollouts = generate_groups(
        model, PROMPTS, num_generations=3, max_new_tokens=9, eos_token_id=EOS, seed=11, **options
    )
    uniform = torch.rand(4, 3, 9, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    for b, prompt in enumerate(PROMPTS):
        for g in range(3):
            expected = sample_alone(model, prompt, uniform[b, g].tolist(), eos=EOS, **options)
            assert rollouts.completions[b][g] == expected
    lengths = {len(completion) for group in rollouts.completions for completion in group}
    assert len(lengths) > 1  # rows really left the batch at different times


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "mistral"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_equal_a_full_forward(model_type, dtype, tolerance, temperature):
    model = make(model_type, dtype, **({"sliding_window": 5} if model_type == "mistral" else {}))
    rollouts = generate_groups(
        model, PROMPTS, num_generations=3, max_new_tokens=10, eos_token_id=7, temperature=temperature, top_k=9, seed=2
    )
    for prompt, group, values in zip(PROMPTS, rollouts.completions, rollouts.logprobs):
        for completion, value in zip(group, values):
            assert value.dtype == dtype
            assert value.shape == (len(completion),)
            logits = forward_alone(model, prompt + completion)[len(prompt) - 1 : -1]
            expected = (logits / (temperature or 1.0)).log_softmax(-1)[range(len(completion)), completion]
            torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)


def test_a_prompt_is_encoded_once_and_finished_rows_leave_the_batch():
    model = stemma.enable(make("llama"))
    fed: list[tuple[int, int]] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, __: fed.append(tuple(args[0].shape)))
    rollouts = generate_groups(model, PROMPTS, num_generations=5, max_new_tokens=10, eos_token_id=7, seed=4)
    handle.remove()
    # Not 5 times as many: the packed prompts, and the last token of each.
    assert fed[:2] == [(1, sum(map(len, PROMPTS)) - len(PROMPTS)), (len(PROMPTS), 1)]
    lengths = [len(completion) for group in rollouts.completions for completion in group]
    alive = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert fed[2:] == [(count, 1) for count in alive]
    assert rollouts.prefilled_tokens == sum(map(len, PROMPTS))
    assert rollouts.decoded_tokens == sum(alive) == sum(lengths) - len(lengths)
    assert rollouts.sampled_tokens == sum(lengths)


def test_end_of_sequence_is_kept_and_flagged():
    model = make("llama")
    rollouts = generate_groups(model, PROMPTS, num_generations=6, max_new_tokens=6, eos_token_id=[7, 2], seed=0)
    flat = [
        (completion, done)
        for group, flags in zip(rollouts.completions, rollouts.finished)
        for completion, done in zip(group, flags)
    ]
    assert {done for _, done in flat} == {True, False}
    for completion, done in flat:
        assert not {7, 2} & set(completion[:-1])
        assert done == (completion[-1] in (7, 2))
        assert done or len(completion) == 6
    endless = generate_groups(model, PROMPTS, num_generations=1, max_new_tokens=6, eos_token_id=None, seed=0)
    assert [len(group[0]) for group in endless.completions] == [6] * 4
    assert endless.finished == [[False]] * 4


def test_a_temperature_is_enough():
    model = make("llama")
    end, call = most_common_token(model), {"num_generations": 1, "max_new_tokens": 12, "seed": 0}
    told = LocalGenerator(eos_token_id=end, temperature=0.0)(model, PROMPTS, **call)
    assert [True] in told.finished
    model.generation_config.eos_token_id = [end]
    own = LocalGenerator(temperature=0.0)(model, PROMPTS, **call)
    assert (own.completions, own.finished) == (told.completions, told.finished)
    model.generation_config.eos_token_id = None
    assert LocalGenerator(temperature=0.0)(model, PROMPTS, **call).finished == [[False]] * len(PROMPTS)


def test_seed_decides_everything_and_batching_nothing():
    model = make("llama")
    options = {"num_generations": 4, "max_new_tokens": 8, "eos_token_id": 7}
    state = torch.get_rng_state()
    first = generate_groups(model, PROMPTS, seed=1, **options)
    torch.rand(3)
    again = generate_groups(model, PROMPTS, seed=1, **options)
    split = generate_groups(model, PROMPTS, seed=1, max_batch_size=5, **options)
    single = generate_groups(model, PROMPTS, seed=1, max_batch_size=1, **options)
    other = generate_groups(model, PROMPTS, seed=2, **options)
    assert first.completions == again.completions == split.completions == single.completions
    assert first.completions != other.completions
    assert len({tuple(completion) for completion in first.completions[0]}) > 1
    for values, expected in zip(split.logprobs, first.logprobs):
        for value, wanted in zip(values, expected):
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-12)
    torch.set_rng_state(state)
    generate_groups(model, PROMPTS, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampled_frequencies_follow_the_distribution():
    model = make("llama")
    rollouts = generate_groups(model, [PROMPTS[0]], num_generations=20_000, max_new_tokens=1, eos_token_id=None)
    counts = torch.bincount(torch.tensor(rollouts.completions[0]).squeeze(1), minlength=VOCAB) / 20_000
    expected = forward_alone(model, PROMPTS[0])[-1].softmax(-1)
    assert (counts - expected).abs().max() < 0.02


def test_modes_and_gradients_are_left_as_they_were():
    model = make("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, _: seen.append((module.training, torch.is_grad_enabled()))
    )
    generate_groups(model, PROMPTS, num_generations=2, max_new_tokens=2, eos_token_id=None)
    handle.remove()
    assert set(seen) == {(False, False)}
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="diverged"):
        generate_groups(model, PROMPTS, num_generations=2, max_new_tokens=2, eos_token_id=None)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_does_not_disable_the_cache():
    model = make("llama")
    expected = generate_groups(model, PROMPTS, num_generations=2, max_new_tokens=5, eos_token_id=None)
    model.train().gradient_checkpointing_enable()
    again = generate_groups(model, PROMPTS, num_generations=2, max_new_tokens=5, eos_token_id=None)
    assert again.completions == expected.completions


def test_zero_probability_tokens_are_never_drawn():
    sampler = TokenSampler()
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    nearly_one = 1 - 2**-53
    for uniform, token in [(0.0, 1), (0.4999, 1), (0.5, 3), (nearly_one, 3)]:
        tokens, values = sampler(logits, torch.tensor([uniform], dtype=torch.float64))
        assert tokens.tolist() == [token]
        assert values.item() == pytest.approx(-0.6931472)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1 is empty"),
        ([[1], [2, VOCAB]], f"prompt 1 has token id {VOCAB}"),
        ([[-1]], "token id -1"),
        ([[1] * 60], "64 positions"),
    ],
)
def test_bad_prompts_are_refused_before_any_work(prompts, message):
    with pytest.raises(InvalidBatchError, match=message):
        generate_groups(make("llama"), prompts, num_generations=2, max_new_tokens=5, eos_token_id=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_generations", 0), ("max_new_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")),
        ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("max_batch_size", 0),
    ],
)  # fmt: skip
def test_bad_options_are_refused_by_name(name, value):
    options = {"num_generations": 2, "max_new_tokens": 5, "eos_token_id": None, name: value}
    with pytest.raises(ValueError, match=name):
        generate_groups(make("llama"), PROMPTS, **options)


def test_a_model_without_a_repeatable_cache_is_refused():
    model = make("llama")
    forward = model.forward

    def without_cache(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        output = forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        output.past_key_values = None
        return output

    model.forward = without_cache
    with pytest.raises(UnsupportedModelError, match="cannot be repeated"):
        generate_groups(model, PROMPTS, num_generations=2, max_new_tokens=2, eos_token_id=None)


def test_recurrent_layers_are_refused_by_name():
    model = tiny_model("lfm2", vocab_size=VOCAB, layer_types=["conv", "full_attention"])
    with pytest.raises(UnsupportedModelError, match="layer 0 keeps a LinearAttentionLayer"):
        generate_groups(model, PROMPTS, num_generations=2, max_new_tokens=2, eos_token_id=None)


@pytest.mark.parametrize("model_type", ["gemma2", "mixtral", "bloom"])
def test_logprobs_of_other_types_equal_a_full_forward(model_type):
    model = make(model_type, torch.float32)
    rollouts = generate_groups(model, PROMPTS, num_generations=2, max_new_tokens=6, eos_token_id=EOS, seed=2)
    for prompt, group, values in zip(PROMPTS, rollouts.completions, rollouts.logprobs):
        for completion, value in zip(group, values):
            logits = forward_alone(model, prompt + completion)[len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(completion)), completion]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_enabled_models_sample_the_same(model_type):
    model = make(model_type, **({"sliding_window": 5} if model_type == "mistral" else {}))
    options = {"num_generations": 3, "max_new_tokens": 8, "eos_token_id": EOS, "seed": 5}
    expected = generate_groups(model, PROMPTS, **options)
    assert stemma.enable(model) is model
    again = generate_groups(model, PROMPTS, **options)
    assert again.completions == expected.completions
    for values, wanted in zip(again.logprobs, expected.logprobs):
        assert all(torch.equal(value, want) for value, want in zip(values, wanted))


def test_adapters_of_peft_are_part_of_the_policy():
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'stemma-lm[peft]'")
    model = make("llama", torch.float32)
    plain = generate_groups(model, PROMPTS, num_generations=2, max_new_tokens=5, eos_token_id=None)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    rollouts = generate_groups(adapted, PROMPTS, num_generations=2, max_new_tokens=5, eos_token_id=None)
    assert rollouts.completions != plain.completions
    for prompt, completion, value in zip(PROMPTS, (group[0] for group in rollouts.completions), rollouts.logprobs):
        logits = forward_alone(adapted, prompt + completion)[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(5), completion]
        torch.testing.assert_close(value[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["trocr", "git", "bloom"])
def test_lengths_of_other_prompts_change_nothing(model_type):
    """These types take no positions, and some count them by column."""
    model = build(model_type, torch.float32)
    together = generate_groups(model, PROMPTS, num_generations=2, max_new_tokens=6, eos_token_id=None, seed=range(4))
    for index, prompt in enumerate(PROMPTS):
        alone = generate_groups(model, [prompt], num_generations=2, max_new_tokens=6, eos_token_id=None, seed=[index])
        assert together.completions[index] == alone.completions[0]


def test_a_model_that_cannot_keep_a_tree_repeats_its_prompts():
    model = build("diffllama", torch.float32)
    rollouts = generate_groups(model, PROMPTS, num_generations=1, max_new_tokens=4, eos_token_id=None, temperature=0)
    for prompt, (completion,) in zip(PROMPTS, rollouts.completions):
        ids = torch.tensor([prompt])
        for _ in range(4):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert completion == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("model_type", ["falcon_h1", "rembert"])
def test_caches_that_cannot_be_repeated_are_refused_by_name(model_type):
    with pytest.raises(UnsupportedModelError, match="cannot be repeated"):
        generate_groups(
            build(model_type, torch.float32), PROMPTS, num_generations=1, max_new_tokens=2, eos_token_id=None
        )

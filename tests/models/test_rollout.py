import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stemma
from stemma.errors import InvalidBatchError, UnsupportedModelError
from stemma.models import decoding
from stemma.models.rollout import LocalGenerator, generate_groups
from stemma.models.sampling import StopCondition, TokenSampler
from stemma.models.tiny import byte_tokenizer, tiny_model, train_tokenizer

VOCAB = 23
EOS = [2, 3, 7, 9, 13, 20]
PROMPTS = [[5, 3, 8, 1, 9, 2, 7], [4], [6, 6, 11], [12, 0, 3, 15, 2]]


def make(model_type: str, dtype: torch.dtype = torch.float64, **overrides):
    # A wide initialisation gives peaked, different distributions at every position.
    width = "init_std" if model_type == "opt" else "initializer_range"
    options = {"vocab_size": VOCAB, "hidden_size": 32, "max_position_embeddings": 64, "seed": 3, width: 0.25}
    return tiny_model(model_type, dtype=dtype, **options, **overrides)


@torch.no_grad()
def forward_alone(model, ids: list[int]) -> torch.Tensor:
    """Logits (length, V) of one sequence alone, without cache or padding."""
    return model(input_ids=torch.tensor([ids])).logits[0]


def sample_alone(model, prompt, uniform, *, temperature, eos, top_k=0, top_p=1.0) -> list[int]:
    """Inverse transform sampling in plain Python: the whole sequence is encoded again for every token."""
    completion: list[int] = []
    for u in uniform:
        probabilities = (forward_alone(model, prompt + completion)[-1].double() / temperature).softmax(-1).tolist()
        ranked = sorted(range(VOCAB), key=lambda token: -probabilities[token])
        ranked = ranked[:top_k] if top_k else ranked
        mass = sum(probabilities[token] for token in ranked)
        kept, total = [], 0.0
        for token in ranked:
            if total < top_p:
                kept.append(token)
            total += probabilities[token] / mass
        threshold = u * sum(probabilities[token] for token in kept)
        for token in sorted(kept):
            threshold -= probabilities[token]
            if threshold < 0:
                break
        completion.append(token)
        if token in eos:
            break
    return completion


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
    model = make("llama")
    fed: list[tuple[int, int]] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, __: fed.append(tuple(args[0].shape)))
    rollouts = generate_groups(model, PROMPTS, num_generations=5, max_new_tokens=10, eos_token_id=7, seed=4)
    handle.remove()
    assert fed[0] == (len(PROMPTS), max(map(len, PROMPTS)))  # not 5 times as many rows
    lengths = [len(completion) for group in rollouts.completions for completion in group]
    alive = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert fed[1:] == [(count, 1) for count in alive]
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
    with pytest.raises(FloatingPointError, match="diverged"):
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


FORCED = [
    [[1, 4, 6, 8], [5, 5], [10, 11, 12, 14, 15, 16, 17, 18, 19]],
    [[4, 4, 4], [0, 1, 4, 5, 6], [8, 8, 8, 8]],
    [[21, 22, 1], [22, 21], [5, 6, 8, 10]],
    [[14, 15], [15, 14, 5], [19, 18, 17, 16, 15]],
]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("model_type", "overrides"), [("llama", {}), ("gpt2", {}), ("mistral", {"sliding_window": 3}), ("bloom", {})]
)
def test_forced_beginnings_are_continued_as_if_they_were_prompt(model_type, overrides, ragged):
    model = make(model_type, torch.float32 if model_type == "bloom" else torch.float64, **overrides)
    forced = [[ids if ragged and g == 1 else ids * 2 for g, ids in enumerate(group)] for group in FORCED]
    if ragged:
        forced[0][1] = forced[3][0] = []
    rollouts = generate_groups(
        model, PROMPTS, num_generations=3, max_new_tokens=20, eos_token_id=EOS, seed=11, forced=forced
    )
    uniform = torch.rand(4, 3, 20, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    for b, prompt in enumerate(PROMPTS):
        for g, beginning in enumerate(forced[b]):
            own = uniform[b, g, len(beginning) :].tolist()
            sampled = sample_alone(model, prompt + beginning, own, temperature=1.0, eos=EOS)
            completion, values = rollouts.completions[b][g], rollouts.logprobs[b][g]
            assert completion == beginning + sampled
            assert rollouts.finished[b][g] == (completion[-1] in EOS)
            logits = forward_alone(model, prompt + completion)[len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(completion)), completion]
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-5 if model_type == "bloom" else 1e-10)
    assert rollouts.forced_lengths == [[len(ids) for ids in group] for group in forced]
    assert rollouts.sampled_tokens == sum(
        len(completion) - len(ids)
        for group, beginnings in zip(rollouts.completions, forced)
        for completion, ids in zip(group, beginnings)
    )


def test_what_all_rows_begin_with_goes_through_the_model_together(monkeypatch):
    model = make("llama")
    fed: list[tuple[int, int]] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: fed.append(tuple(args[0].shape)))
    forced = [[[1] * 6, [1] * 9]] * 4
    options = {"num_generations": 2, "max_new_tokens": 10, "eos_token_id": None, "forced": forced}
    rollouts = generate_groups(model, PROMPTS, **options)
    assert fed[1:] == [(8, 5), *[(8, 1)] * 4]
    assert rollouts.decoded_tokens == 8 * 9
    fed.clear()
    monkeypatch.setattr(decoding, "_MAX_LOGITS", 2 * 8 * VOCAB)
    pieces = generate_groups(model, PROMPTS, **options)
    assert fed[1:4] == [(8, 2), (8, 2), (8, 1)]
    assert pieces.completions == rollouts.completions
    for values, expected in zip(pieces.logprobs, rollouts.logprobs):
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)


def test_equal_prompts_are_encoded_once():
    model = make("llama")
    fed: list[tuple[int, int]] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: fed.append(tuple(args[0].shape)))
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[0]]
    rollouts = generate_groups(model, prompts, num_generations=2, max_new_tokens=5, eos_token_id=EOS, seed=3)
    assert fed[0] == (2, 7)
    assert rollouts.prefilled_tokens == 7 + 3
    uniform = torch.rand(4, 2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for b, prompt in enumerate(prompts):
        for g in range(2):
            expected = sample_alone(model, prompt, uniform[b, g].tolist(), temperature=1.0, eos=EOS)
            assert rollouts.completions[b][g] == expected


def test_a_row_continues_its_own_beginning_with_the_same_tokens():
    model = make("llama")
    options = {"num_generations": 4, "max_new_tokens": 12, "eos_token_id": 7, "seed": 6, "top_k": 8}
    whole = generate_groups(model, PROMPTS, **options)
    cut = [[ids[: len(ids) * (g + 1) // 4] for g, ids in enumerate(group)] for group in whole.completions]
    again = generate_groups(model, PROMPTS, forced=cut, **options)
    assert again.completions == whole.completions
    assert again.finished == whole.finished
    split = generate_groups(model, PROMPTS, forced=cut, max_batch_size=4, **options)
    assert split.completions == whole.completions


def test_an_end_of_sequence_token_ends_a_forced_beginning():
    model = make("llama")
    forced = [[[5, 7, 8, 9], [5, 6, 8, 10], [7]]]
    rollouts = generate_groups(model, [PROMPTS[0]], num_generations=3, max_new_tokens=4, eos_token_id=7, forced=forced)
    assert rollouts.completions == [[[5, 7], [5, 6, 8, 10], [7]]]
    assert rollouts.finished == [[True, False, True]]
    assert rollouts.forced_lengths == [[2, 4, 1]]
    assert rollouts.sampled_tokens == 0


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ([[[1], [2]]], "1 groups of .* 4 groups of 2"),
        ([[[1]]] * 4, r"4 groups of \[1\]"),
        ([[[1], [VOCAB]]] * 4, f"token id {VOCAB}"),
        ([[[1], [-1]]] * 4, "token id -1"),
        ([[[1] * 6, []]] * 4, "6 tokens, more than max_new_tokens=5"),
    ],
)
def test_bad_beginnings_are_refused(forced, message):
    with pytest.raises(InvalidBatchError, match=message):
        generate_groups(make("llama"), PROMPTS, num_generations=2, max_new_tokens=5, eos_token_id=7, forced=forced)


def test_the_local_generator_hands_every_option_on():
    model = make("llama")
    options = {"eos_token_id": EOS, "temperature": 0.7, "top_p": 0.8, "top_k": 5, "max_batch_size": 6}
    call = {"num_generations": 3, "max_new_tokens": 20, "seed": 9, "forced": FORCED}
    generator = LocalGenerator(**options)
    assert (
        generator(model, PROMPTS, **call).completions == generate_groups(model, PROMPTS, **options, **call).completions
    )
    for name, value in {"temperature": 1.9, "top_p": 0.2, "top_k": 1, "eos_token_id": None}.items():
        changed = LocalGenerator(**(options | {name: value}))
        assert changed(model, PROMPTS, **call).completions != generator(model, PROMPTS, **call).completions
    for name in ("temperature", "top_k", "max_batch_size"):
        with pytest.raises(ValueError, match=name):
            LocalGenerator(**(options | {name: -1}))


def shortest_with(ids: list[int], strings: list[str], tokenizer, forced: int = 0) -> list[int]:
    """The beginning of a completion that a stop string ends, found by decoding every beginning of what was sampled."""
    for end in range(forced + 1, len(ids) + 1):
        if any(string in tokenizer.decode(ids[forced:end]) for string in strings):
            return ids[:end]
    return ids


@pytest.mark.parametrize("forced_length", [0, 3])
def test_a_stop_string_ends_the_row_that_completes_it(forced_length):
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", vocab_size=128, hidden_size=32, dtype=torch.float64, initializer_range=0.25, seed=3)
    options = {"num_generations": 6, "max_new_tokens": 30, "eos_token_id": None, "seed": 8}
    forced = [[tokenizer.encode("abc")[:forced_length]] * 6] * 2
    prompts = [tokenizer.encode("Once upon"), tokenizer.encode("a")]
    free = generate_groups(model, prompts, forced=forced, **options)
    # Two sampled characters, a single one, and one that starts inside the forced beginning and so never counts.
    text = [[tokenizer.decode(ids) for ids in group] for group in free.completions]
    stop = [text[0][0][9:11], text[1][2][20], "bc" + text[0][1][3]]
    stopped = generate_groups(model, prompts, forced=forced, stop_strings=stop, tokenizer=tokenizer, **options)
    ends = set()
    for b, group in enumerate(free.completions):
        for g, ids in enumerate(group):
            expected = shortest_with(ids, stop, tokenizer, forced_length)
            assert stopped.completions[b][g] == expected
            sampled = tokenizer.decode(expected[forced_length:])
            assert stopped.finished[b][g] == any(string in sampled for string in stop)
            torch.testing.assert_close(stopped.logprobs[b][g], free.logprobs[b][g][: len(expected)], rtol=0, atol=1e-10)
            ends.add(len(expected))
    assert len(ends) > 3
    generator = LocalGenerator(eos_token_id=None, stop_strings=stop, tokenizer=tokenizer)
    call = {"num_generations": 6, "max_new_tokens": 30, "seed": 8, "forced": forced}
    assert generator(model, prompts, **call).completions == stopped.completions


MERGED = train_tokenizer(["abab abcab cab bca abc"] * 9, vocab_size=268)


@settings(deadline=None, max_examples=60)
@given(
    ids=st.lists(st.sampled_from([*MERGED.encode("abab abcab cab bca abcccc a b c bb"), 0]), max_size=12),
    strings=st.lists(st.text("abc ", min_size=1, max_size=5), min_size=1, max_size=3),
    forced=st.integers(0, 3),
)
def test_stop_condition_equals_a_search_in_the_decoded_text(ids, strings, forced):
    stop = StopCondition([], strings, MERGED)
    forced_NT = torch.full((1, len(ids)), -1)
    forced_NT[:, :forced] = torch.tensor(ids[:forced])
    tokens_NT = torch.tensor([ids]).view(1, -1)
    expected = shortest_with(ids, strings, MERGED, min(forced, len(ids)))
    for end in range(forced + 1, len(ids) + 1):
        ended = bool(stop(tokens_NT[:, :end], forced_NT[:, :end]))
        if ended:
            assert ids[:end] == expected
            return
    assert expected == ids


def test_stop_strings_without_meaning_are_refused():
    with pytest.raises(ValueError, match="tokenizer"):
        StopCondition([1], "ab")
    with pytest.raises(ValueError, match="empty"):
        StopCondition([1], ["ab", ""], byte_tokenizer())
    with pytest.raises(ValueError, match="tokenizer"):
        LocalGenerator(eos_token_id=None, stop_strings=["ab"])
    assert StopCondition([1], None)(torch.tensor([[3, 1], [1, 3]]), torch.full((2, 2), -1)).tolist() == [True, False]


def test_one_seed_per_prompt_makes_samples_independent_of_the_other_prompts():
    model = make("llama")
    options = {"num_generations": 3, "max_new_tokens": 8, "eos_token_id": 7}
    together = generate_groups(model, PROMPTS, seed=[5, 6, 7, 8], **options)
    shuffled = generate_groups(model, PROMPTS[::-1], seed=[8, 7, 6, 5], **options)
    alone = generate_groups(model, [PROMPTS[2]], seed=[7], **options)
    assert together.completions == shuffled.completions[::-1]
    assert together.completions[2] == alone.completions[0]
    assert alone.completions == generate_groups(model, [PROMPTS[2]], seed=7, **options).completions
    with pytest.raises(ValueError, match="4 prompts, got 3"):
        generate_groups(model, PROMPTS, seed=[1, 2, 3], **options)

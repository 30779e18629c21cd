"""Forced beginnings, stop strings, seeds per prompt, equal prompts, and the generator that holds the options."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stemma
from rollout_reference import EOS, PROMPTS, VOCAB, forward_alone, make, sample_alone
from stemma.decode import loop as decoding
from stemma.decode.rollout import LocalGenerator, generate_groups
from stemma.decode.sampling import StopCondition
from stemma.errors import InvalidBatchError
from stemma.models.tiny import byte_tokenizer, tiny_model, train_tokenizer

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
    model = stemma.enable(make("llama"))
    fed: list[tuple[int, int]] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: fed.append(tuple(args[0].shape)))
    forced = [[[1] * 6, [1] * 9]] * 4
    options = {"num_generations": 2, "max_new_tokens": 10, "eos_token_id": None, "forced": forced}
    rollouts = generate_groups(model, PROMPTS, **options)
    assert fed[2:] == [(8, 5), *[(8, 1)] * 4]
    assert rollouts.decoded_tokens == 8 * 9
    fed.clear()
    monkeypatch.setattr(decoding, "_MAX_LOGITS", 2 * 8 * VOCAB)
    pieces = generate_groups(model, PROMPTS, **options)
    assert fed[2:5] == [(8, 2), (8, 2), (8, 1)]
    assert pieces.completions == rollouts.completions
    for values, expected in zip(pieces.logprobs, rollouts.logprobs):
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)


def test_equal_prompts_are_encoded_once():
    model = stemma.enable(make("llama"))
    fed: list[tuple[int, int]] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: fed.append(tuple(args[0].shape)))
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[0]]
    rollouts = generate_groups(model, prompts, num_generations=2, max_new_tokens=5, eos_token_id=EOS, seed=3)
    assert fed[:2] == [(1, 6 + 2), (2, 1)]  # the tree, but for each prompt's last token
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

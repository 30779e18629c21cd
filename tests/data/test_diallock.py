import math
from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from stemma.data import diallock
from stemma.data.diallock import EOS_ID, PAD_ID, VOCABULARY, Episode, Problem
from stemma.errors import InvalidDataError

EXAMPLE = Problem(87, 64)
SOLUTION = "d77>64d67>64b66>64b65>64b64>64."


def ids_of(text: str) -> list[int]:
    return diallock.encode(text)


def test_the_example_of_the_docstring():
    assert EXAMPLE.prompt == "87>64:"
    assert EXAMPLE.distance == 5
    assert Episode(EXAMPLE, "ddbbb").completion == SOLUTION
    assert diallock.verify(EXAMPLE, SOLUTION, slack=0)


def test_all_problems_fall_into_two_disjoint_halves():
    train, test = diallock.problems("train"), diallock.problems("test")
    assert len(train) + len(test) == len(diallock.problems()) == 9900
    assert not set(train) & set(test)
    assert 0.18 < len(test) / 9900 < 0.22
    # The split depends on the text alone, so it is the same on every machine and in every process.
    assert (Problem(87, 64).split, Problem(3, 98).split, Problem(0, 1).split) == ("test", "train", "train")
    assert {problem.distance for problem in diallock.problems()} == set(range(1, 19))
    assert all(3 <= problem.distance <= 5 for problem in diallock.problems("test", min_distance=3, max_distance=5))


@pytest.mark.parametrize(
    ("completion", "why"),
    [
        (SOLUTION[:-1], "the final mark is missing"),
        (SOLUTION + ".", "two final marks"),
        (SOLUTION + "\n", "a trailing character"),
        ("", "empty"),
        (".", "the target is not reached"),
        (SOLUTION[:-7] + ".", "stops one move short"),
        (SOLUTION.replace("b65>64", "b75>64"), "a restated state is wrong"),
        (SOLUTION.replace("b65>64", "b65>65"), "a restated target is wrong"),
        (SOLUTION.replace("d77>64", "a77>64"), "the move does not lead to the restated state"),
        (SOLUTION.replace("d77>64", "x77>64"), "no such move"),
        (SOLUTION.replace(">", ":"), "the separator is wrong"),
        ("b64>64" + SOLUTION, "a move that jumps"),
    ],
)
def test_anything_but_an_exact_solution_is_rejected(completion, why):
    assert not diallock.verify(EXAMPLE, completion, slack=18), why


def test_moves_do_not_wrap_around():
    assert diallock.turn(9, "a") is None
    assert diallock.turn(90, "c") is None
    assert diallock.turn(30, "b") is None
    assert diallock.turn(5, "d") is None
    assert diallock.turn(50, "e") is None
    assert not diallock.verify(Problem(9, 10), "a10>10.", slack=18)


def test_the_budget_counts_moves_above_the_distance():
    detour = Episode(Problem(50, 51), "caad" + "b").completion  # 60 61 62 52 51: five moves at distance one
    assert not diallock.verify(Problem(50, 51), detour, slack=3)
    assert diallock.verify(Problem(50, 51), detour, slack=4)


def test_reward_reads_the_last_problem_and_needs_the_end_of_sequence():
    query = [*ids_of("11>12:a12>12."), EOS_ID, *ids_of("87>64:")]
    good = ids_of(SOLUTION)
    assert diallock.reward(query, [*good, EOS_ID]) == 1.0
    assert diallock.reward(ids_of("11>12:"), [*good, EOS_ID]) == 0.0
    assert diallock.reward(query, good) == 0.0
    assert diallock.reward(query, []) == 0.0
    assert diallock.reward(query, [*good, EOS_ID, EOS_ID]) == 0.0
    assert diallock.reward(query, [PAD_ID, *good, EOS_ID]) == 0.0
    assert diallock.reward(query, [*good, len(VOCABULARY), EOS_ID]) == 0.0
    slow = Episode(EXAMPLE, "acdb" + "ddbbb").completion_ids
    assert [diallock.reward(query, slow, slack=slack) for slack in (3, 4)] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("a11>12a12>12.<eos>", "right"),
        ("c20>12d10>12a11>12a12>12.<eos>", "right"),
        ("c20>12d10>12a11>12b10>12a11>12a12>12.<eos>", "too many moves"),
        ("a11>12.<eos>", "stopped elsewhere"),
        ("a12>12a12>12.<eos>", "wrong text"),
        ("a11>13a12>12.<eos>", "wrong text"),
        ("d00>12c", "cut off"),
        ("d00>12d90>12.<eos>", "illegal move"),
        ("a11>12a1", "cut off"),
        ("a11>12a2", "wrong text"),
        ("a11>12a12>12.", "cut off"),
        ("a11>12a12>12..<eos>", "wrong text"),
        ("a11>12a12>12<eos>", "wrong text"),
        ("<eos>", "wrong text"),
        ("", "cut off"),
    ],
)
def test_the_outcome_names_the_first_thing_that_goes_wrong(completion, expected):
    text = completion.partition("<eos>")[0]
    ids = [*diallock.encode(text), *([EOS_ID] if completion.endswith("<eos>") else [])]
    assert diallock.outcome(Problem(10, 12), ids) == expected


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 2**20), st.integers(0, 3), st.integers(0, 2))
def test_the_outcome_is_right_where_the_reward_is_one(start, target, seed, changes, slack):
    if start == target:
        return
    rng = Random(seed)
    ids = diallock.noisy_episode(Problem(start, target), rng, noise=0.2).completion_ids
    for _ in range(changes):
        ids[rng.randrange(len(ids))] = rng.randrange(len(VOCABULARY))
    rewarded = diallock.reward(diallock.encode(Problem(start, target).prompt), ids, slack=slack)
    assert (diallock.outcome(Problem(start, target), ids, slack=slack) == "right") == (rewarded == 1.0)


@pytest.mark.parametrize("text", ["", "7>64:", "87>64", "87>64:d", "ab>64:", "87:64>"])
def test_a_prompt_without_a_problem_is_refused(text):
    with pytest.raises(InvalidDataError, match="ends with a problem"):
        diallock.reward(ids_of(text), [EOS_ID])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 2**32), st.floats(0.0, 0.8))
def test_demonstrations_are_solutions(start, target, seed, noise):
    if start == target:
        return
    problem = Problem(start, target)
    oracle = diallock.oracle_episode(problem, Random(seed))
    assert len(oracle.moves) == problem.distance
    assert diallock.reward(oracle.prompt_ids, oracle.completion_ids, slack=0) == 1.0
    noisy = diallock.noisy_episode(problem, Random(seed), noise=noise)
    assert diallock.reward(noisy.prompt_ids, noisy.completion_ids, slack=len(noisy.moves)) == 1.0
    assert noisy == diallock.noisy_episode(problem, Random(seed), noise=noise)


def test_oracle_meets_every_shortest_solution():
    problem, rng = Problem(0, 22), Random(0)
    solutions = Counter(diallock.oracle_episode(problem, rng).moves for _ in range(400))
    assert len(solutions) == math.comb(4, 2)


def test_noise_is_the_share_of_random_legal_moves():
    problem, rng, moves, nearer = Problem(55, 59), Random(0), 0, 0
    for _ in range(500):
        episode = diallock.noisy_episode(problem, rng, noise=0.5)
        state = problem.start
        for move in episode.moves:
            turned = diallock.turn(state, move)
            nearer += Problem(turned, 59).distance < Problem(state, 59).distance if turned != 59 else 1
            state = turned
            moves += 1
    # Of four legal moves one or two come nearer, so between .5 + .5/4 and .5 + .5/2 of all moves do.
    assert 0.6 < nearer / moves < 0.78


@pytest.mark.parametrize("noise", [-0.1, 1.0])
def test_noise_outside_its_range_is_refused(noise):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        diallock.noisy_episode(EXAMPLE, Random(0), noise=noise)


def test_many_shot_prompts_hold_solved_problems_and_then_the_query():
    pool = diallock.problems("train", max_distance=4)
    query = pool[0]
    shots = diallock.draw_shots(pool, 12, Random(0), exclude=query)
    assert query not in {episode.problem for episode in shots}
    assert len({episode.problem for episode in shots}) == 12
    prompt = diallock.many_shot_prompt(shots, query)
    assert diallock.parse_prompt(prompt) == query
    assert prompt.count(EOS_ID) == 12
    assert len(prompt) == 6 + sum(14 - 6 + 6 * len(episode.moves) for episode in shots)
    assert diallock.many_shot_prompt([], query) == ids_of(query.prompt)
    with pytest.raises(InvalidDataError, match="enlarge the pool"):
        diallock.draw_shots(pool[:3], 3, Random(0), exclude=query)


def test_draws_are_balanced_over_distances_and_without_repetition():
    pool = diallock.problems("train", max_distance=4)
    drawn = Counter(problem.distance for problem in diallock.draw_problems(pool, 400, Random(0)))
    assert set(drawn) == {1, 2, 3, 4}
    assert max(drawn.values()) < 1.3 * min(drawn.values())  # drawn from the pool alike, distance 4 would lead by 2.9
    few = pool[:5] + [problem for problem in pool if problem.distance == 4][:3]
    assert sorted(diallock.draw_problems(few, len(few), Random(0))) == sorted(few)
    batch = diallock.packed_batch(pool, Random(0), sequences=100, episodes=10, noise=0.0)
    # Oracle demonstrations: 8 fixed tokens and 6 a move, so equal shares of distances 1..4 mean 23 tokens an episode.
    assert batch["attention_mask"].sum().item() / 1000 == pytest.approx(8 + 6 * 2.5, abs=0.7)


def test_packed_batches_score_completions_only():
    pool = diallock.problems("train", max_distance=4)
    batch = diallock.packed_batch(pool, Random(3), sequences=5, episodes=3, noise=0.5)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (torch.int64, batch["input_ids"].shape)
    )
    for ids, mask, labels in zip(*(batch[name].tolist() for name in ("input_ids", "attention_mask", "labels"))):
        length = sum(mask)
        assert mask == [1] * length + [0] * (len(mask) - length)
        assert ids[length:] == [PAD_ID] * (len(ids) - length)
        assert ids[:length].count(EOS_ID) == 3
        start = 0
        for _ in range(3):
            end = ids.index(EOS_ID, start) + 1
            assert labels[start : start + 6] == [-100] * 6
            assert labels[start + 6 : end] == ids[start + 6 : end]
            assert diallock.reward(ids[start : start + 6], ids[start + 6 : end], slack=100) == 1.0
            start = end
        assert start == length
        assert set(labels[length:]) <= {-100}
    again = diallock.packed_batch(pool, Random(3), sequences=5, episodes=3, noise=0.5)
    assert torch.equal(batch["input_ids"], again["input_ids"])


def test_tokenizer_agrees_with_encode_and_survives_a_round_trip(tmp_path):
    tokenizer = diallock.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 21
    assert (loaded.pad_token_id, loaded.eos_token_id) == (PAD_ID, EOS_ID)
    text = EXAMPLE.prompt + SOLUTION + "\n!"
    for candidate in (tokenizer, loaded):
        assert candidate.encode(text) == ids_of(text)
        assert candidate.decode(ids_of(text)) == text
        assert candidate.encode("12>13:a13>13.<eos>87>64:") == [*ids_of("12>13:a13>13."), EOS_ID, *ids_of("87>64:")]


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(InvalidDataError, match="different states"):
        Problem(5, 5)
    with pytest.raises(InvalidDataError, match=r"0\.\.99"):
        Problem(100, 5)
    with pytest.raises(InvalidDataError, match="'dev'"):
        diallock.problems("dev")
    with pytest.raises(InvalidDataError, match="got 5 and 4"):
        diallock.problems(min_distance=5, max_distance=4)
    with pytest.raises(InvalidDataError, match="'z'"):
        diallock.encode("z")
    with pytest.raises(InvalidDataError, match="empty pool"):
        diallock.packed_batch([], Random(0))
    with pytest.raises(InvalidDataError, match="illegal in state 90"):
        _ = Episode(Problem(90, 91), "ca").completion

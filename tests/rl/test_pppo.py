"""PPPO: lengths, continuations, accumulated rewards against a loop, the controller of eta, measured lock-in."""

import hashlib
import math
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rollouts import fake_batch
from stemma.data import diallock
from stemma.decode.rollout import LocalGenerator
from stemma.errors import InvalidBatchError
from stemma.prefix.tree import PrefixTree
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.hooks import sample
from stemma.rl.pppo import (
    AccumulatedCredit,
    Config,
    PrefixRetention,
    RetainedMask,
    accumulated_reward,
    beginning_lock_in,
    continue_beginnings,
    reference_accumulated_reward,
    retained_lengths,
)

Make = Callable[..., Any]
EOS = diallock.EOS_ID


def problems(count: int) -> list[dict[str, Any]]:
    drawn = diallock.draw_problems(diallock.problems("train", max_distance=4), count, Random(0))
    return [{"prompt_ids": diallock.encode(problem.prompt)} for problem in drawn]


@pytest.fixture
def generate(make_model: Make) -> Any:
    return partial(sample, make_model(), LocalGenerator(eos_token_id=EOS), 40)


# ---------------------------------------------------------------------------------------------- lengths


@given(lengths=st.lists(st.integers(1, 300), min_size=1), percent=st.integers(1, 100))
def test_a_share_of_every_output_is_retained_and_at_least_one_token(lengths: list[int], percent: int) -> None:
    kept = retained_lengths(torch.tensor(lengths), percent / 100).tolist()
    assert kept == [max(1, percent * length // 100) for length in lengths]


def test_an_empty_output_retains_nothing_and_an_integer_share_is_that_integer() -> None:
    assert retained_lengths(torch.tensor([0, 1]), 0.5).tolist() == [0, 1]
    assert math.floor(0.29 * 100) == 28  # what rounding makes of it
    assert retained_lengths(torch.tensor([100]), 0.29).tolist() == [29]


@pytest.mark.parametrize("eta", [0.0, -0.1, 1.01, math.nan])
def test_an_eta_outside_its_range_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=r"eta must be in \(0, 1\]"):
        retained_lengths(torch.tensor([3]), eta)


# ---------------------------------------------------------------------------------------------- continuations


def test_continuations_begin_with_the_retained_tokens_of_their_output(generate: Any) -> None:
    rows = problems(2)
    batch = PrefixRetention(Config(eta_start=0.3, num_continuations=3))(generate, rows, 4, [1, 2], 0)
    found = batch.extras["continuations"]
    outputs = batch.completions()
    assert batch.extras["retained_len"].tolist() == [max(1, math.floor(0.3 * len(ids) + 1e-9)) for ids in outputs]
    assert found.prompt_ids == [rows[i // 4]["prompt_ids"] for i in range(8)]
    incomplete = [i for i in range(8) if int(batch.extras["retained_len"][i]) < len(outputs[i])]
    assert found.group_id.tolist() == [i for i in incomplete for _ in range(3)]
    differing = 0
    for row, ids, forced in zip(found.group_id.tolist(), found.completions(), found.forced_len.tolist(), strict=True):
        assert forced == int(batch.extras["retained_len"][row])
        assert ids[:forced] == outputs[row][:forced]
        assert forced < len(ids) <= 40
        differing += ids != outputs[row]
    assert differing > len(found) / 2


def test_outputs_are_those_of_grpo_and_do_not_depend_on_the_continuations(generate: Any) -> None:
    rows = problems(2)
    plain = generate([row["prompt_ids"] for row in rows], 3, [5, 6])
    for config in (Config(num_continuations=0), Config(num_continuations=2), Config(eta_start=1.0, eta_max=1.0)):
        batch = PrefixRetention(config)(generate, rows, 3, [5, 6], 0)
        assert torch.equal(batch.completion_ids, plain.completion_ids)


def test_a_continuation_depends_on_its_row_alone(generate: Any) -> None:
    rows, rollout = problems(3), PrefixRetention(Config(num_continuations=2))
    together = rollout(generate, rows, 3, [5, 6, 7], 0)
    alone = rollout(generate, rows[2:], 3, [7], 0)
    found = together.extras["continuations"]
    own = [ids for row, ids in zip(found.group_id.tolist(), found.completions(), strict=True) if row >= 6]
    assert own == alone.extras["continuations"].completions()
    assert len({tuple(ids) for ids in own}) > 3  # not one sample over and over


class Script:
    """A `Generate` with the given outputs; continuations are the beginning and two tokens more."""

    def __init__(self, outputs: list[list[int]], group_size: int) -> None:
        self.outputs, self.group_size, self.calls = outputs, group_size, []

    def __call__(self, prompts: Any, num_generations: int, seeds: Any, /, forced: Any = None) -> RolloutBatch:
        self.calls.append((list(prompts), list(seeds), forced))
        rows = self.outputs if forced is None else [[*ids, 9, EOS] for group in forced for ids in group]
        begun = [0] * len(rows) if forced is None else [len(ids) for group in forced for ids in group]
        batch = fake_batch([len(ids) for ids in rows], begun, num_generations)
        for row, ids in enumerate(rows):
            batch.completion_ids[row, : len(ids)] = torch.tensor(ids)
        batch.prompt_ids = [list(prompt) for prompt in prompts]
        return batch


def test_an_output_that_is_retained_whole_has_nothing_to_continue() -> None:
    script = Script([[EOS], [4, EOS], [4, 5, 6, EOS], [7]], 2)
    rows = [{"prompt_ids": [2]}, {"prompt_ids": [3]}]
    batch = PrefixRetention(Config(eta_start=0.5, eta_max=0.5, num_continuations=2))(script, rows, 2, [10, 11], 0)
    assert batch.extras["retained_len"].tolist() == [1, 1, 2, 1]
    assert batch.extras["continuations"].group_id.tolist() == [1, 1, 2, 2]
    assert script.calls[1][0] == [[2], [3]]
    assert script.calls[1][2] == [[[4], [4]], [[4, 5], [4, 5]]]
    batch.reward = torch.tensor([0.5, 0.0, 1.0, 0.25], dtype=torch.float64)
    batch.extras["continuations"].reward = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    seen: list[Tensor] = []
    AccumulatedCredit(lambda b: seen.append(b.reward) or b.reward, 2)(batch)
    assert seen[0].tolist() == [1.5, 1.0, 3.0, 0.75]  # empty continuations count as the output's own


def test_without_continuations_nothing_more_is_sampled() -> None:
    script = Script([[4, 5, 6], [4, 5]], 2)
    batch = PrefixRetention(Config(num_continuations=0))(script, [{"prompt_ids": [2]}], 2, [1], 0)
    assert (set(batch.extras), len(script.calls)) == ({"retained_len"}, 1)
    whole = fake_batch([3, 2])
    assert len(continue_beginnings(script, whole, torch.tensor([3, 2]), 4, [1])) == 0
    assert len(script.calls) == 1


def test_problem_beginnings_and_continuations_are_a_tree_of_three_levels_and_the_problem_is_encoded_once(
    make_model: Make,
) -> None:
    prompt = [3 + i % 9 for i in range(50)]
    # Nothing ends a row, so that every length is known: two outputs of 40 tokens, 16 retained, three continuations.
    generate = partial(sample, make_model(), LocalGenerator(eos_token_id=None), 40)
    rollout = PrefixRetention(Config(eta_start=0.4, eta_max=0.4, num_continuations=3))
    batch = rollout(generate, [{"prompt_ids": prompt}], 2, [1], 0)
    continuations = batch.extras["continuations"]
    tree = continuations.tree()
    assert tree.depth == 3
    assert sorted(tree.node_length[tree.node_level < 2].tolist()) == [16, 16, 50]
    assert tree.unique_tokens == 50 + 2 * 16 + 2 * 3 * 24
    assert tree.total_tokens == 2 * 3 * (50 + 40)
    everything = PrefixTree.from_groups([prompt], [[*batch.completions(), *continuations.completions()]])
    assert everything.depth == 3
    assert everything.unique_tokens == 50 + 2 * 16 + 2 * 4 * 24
    # Sampling encodes the problem once for all continuations, and no last token.
    assert continuations.encoded_tokens == 50 + 2 * 3 * 39
    assert batch.encoded_tokens == 50 + 2 * 39


# ---------------------------------------------------------------------------------------------- accumulated reward

values = st.sampled_from([0.0, 1.0, 0.25, math.nan])


@given(st.lists(st.tuples(values, st.one_of(st.just([]), st.lists(values, min_size=3, max_size=3))), min_size=1))
def test_accumulated_rewards_equal_the_loop(outputs: list[tuple[float, list[float]]]) -> None:
    reward = torch.tensor([own for own, _ in outputs], dtype=torch.float64)
    others = torch.tensor([x for _, more in outputs for x in more], dtype=torch.float64)
    row = torch.tensor([i for i, (_, more) in enumerate(outputs) for _ in more], dtype=torch.int64)
    found = accumulated_reward(reward, others, row, 3)
    torch.testing.assert_close(
        found, reference_accumulated_reward(reward, others, row, 3), equal_nan=True, rtol=0, atol=1e-12
    )


def test_accumulated_rewards_count_the_successes_exactly() -> None:
    reward = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    others = torch.tensor([1, 0, 1, 0, 0, 0, 1, 1, 1], dtype=torch.float64)
    found = accumulated_reward(reward, others, torch.arange(3).repeat_interleave(3), 3)
    assert found.tolist() == [3.0, 0.0, 4.0]


def test_what_cannot_be_scored_leaves_rows_comparable() -> None:
    nan = math.nan
    reward = torch.tensor([1.0, nan, nan, 0.0], dtype=torch.float64)
    others = torch.tensor([1, nan, 1, 0, nan, nan, 1, 0], dtype=torch.float64)
    found = accumulated_reward(reward, others, torch.arange(4).repeat_interleave(2), 2)
    assert found[[0, 1, 3]].tolist() == [3.0, 1.5, 1.0]
    assert found[2].isnan()


def test_the_credit_sees_accumulated_rewards_and_the_batch_keeps_its_own() -> None:
    batch = fake_batch([4, 4])
    batch.reward = torch.tensor([1.0, 0.0], dtype=torch.float64)
    others = fake_batch([4, 4, 4, 4], [1] * 4)
    others.reward = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    batch.extras["continuations"] = others
    credit = AccumulatedCredit(lambda b: b.reward - b.reward.mean(), 2)
    assert credit(batch).tolist() == [-0.5, 0.5]  # 1 + 0 + 0 against 0 + 1 + 1
    assert batch.reward.tolist() == [1.0, 0.0]
    assert batch.further == [others]
    assert credit.metrics(batch) == {"pppo/reward_accumulated": 0.5}


def test_the_variance_of_the_mean_reward_falls_with_the_continuations() -> None:
    draws = torch.Generator().manual_seed(0)
    chance = 0.3
    for count in (1, 4, 16):
        own = (torch.rand(4000, generator=draws) < chance).double()
        others = (torch.rand(4000 * count, generator=draws) < chance).double()
        total = accumulated_reward(own, others, torch.arange(4000).repeat_interleave(count), count)
        expected = chance * (1 - chance) / (count + 1)
        assert (total / (count + 1)).var().item() == pytest.approx(expected, rel=0.1)


# ---------------------------------------------------------------------------------------------- mask


def test_the_mask_is_the_retained_beginning() -> None:
    batch = fake_batch([5, 2, 1, 4], extras={"retained_len": torch.tensor([2, 1, 1, 3])})
    expected = [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert RetainedMask()(batch, 0).tolist() == [[bool(x) for x in row] for row in expected]
    assert torch.equal(RetainedMask("all").normaliser(batch), batch.completion_mask)
    assert torch.equal(RetainedMask("kept").normaliser(batch), RetainedMask()(batch, 0))


def test_batches_that_are_not_of_this_method_are_refused() -> None:
    with pytest.raises(InvalidBatchError, match="PPPO's mask needs PPPO's rollout"):
        RetainedMask()(fake_batch([3, 2]), 0)
    mixed = fake_batch([3, 2], [0, 1], extras={"retained_len": torch.tensor([1, 1])})
    with pytest.raises(InvalidBatchError, match="1 rows have a forced beginning"):
        RetainedMask()(mixed, 0)


# ---------------------------------------------------------------------------------------------- eta


def evaluated(rollout: PrefixRetention, *rewards: float) -> list[float]:
    etas = []
    for reward in rewards:
        rollout.on_evaluate({"eval/reward": reward})
        etas.append(round(rollout.eta, 9))
    return etas


def test_eta_grows_when_evaluation_stalls_and_not_when_it_improves() -> None:
    rollout = PrefixRetention(Config())
    assert rollout.eta == 0.15
    assert evaluated(rollout, 0.2, 0.3, 0.3, 0.31, 0.2) == [0.15, 0.15, 0.2, 0.2, 0.25]
    assert evaluated(rollout, 0.31, 0.1, 0.1, 0.1) == [0.3, 0.35, 0.35, 0.35]
    assert rollout.eta == 0.35


def test_patience_counts_evaluations_in_a_row_and_unscorable_ones_do_not_count() -> None:
    rollout = PrefixRetention(Config(eta_patience=2))
    assert evaluated(rollout, 0.5, 0.4, 0.6, 0.5, math.nan, 0.5, 0.5, 0.5) == [0.15] * 5 + [0.2, 0.2, 0.25]


def test_a_step_of_zero_keeps_eta() -> None:
    assert evaluated(PrefixRetention(Config(eta_step=0.0)), *[0.1] * 5) == [0.15] * 5


def test_the_last_step_ends_at_the_maximum() -> None:
    assert (
        evaluated(PrefixRetention(Config(eta_start=0.1, eta_max=0.3, eta_step=0.15)), *[0.1] * 5)[1:]
        == [0.25] + [0.3] * 3
    )


def test_state_is_saved_and_restored() -> None:
    first, second = PrefixRetention(Config(eta_patience=2)), PrefixRetention(Config(eta_patience=2))
    evaluated(first, 0.5, 0.4, 0.4, 0.4)
    second.load_state_dict(first.state_dict())
    assert evaluated(second, 0.45) == [0.25]  # the second stall in a row, below the best of before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta_start": 0.0}, r"eta_start must be in \(0, 1\]; got 0.0"),
        ({"eta_start": 0.5}, r"eta_max must be in \[eta_start=0.5, 1\]; got 0.35"),
        ({"eta_max": 1.5}, "eta_max must be in"),
        ({"eta_step": -0.1}, "eta_step must be at least 0"),
        ({"eta_patience": 0}, "eta_patience must be at least 1"),
        ({"num_continuations": -1}, "num_continuations must be at least 0"),
        ({"normalizer": "some"}, "normalizer must be one of all, kept; got 'some'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


# ---------------------------------------------------------------------------------------------- lock-in


class Coins:
    """A policy whose first token is 1 or 2 with even chances, followed by four tokens of no interest."""

    def __call__(self, prompts: Any, num_generations: int, seeds: Any, /, forced: Any = None) -> RolloutBatch:
        rows = []
        for index, seed in enumerate(seeds):
            draws = Random(seed)
            for number in range(num_generations):
                begun = forced[index][number] if forced else []
                fresh = [draws.choice([3, 4]), 5, 5, 5, draws.choice(range(10, 20))]
                rows.append((begun, begun + fresh[len(begun) :]))
        batch = fake_batch([5] * len(rows), [len(begun) for begun, _ in rows], num_generations)
        batch.completion_ids = torch.tensor([ids for _, ids in rows])
        batch.prompt_ids = [list(prompt) for prompt in prompts]
        return batch


def chance(ids: list[int]) -> float:
    """Correct in 8 of 10 cases behind a 3, in 2 of 10 behind a 4; the last token decides."""
    return float(ids[4] - 10 < (8 if ids[0] == 3 else 2))


def test_lock_in_of_a_policy_whose_first_token_decides() -> None:
    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [chance(ids) for ids in completion_ids]

    rows = [{"prompt_ids": [index]} for index in range(200)]
    options: dict[str, Any] = {"num_outputs": 8, "num_continuations": 8, "seed": 3}
    short, whole = beginning_lock_in(Coins(), rows, reward, str, fractions=(0.2, 1.0), **options)
    # Behind a correct output the first token is 3 with chance .8, so that its continuation succeeds with .8 .8 + .2 .2.
    assert short.correct == pytest.approx(0.5, abs=0.04)
    assert short.after_correct == pytest.approx(0.68, abs=0.04)
    assert short.after_wrong == pytest.approx(0.32, abs=0.04)
    assert 180 < short.num_problems <= 200
    assert all(0 < error < 0.02 for error in short.standard_errors)
    assert (whole.after_correct, whole.after_wrong) == (1.0, 0.0)  # nothing is left to go either way
    assert whole.correct == short.correct


def test_lock_in_of_a_policy_without_memory_is_none() -> None:
    """Success is rare, so that outputs which made a problem count overstate its chance: other samples measure it."""

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(ids[4] < 11) for ids in completion_ids]

    rows = [{"prompt_ids": [index]} for index in range(400)]
    (found,) = beginning_lock_in(Coins(), rows, reward, str, fractions=(0.6,))
    assert 180 < found.num_problems < 300
    for probability in (found.correct, found.after_correct, found.after_wrong):
        assert probability == pytest.approx(0.1, abs=0.03)


def test_easy_and_hard_problems_are_no_lock_in_and_unscorable_outputs_are_left_out() -> None:
    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        # Problems differ in difficulty, the beginning decides nothing; one output in ten cannot be scored.
        easy = [int(text.strip("[]")) % 2 for text in prompts]
        return [
            None if ids[4] == 19 else float(ids[4] < (17 if e else 11))
            for e, ids in zip(easy, completion_ids, strict=True)
        ]

    rows = [{"prompt_ids": [index]} for index in range(300)]
    (found,) = beginning_lock_in(Coins(), rows, reward, str, fractions=(0.2,))
    assert found.after_correct == pytest.approx(found.after_wrong, abs=0.05)


def test_lock_in_without_a_mixed_problem_is_unknown() -> None:
    (found,) = beginning_lock_in(
        Coins(), [{"prompt_ids": [1]}], lambda completions, **_: [1.0] * len(completions), str, fractions=(0.5,)
    )
    assert found.num_problems == 0
    assert all(math.isnan(x) for x in (found.correct, found.after_correct, found.after_wrong, *found.standard_errors))


def test_lock_in_runs_on_a_model(generate: Any) -> None:
    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(hashlib.blake2b(bytes(ids), digest_size=1).digest()[0] % 2) for ids in completion_ids]

    options: dict[str, Any] = {"fractions": (0.3,), "num_outputs": 4, "num_continuations": 2}
    (found,) = beginning_lock_in(generate, problems(3), reward, diallock.tokenizer().decode, **options)
    assert 0 < found.after_correct < 1
    (again,) = beginning_lock_in(generate, problems(3), reward, diallock.tokenizer().decode, **options)
    assert again == found

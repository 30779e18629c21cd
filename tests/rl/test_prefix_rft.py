"""Prefix-RFT: the schedule, the cut, the entropy mask against loops, both advantages, bad input."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rollouts import fake_batch, rows_with_demonstrations
from stemma.data import diallock
from stemma.errors import InvalidBatchError, InvalidDataError
from stemma.rl.engine.advantages import group_relative
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.prefix_rft import (
    Config,
    EntropyMask,
    PrefixSampling,
    check_demonstrations,
    prefix_length,
    ratio_low,
    reference_advantages,
    reference_top_entropy,
    top_entropy,
)

EOS = diallock.EOS_ID
LIMITS = {"vocab_size": diallock.VOCAB_SIZE, "eos_token_id": [EOS], "max_completion_length": 40}


# ---------------------------------------------------------------------------------------------- schedule and cut


def test_the_schedule_falls_from_start_to_end_along_half_a_cosine() -> None:
    values = [ratio_low(step, 500) for step in range(501)]
    assert values[0] == pytest.approx(0.95, abs=1e-15)
    assert values[250] == pytest.approx(0.50, abs=1e-15)
    assert values[500] == pytest.approx(0.05, abs=1e-15)
    assert values[125] == pytest.approx(0.5 + 0.45 * math.cos(math.pi / 4), abs=1e-15)
    assert all(later < earlier for earlier, later in pairwise(values))
    assert ratio_low(900, 500) == values[500]
    assert ratio_low(3, 10, start=0.4, end=0.4) == 0.4


@given(ratio=st.floats(0, 1), length=st.integers(0, 200))
def test_a_prefix_never_holds_the_last_token(ratio: float, length: int) -> None:
    cut = prefix_length(ratio, length)
    assert 0 <= cut <= max(length - 1, 0)
    assert cut in (max(min(math.floor(ratio * length), length - 1), 0), min(round(ratio * length), length - 1))


def test_a_cut_that_means_an_integer_is_that_integer() -> None:
    assert math.floor(0.29 * 100) == 28  # what rounding makes of it
    assert prefix_length(0.29, 100) == 29
    assert prefix_length(0.95, 20) == 19
    assert [prefix_length(0.95, n) for n in (0, 1, 2)] == [0, 0, 1]
    assert [prefix_length(1.0, n) for n in (0, 1, 7)] == [0, 0, 6]


# ---------------------------------------------------------------------------------------------- rollout


class Recorded:
    """A `Generate` that keeps its arguments and samples nothing."""

    def __call__(self, prompts: Any, num_generations: int, seeds: Any, /, forced: Any = None) -> RolloutBatch:
        self.prompts, self.seeds, self.forced = prompts, seeds, forced
        lengths = [[len(ids) + 2 for ids in group] for group in forced]
        flat = [n for group in lengths for n in group]
        return fake_batch(flat, [n - 2 for n in flat], num_generations)


def test_the_last_rows_of_a_group_begin_with_the_demonstration() -> None:
    rows = rows_with_demonstrations(0, 3)
    del rows[1]["demonstration_ids"]
    rollout = PrefixSampling(Config(num_prefixed_generations=2), total_steps=10, **LIMITS)
    generate = Recorded()
    batch = rollout(generate, rows, 4, [11, 12, 13], 5)
    low = ratio_low(5, 10)
    for row, group in zip(rows, generate.forced, strict=True):
        assert group[:2] == [[], []]
        demonstration = row.get("demonstration_ids")
        for prefix in group[2:]:
            if demonstration is None:
                assert prefix == []
            else:
                assert prefix == demonstration[: len(prefix)]
                assert math.floor(low * len(demonstration)) <= len(prefix) <= 0.95 * len(demonstration)
    assert generate.seeds == [11, 12, 13]
    assert batch.forced_len.view(3, 4)[:, :2].eq(0).all()


def test_lengths_depend_on_the_seed_of_the_row_alone_and_fill_the_interval() -> None:
    rows = [{"prompt_ids": [3], "demonstration_ids": [4] * 100}] * 400
    rollout = PrefixSampling(Config(), total_steps=10, **{**LIMITS, "max_completion_length": 200})
    lengths = [own[0] for own in rollout.lengths(rows, range(400), 10)]
    assert lengths == [rollout.lengths(rows[:1], [seed], 10)[0][0] for seed in range(400)]
    assert 5 <= min(lengths) <= 7
    assert 93 <= max(lengths) <= 95
    assert sum(lengths) / 400 == pytest.approx(49.5, abs=4)
    assert {own[0] for own in rollout.lengths(rows, range(400), 0)} <= {94, 95}


@pytest.mark.parametrize("demonstration", [[], None, [4], [EOS], torch.tensor([4])], ids=str)
def test_demonstrations_too_short_to_cut_give_plain_rows(demonstration: Any) -> None:
    generate = Recorded()
    PrefixSampling(Config(), total_steps=10, **LIMITS)(
        generate, [{"prompt_ids": [3], "demonstration_ids": demonstration}], 3, [1], 0
    )
    assert generate.forced == [[[], [], []]]


def test_a_group_needs_a_free_sample() -> None:
    rollout = PrefixSampling(Config(), total_steps=10, **LIMITS)
    with pytest.raises(ValueError, match="num_generations=1 must exceed num_prefixed_generations=1"):
        rollout(Recorded(), rows_with_demonstrations(0, 1), 1, [1], 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"demonstration_ids": [4, EOS, 5, 6]}, "end token 1 at position 1 of 4"),
        ({"demonstration_ids": torch.tensor([4, EOS, 5])}, "end token 1 at position 1 of 3"),
        ({"demonstration_ids": [4, 5, 21]}, "contain 21; the model's 21 tokens have the ids 0..20"),
        ({"demonstration_ids": [4, -1]}, "contain -1"),
        ({"demonstration_ids": [4.5, 5]}, "contain 4.5"),
        ({"demonstration_ids": "ab"}, "contain 'a'"),
        ({"demonstration_ids": [4] * 41}, "41 tokens, more than max_completion_length=40"),
        ({"demonstration_ids": [4, 5], "prefix_ids": [3]}, "demonstration_ids and prefix_ids"),
    ],
)
def test_demonstrations_that_cannot_be_used_are_refused(row: dict[str, Any], message: str) -> None:
    rows = [{"prompt_ids": [2]}, {"prompt_ids": [2, 3], **row}]
    with pytest.raises(InvalidDataError, match=message):
        check_demonstrations(rows, **LIMITS)
    with pytest.raises(InvalidDataError, match=message):
        PrefixSampling(Config(), total_steps=10, **LIMITS)(Recorded(), rows, 3, [1, 2], 0)


def test_checking_counts_the_rows_with_a_demonstration() -> None:
    rows = [*rows_with_demonstrations(0, 3), {"prompt_ids": [2]}, {"prompt_ids": [2], "demonstration_ids": []}]
    assert check_demonstrations(rows, **LIMITS) == 3
    assert PrefixSampling(Config(), total_steps=10, **LIMITS).check(rows) == 3
    assert check_demonstrations([{"prompt_ids": [2], "demonstration_ids": [4] * 39 + [EOS]}], **LIMITS) == 1


# ---------------------------------------------------------------------------------------------- entropy mask


@st.composite
def pools(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    few = st.sampled_from([0.0, 0.5, 0.5 + 1e-9, 1.0, 2.25])  # many ties
    entropies = draw(st.lists(few, min_size=rows * columns, max_size=rows * columns))
    candidates = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(entropies).view(rows, columns), torch.tensor(candidates).view(rows, columns)


@given(pools(), st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.7, 1.0]), st.sampled_from(["batch", "row"]))
def test_top_entropy_equals_the_loops(pool: tuple[Tensor, Tensor], quantile: float, scope: Any) -> None:
    entropies, candidates = pool
    keep = top_entropy(entropies, candidates, quantile, scope)
    assert torch.equal(keep, reference_top_entropy(entropies, candidates, quantile, scope))
    assert not (keep & ~candidates).any()
    counts = [int(candidates.sum())] if scope == "batch" else candidates.sum(-1).tolist()
    kept = [int(keep.sum())] if scope == "batch" else keep.sum(-1).tolist()
    assert kept == [math.ceil(round(quantile * n, 9)) for n in counts]


def test_ties_keep_exactly_the_quota_and_the_first_ones() -> None:
    keep = top_entropy(torch.ones(2, 5), torch.ones(2, 5, dtype=torch.bool), 0.3)
    assert keep.tolist() == [[True, True, True, False, False], [False] * 5]
    assert math.ceil(0.07 * 100) == 8  # what rounding makes of it
    assert top_entropy(torch.ones(1, 100), torch.ones(1, 100, dtype=torch.bool), 0.07).sum() == 7


def test_the_mask_trains_on_all_sampled_and_some_forced_tokens() -> None:
    entropies = torch.tensor([[0.0, 0, 0, 0, 0, 0], [9, 1, 3, 2, 0, 9], [0, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]])
    batch = fake_batch([6, 5, 3, 6], [0, 4, 0, 1], entropies=entropies)
    expected = batch.sampled_mask.clone()
    expected[1, 0] = True  # two of five: entropies 9 and 4, not the 9 on padding
    expected[3, 0] = True
    assert torch.equal(EntropyMask(0.4)(batch, 0), expected)
    expected[1, 2] = True  # two of the four in row 1, one of the one in row 3
    assert torch.equal(EntropyMask(0.4, "row")(batch, 0), expected)
    assert torch.equal(EntropyMask(0.0)(batch, 0), batch.sampled_mask)
    assert torch.equal(EntropyMask(1.0)(batch, 0), batch.completion_mask)
    with pytest.raises(InvalidBatchError, match="without entropies"):
        EntropyMask(0.4)(fake_batch([2], [0], 1), 0)


def test_processes_rank_their_entropies_together(monkeypatch: pytest.MonkeyPatch) -> None:
    entropies = torch.rand(4, 9)
    whole = fake_batch([9, 9, 9, 4], [5, 0, 9, 3], entropies=entropies)
    parts = [fake_batch([9, 9], [5, 0], entropies=entropies[:2]), fake_batch([9, 4], [9, 3], entropies=entropies[2:])]
    forced = [part.completion_mask & ~part.sampled_mask for part in parts]
    shares = [part.entropies[mask].tolist() for part, mask in zip(parts, forced, strict=True)]
    answers = {"numbers": [len(share) for share in shares], "lists": shares}
    monkeypatch.setattr(
        "accelerate.utils.gather_object", lambda own: answers["numbers" if isinstance(own[0], int) else "lists"]
    )

    class Process:
        num_processes = 2

        def __init__(self, index: int) -> None:
            self.process_index = index

    together = torch.cat([EntropyMask(0.3, accelerator=Process(i))(part, 0) for i, part in enumerate(parts)])
    assert torch.equal(together, EntropyMask(0.3)(whole, 0))


# ---------------------------------------------------------------------------------------------- advantages


def test_reference_advantages_of_a_group_by_hand() -> None:
    reward = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64)
    forced = torch.tensor([0, 0, 0, 2, 0, 0, 0, 1])
    found = reference_advantages(reward, torch.tensor([0] * 4 + [1] * 4), forced, 3)
    third = 1 / 3
    expected = [[2 * third] * 3, [-third] * 3, [-third] * 3, [1 - third, 1 - third, 1.0], *[[0.0] * 3] * 4]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 1.0, math.nan]), st.integers(0, 3)), min_size=4, max_size=12),
    st.sampled_from(["none", "group"]),
)
def test_reference_advantages_equal_loops(rows: list[tuple[float, int]], scale: Any) -> None:
    rows = rows[: len(rows) // 2 * 2]
    reward = torch.tensor([r for r, _ in rows], dtype=torch.float64)
    forced = torch.tensor([f for _, f in rows])
    group = torch.arange(len(rows)) // 2
    found = reference_advantages(reward, group, forced, 4, scale)
    for g in range(len(rows) // 2):
        members = [i for i in range(len(rows)) if i // 2 == g]
        free = [i for i in members if forced[i] == 0]
        known = [reward[i].item() for i in free if not reward[i].isnan()]
        own = group_relative(reward[free], torch.zeros(len(free)), scale_rewards=scale) if free else []
        for i in members:
            for t in range(4):
                if reward[i].isnan():
                    expected = 0.0
                elif forced[i] == 0:
                    expected = own[free.index(i)].item()
                elif t < forced[i]:
                    expected = reward[i].item() - sum(known) / len(known) if known else 0.0
                else:
                    expected = reward[i].item()
                assert found[i, t].item() == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prefixed_generations": 0}, "num_prefixed_generations must be at least 1; got 0"),
        ({"prefix_ratio_high": 1.2}, r"prefix_ratio_high must be in \[0, 1\]; got 1.2"),
        ({"prefix_ratio_high": 0.5}, r"prefix_ratio_low_start must be in \[0, prefix_ratio_high=0.5\]; got 0.95"),
        ({"prefix_ratio_low_end": -0.1}, "prefix_ratio_low_end must be in"),
        ({"entropy_quantile": 1.5}, "entropy_quantile must be in"),
        ({"entropy_scope": "micro_batch"}, "entropy_scope must be one of batch, row; got 'micro_batch'"),
        ({"prefix_advantage": "raw"}, "prefix_advantage must be one of group, reference; got 'raw'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)

"""Prefix-RFT: the schedule, the cut, the entropy mask against loops, both advantages, and whole steps in float64."""

import math
from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stemma.data import diallock
from stemma.errors import InvalidBatchError, InvalidDataError
from stemma.models.rollout import LocalGenerator
from stemma.rl import grpo, tempo
from stemma.rl._losses import group_relative
from stemma.rl._shared import RolloutBatch, all_tokens
from stemma.rl.prefix_rft import (
    Config,
    EntropyMask,
    PrefixSampling,
    check_demonstrations,
    prefix_length,
    ratio_low,
    reference_advantages,
    reference_top_entropy,
    seams,
    top_entropy,
)

Make = Callable[..., Any]
EOS = diallock.EOS_ID
LIMITS = {"vocab_size": diallock.VOCAB_SIZE, "eos_token_id": [EOS], "max_completion_length": 40}


def rows_with_demonstrations(generation: int, count: int) -> list[dict[str, Any]]:
    rng = Random(generation)
    drawn = diallock.draw_problems(diallock.problems("train", min_distance=3, max_distance=4), count, rng)
    episodes = [diallock.oracle_episode(problem, rng) for problem in drawn]
    return [{"prompt_ids": each.prompt_ids, "demonstration_ids": each.completion_ids} for each in episodes]


def dial_reward(prompt_ids: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [diallock.reward(*pair) for pair in zip(prompt_ids, completion_ids, strict=True)]


def fake_batch(forced: list[int], lengths: list[int], group_size: int = 2, **extra: Any) -> RolloutBatch:
    """Rows of the given lengths, the first tokens of each forced; made-up ids."""
    size, width = len(lengths), max(lengths)
    return RolloutBatch(
        prompt_ids=[[5]] * (size // group_size),
        group_id=torch.arange(size) // group_size,
        completion_ids=torch.full((size, width), 7),
        completion_mask=torch.arange(width) < torch.tensor(lengths)[:, None],
        truncated=torch.zeros(size, dtype=torch.bool),
        forced_len=torch.tensor(forced),
        **extra,
    )


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


# ---------------------------------------------------------------------------------------------- rollout


class Recorded:
    """A `Generate` that keeps its arguments and samples nothing."""

    def __call__(self, prompts: Any, num_generations: int, seeds: Any, /, forced: Any = None) -> RolloutBatch:
        self.prompts, self.seeds, self.forced = prompts, seeds, forced
        lengths = [[len(ids) + 2 for ids in group] for group in forced]
        flat = [n for group in lengths for n in group]
        return fake_batch([n - 2 for n in flat], flat, num_generations)


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


@pytest.mark.parametrize("demonstration", [[], None, [4], [EOS]])
def test_demonstrations_too_short_to_cut_give_plain_rows(demonstration: list[int] | None) -> None:
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
    batch = fake_batch([0, 4, 0, 1], [6, 5, 3, 6], entropies=entropies)
    expected = batch.sampled_mask.clone()
    expected[1, 0] = True  # two of five: entropies 9 and 4, not the 9 on padding
    expected[3, 0] = True
    assert torch.equal(EntropyMask(0.4)(batch, 0), expected)
    expected[1, 2] = True  # two of the four in row 1, one of the one in row 3
    assert torch.equal(EntropyMask(0.4, "row")(batch, 0), expected)
    assert torch.equal(EntropyMask(0.0)(batch, 0), batch.sampled_mask)
    assert torch.equal(EntropyMask(1.0)(batch, 0), batch.completion_mask)
    with pytest.raises(InvalidBatchError, match="without entropies"):
        EntropyMask(0.4)(fake_batch([0], [2], 1), 0)


def test_processes_rank_their_entropies_together(monkeypatch: pytest.MonkeyPatch) -> None:
    entropies = torch.rand(4, 9)
    whole = fake_batch([5, 0, 9, 3], [9, 9, 9, 4], entropies=entropies)
    parts = [fake_batch([5, 0], [9, 9], entropies=entropies[:2]), fake_batch([9, 3], [9, 4], entropies=entropies[2:])]
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


# ---------------------------------------------------------------------------------------------- whole steps


@pytest.fixture
def make(make_trainer: Make, make_model: Make) -> Make:
    """`make(Config(...), credit=..., **options of the trainer)`; without a Config plain GRPO on the same rows."""

    def build(config: Config | None = None, **options: Any) -> grpo.Trainer:
        options = {"prompts": rows_with_demonstrations, "max_completion_length": 32, "max_steps": 10, **options}
        names = ("rollout", "credit", "loss_mask", "reward_funcs", "prompts")
        arguments = {name: options.pop(name) for name in names if name in options}
        options |= {"credit": options.pop("credit_name")} if "credit_name" in options else {}
        model = make_model()
        if config is not None:
            defaults = {"num_generations": 4, "per_device_train_batch_size": 8}
            trainer_config = grpo.Config(**{**defaults, **options})
            given = arguments.pop("credit", None)
            made = seams(config, trainer_config, model=model, processing_class=diallock.tokenizer(), credit=given)
            arguments = {**made, **arguments}
        return make_trainer(model, **options, **arguments)

    return build


def assert_equal_steps(one: grpo.Trainer, two: grpo.Trainer, steps: int = 2, tolerance: float = 1e-9) -> None:
    for _ in range(steps):
        first, second = one.step(), two.step()
        for name in ("loss", "grad_norm", "reward", "tokens/optimised", "tokens/sampled"):
            if name not in first:  # no rollout in this step
                continue
            assert second[name] == pytest.approx(first[name], rel=tolerance, abs=tolerance), name
    for left, right in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


class NeedsEntropies:
    """All tokens, after the same scoring pass that the entropy mask asks for."""

    needs_entropies = True

    def __call__(self, batch: RolloutBatch, step: int) -> Tensor:
        return batch.completion_mask


NO_PREFIX = Config(prefix_ratio_low_start=0.0, prefix_ratio_low_end=0.0, prefix_ratio_high=0.0)


def test_without_a_prefix_it_is_grpo(make: Make) -> None:
    assert_equal_steps(make(NO_PREFIX), make(loss_mask=NeedsEntropies()))
    # Plain GRPO has no scoring pass: its ratio is exactly one, ours one up to the rounding of old log-probabilities.
    assert_equal_steps(make(NO_PREFIX), make(), tolerance=1e-5)


def test_quantile_zero_freezes_the_prefix_and_one_trains_on_all_of_it(make: Make) -> None:
    class Frozen(NeedsEntropies):
        def __call__(self, batch: RolloutBatch, step: int) -> Tensor:
            return batch.sampled_mask

    assert_equal_steps(make(Config(entropy_quantile=0.0)), make(Config(), loss_mask=Frozen()))
    assert_equal_steps(make(Config(entropy_quantile=1.0)), make(Config(), loss_mask=NeedsEntropies()))


def test_the_switch_trains_on_exactly_a_fifth_of_the_forced_tokens(make: Make) -> None:
    counts = {}
    for quantile in (0.0, 0.2, 1.0):
        trainer = make(Config(entropy_quantile=quantile))
        optimised = trainer.step()["tokens/optimised"]
        batch = trainer._batch
        forced = int((batch.completion_mask & ~batch.sampled_mask).sum())
        assert forced == int(batch.forced_len.sum()) > 20
        counts[quantile] = optimised
    assert counts[0.2] - counts[0.0] == math.ceil(0.2 * forced)
    assert counts[1.0] - counts[0.0] == forced


def test_forced_tokens_are_those_of_the_demonstration(make: Make) -> None:
    trainer = make(Config())
    trainer.step()
    batch, rows = trainer._batch, rows_with_demonstrations(0, 2)
    assert batch.forced_len.view(2, 4)[:, :3].eq(0).all()
    for group, row in enumerate(rows):
        index = 4 * group + 3
        length = int(batch.forced_len[index])
        demonstration = row["demonstration_ids"]
        assert math.floor(0.95 * len(demonstration)) == length < len(demonstration)  # step 0 of the schedule
        assert batch.completion_ids[index, :length].tolist() == demonstration[:length]
    assert (batch.completion_mask.sum(-1) > batch.forced_len).all()


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "loss_type": "dr_grpo"}, {"loss_type": "grpo"}])
def test_shared_forward_and_accumulation_leave_a_step_alone(make: Make, options: dict[str, Any]) -> None:
    config = Config(prefix_ratio_low_start=0.3)
    assert_equal_steps(make(config, **options), make(config, shared_prefix=False, **options))
    assert_equal_steps(
        make(config, per_device_train_batch_size=8, **options),
        make(config, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options),
    )


def test_a_resumed_run_draws_the_same_prefixes(make: Make) -> None:
    whole, first, second = make(Config()), make(Config()), make(Config())
    expected = [whole.step() for _ in range(4)]
    for _ in range(2):
        first.step()
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for metrics in expected[2:]:
        again = second.step()
        assert {k: v for k, v in again.items() if "time" not in k} == {
            k: v for k, v in metrics.items() if "time" not in k
        }


def logprob_of(trainer: grpo.Trainer, row: dict[str, Any]) -> Tensor:
    """Log-probabilities of the tokens of the demonstration."""
    ids = torch.tensor([row["prompt_ids"] + row["demonstration_ids"]])
    with torch.no_grad():
        logits = trainer.model(ids).logits.log_softmax(-1)[0, :-1]
    return logits.gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :, 0]


@pytest.mark.parametrize("success", [True, False])
def test_a_prefix_that_verifies_is_pushed_up_and_one_that_does_not_is_pushed_down(make: Make, success: bool) -> None:
    (row,) = rows_with_demonstrations(3, 1)
    length = prefix_length(0.95, len(row["demonstration_ids"]))
    begins = row["demonstration_ids"][:length]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float((ids[:length] == begins) == success) for ids in completion_ids]

    trainer = make(
        Config(entropy_quantile=1.0),
        prompts=lambda generation, count: [row] * count,
        reward_funcs=reward,
        learning_rate=1e-3,
        num_generations=4,
        per_device_train_batch_size=4,
    )
    before = logprob_of(trainer, row)[:length].sum()
    metrics = trainer.step()
    after = logprob_of(trainer, row)[:length].sum()
    assert metrics["prefix_rft/reward_prefixed"] == float(success)
    assert metrics["prefix_rft/reward_free"] == float(not success)
    assert metrics["prefix_rft/prefix_length"] == length
    assert (after > before) == success


def test_the_verifier_judges_prefix_and_continuation_as_one_text(make: Make) -> None:
    seen: list[list[int]] = []

    def reward(prompt_ids: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(completion_ids)
        return dial_reward(prompt_ids, completion_ids)

    trainer = make(Config(), reward_funcs=reward)
    trainer.step()
    assert seen == trainer._batch.completions()
    demonstrations = [row["demonstration_ids"] for row in rows_with_demonstrations(0, 2)]
    assert [seen[3][:10], seen[7][:10]] == [ids[:10] for ids in demonstrations]


def test_the_ratio_of_forced_tokens_is_against_the_old_policy(make: Make) -> None:
    trainer = make(Config(entropy_quantile=1.0), num_iterations=2, learning_rate=1e-2)
    first = trainer.step()
    second = trainer.step()  # the same batch: its ratios have moved away from one, prefixes included
    batch = trainer._batch
    assert batch.old_logprobs is not None
    forced = batch.completion_mask & ~batch.sampled_mask
    torch.testing.assert_close(batch.old_logprobs[forced], batch.sampling_logprobs[forced], rtol=0, atol=1e-5)
    assert first["clip_ratio/region_mean"] == 0.0 < second["clip_ratio/region_mean"]


def test_tree_credit_composes_and_credits_of_their_own_do_not(make: Make) -> None:
    trainer = make(Config(prefix_ratio_low_start=0.2), credit=tempo.TreeCredit())
    trainer.step()
    assert trainer._batch.advantages.shape == trainer._batch.completion_ids.shape
    assert_equal_steps(
        make(Config(prefix_ratio_low_start=0.2), credit=tempo.TreeCredit()),
        make(Config(prefix_ratio_low_start=0.2), credit=tempo.TreeCredit(), shared_prefix=False),
    )
    with pytest.raises(ValueError, match="prefix_advantage='reference' is a credit of its own"):
        make(Config(prefix_advantage="reference"), credit=tempo.TreeCredit())
    with pytest.raises(ValueError, match="got credit='rloo'"):
        make(Config(prefix_advantage="reference"), credit_name="rloo")


def test_the_reference_advantage_reaches_the_step(make: Make) -> None:
    config = Config(prefix_advantage="reference")
    trainer = make(config, scale_rewards="none")
    assert_equal_steps(trainer, make(config, scale_rewards="none", shared_prefix=False))
    batch = trainer._batch
    hybrid = batch.forced_len > 0
    continued = batch.sampled_mask & hybrid[:, None]
    expected = batch.reward[:, None].expand_as(batch.advantages)[continued].float()
    assert torch.equal(batch.advantages[continued], expected)


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prefixed_generations": 0}, "num_prefixed_generations must be at least 1; got 0"),
        ({"prefix_ratio_high": 1.2}, r"prefix_ratio_high must be in \[0, 1\]; got 1.2"),
        ({"prefix_ratio_high": 0.5}, r"prefix_ratio_low_start must be in \[0, prefix_ratio_high=0.5\]; got 0.95"),
        ({"prefix_ratio_low_end": -0.1}, "prefix_ratio_low_end must be in"),
        ({"entropy_quantile": 1.5}, "entropy_quantile must be in"),
        ({"entropy_scope": "micro_batch"}, "entropy_scope must be batch or row; got 'micro_batch'"),
        ({"prefix_advantage": "raw"}, "prefix_advantage must be group or reference; got 'raw'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


@pytest.mark.parametrize(("prefixed", "advantage"), [(4, "group"), (3, "reference"), (5, "group")])
def test_a_group_without_enough_free_samples_is_refused(make: Make, prefixed: int, advantage: Any) -> None:
    with pytest.raises(ValueError, match=f"num_prefixed_generations={prefixed} leaves"):
        make(Config(num_prefixed_generations=prefixed, prefix_advantage=advantage))


def test_evaluation_never_sees_a_demonstration(make: Make) -> None:
    lengths: list[int] = []

    class Counted(LocalGenerator):
        def __call__(self, *arguments: Any, forced: Any = None, **options: Any) -> Any:
            lengths.extend(len(ids) for group in forced or [] for ids in group)
            return super().__call__(*arguments, forced=forced, **options)

    trainer = make(Config())
    trainer.experience.generate = type(trainer.experience.generate)(
        trainer.experience.generate.func,
        trainer.model,
        Counted(eos_token_id=EOS),
        trainer.config.max_completion_length,
    )
    trainer.evaluate(rows_with_demonstrations(9, 2))
    assert sum(lengths) == 0
    trainer.step()
    assert sum(lengths) > 20


def test_all_tokens_is_the_mask_of_plain_grpo() -> None:
    batch = fake_batch([0, 0], [3, 2])
    assert torch.equal(all_tokens(batch, 0), batch.completion_mask)

"""PrefixRL: frozen problems that begin with part of a verified trace, and training on them."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl.scripted import Scripted
from stemma.data import diallock
from stemma.data.traces import Trace
from stemma.errors import InvalidDataError
from stemma.rl.grpo import RolloutBatch, Run, Trainer
from stemma.rl.prefix_rl import Config, build_prefixed_problems, hooks, rewards_by_kind

Make = Callable[..., Any]
EOS = diallock.EOS_ID


def oracle_traces(count: int) -> list[Trace]:
    """Verified shortest solutions of different problems."""
    drawn = diallock.draw_problems(diallock.problems("train", min_distance=3), count, Random(1))
    episodes = [diallock.oracle_episode(problem, Random(i)) for i, problem in enumerate(drawn)]
    return [Trace(prompt_ids=e.prompt_ids, trace_ids=e.completion_ids, verified=True) for e in episodes]


TRACES = st.builds(
    Trace,
    prompt_ids=st.lists(st.integers(2, 20), min_size=1, max_size=6),
    trace_ids=st.lists(st.integers(2, 20), min_size=1, max_size=40).map(lambda ids: [*ids, EOS]),
    verified=st.just(True),
    columns=st.fixed_dictionaries({"answer": st.text(max_size=3)}),
)


@given(
    traces=st.lists(TRACES, min_size=1, max_size=4),
    ratio=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(lambda pair: tuple(sorted(pair))),
    cuts=st.integers(1, 4),
    plain=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_row_is_a_problem_and_a_beginning_of_its_trace(
    traces: list[Trace], ratio: tuple[float, float], cuts: int, plain: bool, seed: int
) -> None:
    options = {"cuts_per_problem": cuts, "ratio": ratio, "include_unprefixed": plain, "seed": seed}
    fits = [any(ratio[0] <= h / len(t.trace_ids) <= ratio[1] for h in range(len(t.trace_ids))) for t in traces]
    if not any(fits):
        with pytest.raises(InvalidDataError, match=f"{len(traces)} too short to be cut"):
            build_prefixed_problems(traces, **options)
        return
    built = build_prefixed_problems(traces, **options)
    assert built.too_short == fits.count(False)
    assert len(built) == fits.count(True) * (cuts + plain)
    kept = [trace for trace, fit in zip(traces, fits) if fit]
    for index, row in enumerate(built):
        trace, place = kept[index // (cuts + plain)], index % (cuts + plain)
        prefix = row.get("prefix_ids", [])
        assert row["prompt_ids"] == trace.prompt_ids + prefix
        assert prefix == trace.trace_ids[: len(prefix)]
        assert EOS not in prefix
        assert row["prefix_fraction"] == len(prefix) / len(trace.trace_ids)
        assert row["answer"] == trace.columns["answer"]
        assert ("prefix_ids" in row) == (place < cuts)
        assert place == cuts or ratio[0] <= row["prefix_fraction"] <= ratio[1]
    assert build_prefixed_problems(traces, **options).rows == built.rows
    # What comes later never changes what was drawn before.
    assert build_prefixed_problems([*traces, *traces], **options).rows[: len(built)] == built.rows


def test_cuts_are_uniform_over_the_whole_numbers_within_the_ratio() -> None:
    trace = Trace(prompt_ids=[2], trace_ids=[3] * 19 + [EOS], verified=True)
    drawn = Counter(len(r["prefix_ids"]) for r in build_prefixed_problems([trace] * 900, include_unprefixed=False))
    assert set(drawn) == set(range(8, 17))
    expected = 2700 / 9
    assert sum((count - expected) ** 2 / expected for count in drawn.values()) < 26.1  # chi-square, 8 df, p = 0.001
    assert {len(r["prefix_ids"]) for r in build_prefixed_problems([trace] * 9, seed=1) if "prefix_ids" in r} <= set(
        drawn
    )


def test_cuts_keep_to_boundaries_and_are_uniform_among_them() -> None:
    trace = Trace(prompt_ids=[2], trace_ids=[3] * 19 + [EOS], verified=True)
    options = {"include_unprefixed": False, "is_boundary": lambda ids, h: h % 3 == 0}
    drawn = Counter(len(r["prefix_ids"]) for r in build_prefixed_problems([trace] * 300, **options))
    assert set(drawn) == {9, 12, 15}
    assert sum((count - 300) ** 2 / 300 for count in drawn.values()) < 13.8  # chi-square, 2 df, p = 0.001
    never = build_prefixed_problems([trace], cuts_per_problem=0, is_boundary=lambda ids, h: False)
    assert len(never) == 1  # no cut was asked for
    with pytest.raises(InvalidDataError, match="1 too short to be cut"):
        build_prefixed_problems([trace], is_boundary=lambda ids, h: False)


def test_what_is_left_out_is_counted() -> None:
    long, short = Trace(prompt_ids=[2] * 9, trace_ids=[3] * 9 + [EOS], verified=True), oracle_traces(1)[0]
    given_up = Trace(prompt_ids=[2], trace_ids=[], verified=False)
    one_token = Trace(prompt_ids=[2], trace_ids=[EOS], verified=True)
    limits = {"ratio": (0.5, 0.5), "max_prompt_length": 13}
    built = build_prefixed_problems([long, given_up, one_token, given_up], too_long="skip", **limits)
    assert (built.unsolved, built.too_short, built.too_long) == (2, 1, 3)
    assert [row["prompt_ids"] for row in built] == [[2] * 9]
    assert len(build_prefixed_problems([long], ratio=(0.5, 0.5), max_prompt_length=14)) == 4
    with pytest.raises(InvalidDataError, match="trace 2: problem and prefix have 14 tokens, more than 13"):
        build_prefixed_problems([given_up, long], **limits)
    with pytest.raises(InvalidDataError, match=r"trace 2 is not verified"):
        build_prefixed_problems([short, dataclasses.replace(long, verified=False)])
    for ratio in ((0.0, 0.0), (0.0, 0.9)):
        with pytest.raises(InvalidDataError, match="1 too short"):
            build_prefixed_problems([one_token], ratio=ratio)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ratio": (0.4, 1.0)}, "ratio must be"),
        ({"ratio": (0.8, 0.4)}, "ratio must be"),
        ({"ratio": (-0.1, 0.4)}, "ratio must be"),
        ({"cuts_per_problem": -1}, "cuts_per_problem must be"),
        ({"cuts_per_problem": 0, "include_unprefixed": False}, "cuts_per_problem must be"),
        ({"too_long": "cut"}, "too_long must be"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build_prefixed_problems(oracle_traces(1), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"cuts_per_problem": 0},
        {"prefix_ratio_max": 1.0},
        {"prefix_ratio_min": 0.9},
        {"prefix_ratio_min": -0.1},
        {"too_long": "cut"},
    ],
)
def test_bad_settings_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Config(**options)


# ---------------------------------------------------------------------------------------------- training


def gradients(trainer: Trainer, batch: RolloutBatch, mode: str) -> dict[str, torch.Tensor]:
    assert batch.loss_mask is not None
    batch.weights = batch.loss_mask.double() / batch.loss_mask.sum()
    trainer.model.zero_grad()
    trainer.policy.backward(batch, mode, 0.0)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["shared", "plain"])
def test_a_prefix_in_the_prompt_learns_like_a_forced_beginning_without_loss(make_trainer: Make, mode: str) -> None:
    torch.manual_seed(0)
    size, length, forced = 4, 6, 9
    question, prefix = torch.randint(2, 21, (5,)).tolist(), torch.randint(2, 21, (forced,)).tolist()
    sampled = torch.randint(2, 21, (size, length))
    common = {
        "group_id": torch.zeros(size, dtype=torch.int64),
        "truncated": torch.ones(size, dtype=torch.bool),
        "advantages": torch.randn(size),
    }
    mask = torch.arange(length) < torch.tensor([6, 3, 5, 1])[:, None]
    in_prompt = RolloutBatch(
        prompt_ids=[question + prefix],
        completion_ids=sampled,
        completion_mask=mask,
        loss_mask=mask,
        forced_len=torch.zeros(size, dtype=torch.int64),
        **common,
    )
    real = torch.ones(size, forced, dtype=torch.bool)
    in_completion = RolloutBatch(
        prompt_ids=[question],
        completion_ids=torch.cat([torch.tensor([prefix] * size), sampled], 1),
        completion_mask=torch.cat([real, mask], 1),
        loss_mask=torch.cat([~real, mask], 1),
        forced_len=torch.full((size,), forced),
        **common,
    )
    trainer = make_trainer()
    one, two = gradients(trainer, in_prompt, mode), gradients(trainer, in_completion, mode)
    assert set(one) == set(two)
    assert max(gradient.abs().max() for gradient in one.values()) > 1e-3
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-9, atol=1e-12)


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def test_a_group_never_mixes_prefixes(make_trainer: Make) -> None:
    """Rewards that differ between the prefixes of a problem and not within: nothing to learn from."""
    rows = build_prefixed_problems(oracle_traces(1), cuts_per_problem=8, include_unprefixed=False).rows
    rows = list({len(row["prefix_ids"]): row for row in rows}.values())[:2]
    assert rows[0]["prompt_ids"][:6] == rows[1]["prompt_ids"][:6]
    trainer = make_trainer(
        prompts=lambda generation, count: rows,
        reward_funcs=lambda prefix_fraction, **_: prefix_fraction,
        scale_rewards="none",
    )
    before = parameters(trainer)
    metrics = trainer.step()
    assert metrics["reward_std"] > 0
    assert metrics["frac_reward_zero_std"] == 1
    assert all(torch.equal(value, before[name]) for name, value in parameters(trainer).items())


def test_prefixes_of_length_zero_are_plain_grpo(make_trainer: Make) -> None:
    traces = oracle_traces(4)
    rows = build_prefixed_problems(traces, cuts_per_problem=1, ratio=(0.0, 0.0), include_unprefixed=False).rows
    plain = [{"prompt_ids": trace.prompt_ids} for trace in traces]
    runs = []
    for source in (rows, plain):
        trainer = make_trainer(prompts=lambda generation, count, source=source: source[generation * 2 :][:count])
        for _ in range(2):
            trainer.step()
        runs.append(parameters(trainer))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def run_of(trainer: Trainer, traces: list[Trace]) -> Run:
    return Run(options=trainer.config, model=trainer.model, processing_class=None, traces=traces)


def test_the_mixture_is_three_to_one_and_the_same_after_a_resume(make_trainer: Make) -> None:
    trainer = make_trainer(seed=7)
    made = [hooks(Config(), run_of(trainer, oracle_traces(8)))["prompts"] for _ in range(2)]
    epoch = [row for generation in range(4) for row in made[0](generation, 8)]
    assert [made[1](generation, 8) for generation in (2, 3)] == [epoch[16:24], epoch[24:32]]
    assert sum("prefix_ids" in row for row in epoch) == 24
    assert len({tuple(row["prompt_ids"]) for row in epoch if "prefix_ids" not in row}) == 8
    assert sum("prefix_ids" in row for row in epoch[:16]) < 16  # mixed, not one kind after the other
    # Another seed means other cuts, and another order: plain rows have no cut to differ in.
    other = hooks(Config(), run_of(make_trainer(seed=8), oracle_traces(8)))["prompts"]
    plain = [[row["prompt_ids"] for row in rows if "prefix_ids" not in row] for rows in (epoch, other(0, 32))]
    assert sorted(plain[0]) == sorted(plain[1])
    assert plain[0] != plain[1]
    only = hooks(Config(include_unprefixed=False), run_of(trainer, oracle_traces(8)))
    assert all("prefix_ids" in row for row in only["prompts"](0, 48))


def test_settings_reach_the_problems(make_trainer: Make) -> None:
    trainer = make_trainer(max_completion_length=4)
    config = Config(cuts_per_problem=2, prefix_ratio_min=0.5, prefix_ratio_max=0.5)
    source = hooks(config, run_of(trainer, oracle_traces(1)))["prompts"]
    assert sorted(row["prefix_fraction"] for row in source(0, 3)) == [0.0, 0.5, 0.5]
    with pytest.raises(InvalidDataError, match="trace 1 holds token id 21, outside the model's vocabulary of 21"):
        hooks(config, run_of(trainer, [Trace([2], [21, EOS], verified=True)]))
    positions = trainer.model.config.max_position_embeddings
    long = [Trace([2], [3] * 2 * positions + [EOS, EOS, EOS, EOS], verified=True)]
    with pytest.raises(InvalidDataError, match=f"more than {positions - 4}"):
        hooks(config, run_of(trainer, long))
    skip = dataclasses.replace(config, too_long="skip")
    assert hooks(skip, run_of(trainer, long))["prompts"](0, 1) == [{"prompt_ids": [2], "prefix_fraction": 0.0}]


def solve(traces: list[Trace]) -> Callable[[list[int], int], list[int]]:
    """Says the rest of the trace that a prompt begins, for the first completion; ends at once for the others."""
    whole = [trace.prompt_ids + trace.trace_ids for trace in traces]

    def says(prompt: list[int], index: int) -> list[int]:
        rest = next((ids[len(prompt) :] for ids in whole if ids[: len(prompt)] == prompt), [EOS])
        return rest if index == 0 else [EOS]

    return says


def dialled(prompt_ids: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [diallock.reward(prompt, completion) for prompt, completion in zip(prompt_ids, completion_ids)]


def test_the_verifier_sees_prefix_and_continuation(make_trainer: Make) -> None:
    traces = oracle_traces(2)
    generator = Scripted(solve(traces))
    rows = build_prefixed_problems(traces, cuts_per_problem=1, include_unprefixed=False).rows
    options = {"reward_funcs": dialled, "max_completion_length": 200, "generator": generator}
    trainer = make_trainer(prompts=lambda generation, count: rows, **options)
    # One completion of four goes on to the end of the trace; the others are the prefix alone, which solves nothing.
    assert trainer.step()["reward"] == 0.25
    assert trainer._batch.reward.tolist() == [1, 0, 0, 0] * 2

    mismatched = [
        {**row, "prompt_ids": trace.prompt_ids + other["prefix_ids"], "prefix_ids": other["prefix_ids"]}
        for row, other, trace in zip(rows, rows[::-1], traces)
    ]
    generator.says = solve([dataclasses.replace(a, trace_ids=b.trace_ids) for a, b in zip(traces, traces[::-1])])
    assert make_trainer(prompts=lambda generation, count: mismatched, **options).step()["reward"] == 0


def test_prefixed_and_plain_rewards_are_logged_apart_and_computed_once(make_trainer: Make) -> None:
    traces, scored = oracle_traces(2), []

    def reward(prefix_fraction: list[float], completion_ids: list[list[int]], **_: Any) -> list[float]:
        scored.extend(prefix_fraction)
        return [1.0 if fraction else 0.25 for fraction in prefix_fraction]

    rows = build_prefixed_problems(traces, cuts_per_problem=1).rows
    both = rows[:2]
    assert ["prefix_ids" in row for row in both] == [True, False]
    trainer = make_trainer(prompts=lambda generation, count: both, reward_funcs=rewards_by_kind(reward))
    metrics = trainer.step()
    assert (metrics["rewards/prefixed/mean"], metrics["rewards/plain/mean"]) == (1.0, 0.25)
    assert metrics["reward"] == 0.625
    assert len(scored) == 8
    only = make_trainer(prompts=lambda generation, count: [rows[0], rows[2]], reward_funcs=rewards_by_kind(reward))
    assert math.isnan(only.step()["rewards/plain/mean"])
    assert trainer.evaluate([{"prompt_ids": traces[0].prompt_ids, "prefix_fraction": 0.0}])["eval/reward"] == 0.25
    with pytest.raises(InvalidDataError, match="'plain' raised InvalidDataError: 1 values for 4 completions"):
        make_trainer(prompts=lambda *_: both, reward_funcs=rewards_by_kind(lambda **_: [0.0])[::-1]).step()


def test_evaluation_refuses_prefixed_problems(make_trainer: Make) -> None:
    rows = build_prefixed_problems(oracle_traces(1)).rows
    trainer = make_trainer()
    assert "eval/reward" in trainer.evaluate(rows[3:])
    with pytest.raises(InvalidDataError, match="evaluation row 1 has prefix_ids"):
        trainer.evaluate([rows[3], rows[0]])


def test_problem_and_prefix_are_encoded_once_per_group(make_trainer: Make) -> None:
    rows = build_prefixed_problems(oracle_traces(2), cuts_per_problem=1, include_unprefixed=False).rows
    tokens = sum(len(row["prompt_ids"]) for row in rows)
    shared, plain = (make_trainer(prompts=lambda *_: rows, shared_prefix=flag).step() for flag in (True, False))
    assert plain["tokens/forwarded"] - shared["tokens/forwarded"] >= 3 * tokens  # four completions of each
    assert shared["loss"] == pytest.approx(plain["loss"], abs=1e-9)

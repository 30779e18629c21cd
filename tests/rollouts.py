"""Rollout batches made by hand, and the comparison of two trainers, for tests of methods."""

from random import Random
from typing import Any

import pytest
import torch

from stemma.data import diallock
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.grpo import Trainer


def fake_batch(lengths: list[int], forced: list[int] | None = None, group_size: int = 2, **extra: Any) -> RolloutBatch:
    """Rows of the given lengths, the first tokens of each forced; made-up ids."""
    size, width = len(lengths), max(lengths)
    return RolloutBatch(
        prompt_ids=[[5]] * (size // group_size),
        group_id=torch.arange(size) // group_size,
        completion_ids=torch.full((size, width), 7),
        completion_mask=torch.arange(width) < torch.tensor(lengths)[:, None],
        truncated=torch.zeros(size, dtype=torch.bool),
        forced_len=torch.tensor(forced or [0] * size),
        **extra,
    )


def rows_with_demonstrations(generation: int, count: int) -> list[dict[str, Any]]:
    """A prompt source of DialLock problems of three or four moves, each with a shortest solution."""
    rng = Random(generation)
    drawn = diallock.draw_problems(diallock.problems("train", min_distance=3, max_distance=4), count, rng)
    episodes = [diallock.oracle_episode(problem, rng) for problem in drawn]
    return [{"prompt_ids": each.prompt_ids, "demonstration_ids": each.completion_ids} for each in episodes]


def assert_equal_steps(one: Trainer, two: Trainer, steps: int = 2, tolerance: float = 1e-9) -> None:
    """Take steps with both and compare numbers and parameters."""
    for _ in range(steps):
        first, second = one.step(), two.step()
        for name in ("loss", "grad_norm", "reward", "tokens/optimised", "tokens/sampled"):
            if name in first:  # a step on old samples has no reward
                assert second[name] == pytest.approx(first[name], rel=tolerance, abs=tolerance), name
    for left, right in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    """What a repeated step must log again."""
    return {name: value for name, value in metrics.items() if "time" not in name}

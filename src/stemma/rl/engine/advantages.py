"""The credit of GRPO and RLOO as an object: the default of the trainer, and what other credits wrap."""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.options import CreditName, ScaleRewards

__all__ = ["GroupCredit", "equal_reward_groups", "group_relative", "leave_one_out", "reward_scale", "zero_std_fraction"]


@dataclass(frozen=True, kw_only=True)
class GroupCredit:
    """One advantage per sequence, from the rewards of its group; see `group_relative` and `leave_one_out`."""

    estimator: CreditName = "grpo"
    """"grpo": reward minus the group's mean; "rloo": minus the mean of the others, never divided."""
    scale_rewards: ScaleRewards = "group"
    """What "grpo" divides by; see `group_relative`."""
    accelerator: Any = None
    """Gathers the rewards of all processes for scale_rewards="batch"; None: those of this process."""

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """(N,) float32 advantages of a batch whose rewards are known."""
        assert batch.reward is not None
        if self.estimator == "rloo":
            return leave_one_out(batch.reward, batch.group_id).float()
        return group_relative(
            batch.reward, batch.group_id, scale_rewards=self.scale_rewards, all_rewards=self.all_rewards(batch)
        ).float()

    def all_rewards(self, batch: RolloutBatch) -> Tensor | None:
        """(M,) rewards of all processes where advantages need them, else None. All processes call it together."""
        assert batch.reward is not None
        if self.scale_rewards != "batch" or self.accelerator is None or self.accelerator.num_processes == 1:
            return None
        return self.accelerator.gather(batch.reward.to(self.accelerator.device)).cpu()


STD_EPSILON = 1e-4  # added to a standard deviation of rewards before dividing, as TRL does


def group_relative(
    rewards: Tensor, group_id: Tensor, *, scale_rewards: ScaleRewards = "group", all_rewards: Tensor | None = None
) -> Tensor:
    """Advantage of each sequence relative to its group: `A_i = (r_i - mean) / (std + 1e-4)`.

    Args:
        rewards: (N,) float, NaN where a completion cannot be scored. Such a row gets advantage 0 and does not enter
            its group's mean and standard deviation.
        group_id: (N,) int, equal within a group.
        scale_rewards: "group" divides by the unbiased standard deviation of the group, "batch" by that of
            `all_rewards`, "none" does not divide (Dr. GRPO).
        all_rewards: (M,) float, the rewards of all ranks for "batch"; `rewards` when not given.

    Returns:
        (N,) advantages in the dtype of `rewards`. A group with equal rewards, or with one reward, gets exactly 0.
    """
    scale = reward_scale(rewards, group_id, scale_rewards=scale_rewards, all_rewards=all_rewards)
    return _deviation(rewards, group_id)[0] / scale


def reward_scale(
    rewards: Tensor, group_id: Tensor, *, scale_rewards: ScaleRewards = "group", all_rewards: Tensor | None = None
) -> Tensor:
    """(N,) what `group_relative` divides by: a standard deviation + 1e-4, or 1; same arguments."""
    if scale_rewards not in get_args(ScaleRewards):
        raise ValueError(f"scale_rewards must be one of {get_args(ScaleRewards)}, got {scale_rewards!r}")
    if scale_rewards == "none":
        return torch.ones_like(rewards)
    if scale_rewards == "batch":
        std = _unbiased_std(rewards if all_rewards is None else all_rewards)
        return (std + STD_EPSILON).expand_as(rewards)
    deviation, group, count = _deviation(rewards, group_id)
    variance = torch.zeros_like(count).index_add_(0, group, deviation**2) / (count - 1).clamp(min=1)
    return variance.sqrt()[group] + STD_EPSILON


def _deviation(rewards: Tensor, group_id: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) reward minus the mean of its group, (N,) dense group index, (groups,) number of scored rewards."""
    scored, group, count, total = _group_sums(rewards, group_id)
    deviation = torch.where(scored, rewards - (total / count.clamp(min=1))[group], 0.0)
    # Rounding of the mean must not make an advantage out of equal rewards.
    return torch.where(_equal_rewards(rewards, group, len(count))[group], 0.0, deviation), group, count


def leave_one_out(rewards: Tensor, group_id: Tensor) -> Tensor:
    """RLOO: `A_i = r_i - mean of the other rewards of the group`; 0 for a NaN reward or a group with one reward.

    Args:
        rewards: (N,) float, NaN where unscorable.
        group_id: (N,) int, equal within a group.

    Returns:
        (N,) advantages in the dtype of `rewards`.
    """
    scored, group, count, total = _group_sums(rewards, group_id)
    others = (total[group] - rewards) / (count[group] - 1).clamp(min=1)
    single = (count[group] < 2) | _equal_rewards(rewards, group, len(count))[group]
    return torch.where(scored & ~single, rewards - others, 0.0)


def equal_reward_groups(rewards: Tensor, group_id: Tensor) -> Tensor:
    """(groups,) bool, in ascending order of `group_id`: scorable rewards are all equal, so they give no gradient."""
    _, group, count, _ = _group_sums(rewards, group_id)
    return _equal_rewards(rewards, group, len(count))


def zero_std_fraction(rewards: Tensor, group_id: Tensor) -> Tensor:
    """Share of groups whose scorable rewards are all equal. Scalar."""
    return equal_reward_groups(rewards, group_id).to(rewards.dtype).mean()


def _group_sums(rewards: Tensor, group_id: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N,) scored, (N,) dense group index, (groups,) number of scored rewards, (groups,) their sum."""
    if rewards.ndim != 1 or rewards.shape != group_id.shape:
        raise ValueError(
            f"rewards and group_id must be (N,), got {tuple(rewards.shape)} and {tuple(group_id.shape)}; "
            "pass one reward and one group per sequence"
        )
    values, group = torch.unique(group_id, return_inverse=True)
    scored = ~rewards.isnan()
    zeros = rewards.new_zeros(len(values))
    count = zeros.index_add(0, group, scored.to(rewards.dtype))
    total = zeros.index_add(0, group, torch.where(scored, rewards, 0.0))
    return scored, group, count, total


def _equal_rewards(rewards: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """(groups,) bool: no two scorable rewards of the group differ."""
    scored = ~rewards.isnan()
    low = rewards.new_full((num_groups,), torch.inf).scatter_reduce(
        0, group, torch.where(scored, rewards, torch.inf), "amin"
    )
    high = rewards.new_full((num_groups,), -torch.inf).scatter_reduce(
        0, group, torch.where(scored, rewards, -torch.inf), "amax"
    )
    return low >= high  # a group without any scored reward has low = inf and high = -inf


def _unbiased_std(rewards: Tensor) -> Tensor:
    scored = rewards[~rewards.isnan()]
    return scored.std() if scored.numel() > 1 else scored.new_zeros(())

"""The credit of GRPO and RLOO as an object: the default of the trainer, and what other credits wrap."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stemma.rl._config import CreditName, ScaleRewards
from stemma.rl._losses import group_relative, leave_one_out
from stemma.rl._shared import RolloutBatch

__all__ = ["GroupCredit"]


@dataclass(frozen=True, kw_only=True)
class GroupCredit:
    """One advantage per sequence, from the rewards of its group; see `_losses.group_relative` and `leave_one_out`."""

    estimator: CreditName = "grpo"
    """"grpo": reward minus the group's mean; "rloo": minus the mean of the others, never divided."""
    scale_rewards: ScaleRewards = "group"
    """What "grpo" divides by; see `_losses.group_relative`."""
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

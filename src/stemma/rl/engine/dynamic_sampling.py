"""Dynamic sampling: groups whose rewards are all equal give no gradient, so others are sampled in their place.

Source: DAPO (2025, arXiv 2503.14476, section 3.2). Rounds of prompts are sampled until the batch is full of groups with
different rewards; if `max_generation_batches` rounds are not enough, the first of the dropped groups fill it up. Groups
keep the order in which their prompts came; those that are left over are thrown away.

What differs from DAPO: processes pool the groups of a round and each takes its share of the pool, so that a run does
not depend on their number and none waits for another's luck. Rewards are compared before the penalty for overlong
completions, as DAPO compares correctness; a group with further completions is kept for their differences too.

Dropping changes the scale of the loss: a dropped group has no gradient, yet the denominators of every loss type would
count its tokens (dapo, bnpo, cispo) or sequences (grpo, dr_grpo). Without a share p of such groups in the batch, the
gradient is 1 / (1 - p) times as large.
"""

import itertools
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from stemma.rl.engine.advantages import equal_reward_groups
from stemma.rl.engine.batch import RolloutBatch

__all__ = ["Pool", "concatenate", "different_rewards"]


def different_rewards(batch: RolloutBatch) -> Tensor:
    """(P,) bool for the P prompts of a batch: two of the rewards, those of further completions included, differ."""
    assert batch.reward is not None
    rewards, groups = [batch.reward], [batch.group_id]
    for further in batch.further:
        assert further.reward is not None
        rewards.append(further.reward)
        groups.append(batch.group_id[further.group_id])
    return ~equal_reward_groups(torch.cat(rewards), torch.cat(groups))


def concatenate(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """One batch of the prompts of all batches in turn; shorter completions are padded further."""
    if len(batches) == 1:
        return batches[0]
    length = max(batch.completion_ids.shape[1] for batch in batches)

    def joined(values: Sequence[Any]) -> Any:
        if isinstance(values[0], RolloutBatch):
            return concatenate(values)
        return None if values[0] is None else torch.cat([_widened(value, length) for value in values])

    state: dict[str, Any] = {
        "prompt_ids": [prompt for batch in batches for prompt in batch.prompt_ids],
        "encoded_tokens": sum(batch.encoded_tokens for batch in batches),
        "extras": {name: joined([batch.extras[name] for batch in batches]) for name in batches[0].extras},
    }
    offsets = itertools.accumulate([len(batch.prompt_ids) for batch in batches[:-1]], initial=0)
    state["group_id"] = torch.cat([batch.group_id + offset for batch, offset in zip(batches, offsets, strict=True)])
    for each in fields(RolloutBatch):
        if each.name not in state:
            state[each.name] = joined([getattr(batch, each.name) for batch in batches])
    return RolloutBatch(**state)


def _widened(value: Tensor, length: int) -> Tensor:
    return value if value.ndim == 1 else torch.nn.functional.pad(value, (0, length - value.shape[1]))


class Pool:
    """Groups that all processes sampled for one batch, in the order of their prompts.

    Args:
        needed: groups of the batch, of all processes together.
        accelerator: an `accelerate.Accelerator`.
    """

    def __init__(self, needed: int, accelerator: Any) -> None:
        self.needed, self.accelerator = needed, accelerator
        self._batches: list[RolloutBatch] = []
        self._different: list[Tensor] = []

    def add(self, batch: RolloutBatch, different: Tensor) -> None:
        """Pool a round: the groups of this process, and whether each has different rewards. A collective call."""
        own = [(batch, different)]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            own = gather_object(own)
        self._batches += [groups for groups, _ in own]
        self._different += [flags for _, flags in own]

    @property
    def full(self) -> bool:
        """Whether enough groups with different rewards are there."""
        return sum(int(flags.sum()) for flags in self._different) >= self.needed

    def take(self) -> tuple[RolloutBatch, dict[str, float]]:
        """This process's share of the batch, and what to log: groups sampled, kept, and filled up with dropped ones."""
        different = torch.cat(self._different)
        kept = different.nonzero().squeeze(1).tolist()[: self.needed]
        filled = (~different).nonzero().squeeze(1).tolist()[: self.needed - len(kept)]
        chosen = sorted(kept + filled)
        share = self.needed // self.accelerator.num_processes
        start = share * self.accelerator.process_index
        return concatenate(self._batches).select(chosen[start : start + share]), {
            "dynamic_sampling/groups_sampled": float(len(different)),
            "dynamic_sampling/groups_kept": float(len(kept)),
            "dynamic_sampling/groups_filled": float(len(filled)),
        }

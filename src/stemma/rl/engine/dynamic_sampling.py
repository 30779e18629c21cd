"""Dynamic sampling: groups whose rewards are all equal give no gradient, so others are sampled in their place.

Source: DAPO (2025, arXiv 2503.14476, section 3.2). Rounds of prompts are sampled until the batch is full of groups with
different rewards; if `max_generation_batches` rounds are not enough, the first of the dropped groups fill it up. Groups
keep the order in which their prompts came; those that are left over are thrown away.

What differs from DAPO: processes pool the groups of a round and each takes its share of the pool, so that a run does
not depend on their number and none waits for another's luck. Rewards are compared before the penalty for overlong
completions, as DAPO compares correctness; a group with continuations (PPPO) is kept for their differences too.

Dropping changes the scale of the loss: a dropped group has no gradient, yet the denominators of every loss type would
count its tokens (dapo, bnpo, cispo) or sequences (grpo, dr_grpo). Without a share p of such groups in the batch, the
gradient is 1 / (1 - p) times as large.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from stemma.rl.engine.advantages import equal_reward_groups
from stemma.rl.engine.batch import RolloutBatch

__all__ = ["Pool", "concatenate", "different_rewards", "select_groups"]


def different_rewards(batch: RolloutBatch) -> Tensor:
    """(P,) bool for the P prompts of a batch: two of the rewards, those of continuations included, differ."""
    assert batch.reward is not None
    rewards, group = batch.reward, batch.group_id
    if batch.continuations is not None:
        assert batch.continuations.reward is not None
        rewards = torch.cat([rewards, batch.continuations.reward])
        group = torch.cat([group, group[batch.continuations.group_id]])
    return ~equal_reward_groups(rewards, group)


def concatenate(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """One batch of the prompts of all batches in turn; shorter completions are padded further."""
    if len(batches) == 1:
        return batches[0]
    length = max(batch.completion_ids.shape[1] for batch in batches)
    joined: dict[str, Any] = {
        "prompt_ids": [prompt for batch in batches for prompt in batch.prompt_ids],
        "encoded_tokens": sum(batch.encoded_tokens for batch in batches),
        "continuations": _concatenated_continuations(batches),
    }
    offset, groups = 0, []
    for batch in batches:
        groups.append(batch.group_id + offset)
        offset += len(batch.prompt_ids)
    joined["group_id"] = torch.cat(groups)
    for field in fields(RolloutBatch):
        values = [getattr(batch, field.name) for batch in batches]
        if field.name not in joined and values[0] is not None:
            joined[field.name] = torch.cat([_widened(value, length) for value in values])
    return RolloutBatch(**joined)


def _concatenated_continuations(batches: Sequence[RolloutBatch]) -> RolloutBatch | None:
    """Continuations of the rows of all batches; a batch without any still counts with its rows."""
    found, waiting = [], []  # prompts of rows without continuations, to be put before those of the next batch
    for batch in batches:
        own = batch.continuations
        prompts = [batch.prompt_ids[group] for group in batch.group_id.tolist()]
        if own is None:
            waiting += prompts
            continue
        shifted = replace(own, prompt_ids=waiting + own.prompt_ids, group_id=own.group_id + len(waiting))
        found.append(shifted)
        waiting = []
    if not found:
        return None
    found[-1] = replace(found[-1], prompt_ids=found[-1].prompt_ids + waiting)
    return concatenate(found)


def _widened(value: Tensor, length: int) -> Tensor:
    return value if value.ndim == 1 else torch.nn.functional.pad(value, (0, length - value.shape[1]))


def select_groups(batch: RolloutBatch, groups: Sequence[int]) -> RolloutBatch:
    """The batch of these prompts, given in ascending order, with all their completions and continuations."""
    chosen = torch.tensor(list(groups), dtype=torch.int64)
    keep = torch.isin(batch.group_id, chosen)
    changes: dict[str, Any] = {
        field.name: value[keep]
        for field in fields(RolloutBatch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    changes["group_id"] = torch.searchsorted(chosen, changes["group_id"])
    changes["prompt_ids"] = [batch.prompt_ids[group] for group in groups]
    if batch.continuations is not None:
        continued = select_groups(batch.continuations, keep.nonzero().squeeze(1).tolist())
        changes["continuations"] = continued if len(continued) else None
    return replace(batch, **changes)


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
        return select_groups(concatenate(self._batches), chosen[start : start + share]), {
            "dynamic_sampling/groups_sampled": float(len(different)),
            "dynamic_sampling/groups_kept": float(len(kept)),
            "dynamic_sampling/groups_filled": float(len(filled)),
        }

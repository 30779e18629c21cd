"""The batch of rollouts that the trainer and its hooks hand on.

Shapes: `N` sequences, `T` padded completion length. Rows of a group are contiguous, in the order of the prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from stemma.errors import InvalidBatchError
from stemma.prefix.tree import PrefixTree

__all__ = ["RolloutBatch"]


@dataclass
class RolloutBatch:
    """Completions of some prompts and what training needs to know about each of their tokens."""

    prompt_ids: list[list[int]]
    """Token ids of each prompt; a group belongs to one prompt."""
    group_id: Tensor
    """(N,) int64, ascending: the row's index in `prompt_ids`."""
    completion_ids: Tensor
    """(N, T) int64, right-padded. A row is its forced beginning, then what was sampled, with the end token."""
    completion_mask: Tensor
    """(N, T) bool, true on real tokens: a run that begins in column 0."""
    truncated: Tensor
    """(N,) bool: cut off at the maximum length, without an end token."""
    forced_len: Tensor
    """(N,) int64: leading completion tokens that were not sampled."""
    sampling_logprobs: Tensor | None = None
    """(N, T) float32: log-probabilities that the sampler saw."""
    reward: Tensor | None = None
    """(N,) float, NaN where unscorable."""
    advantages: Tensor | None = None
    """(N,) or (N, T)."""
    loss_mask: Tensor | None = None
    """(N, T) bool within `completion_mask`: the tokens that get gradient."""
    weights: Tensor | None = None
    """(N, T) float64: see `stemma.rl.engine.losses.token_weights`."""
    old_logprobs: Tensor | None = None
    """(N, T) float32: log-probabilities under the policy at the time of sampling, computed by the trainer."""
    ref_logprobs: Tensor | None = None
    """(N, T) float32: log-probabilities under the reference model."""
    entropies: Tensor | None = None
    """(N, T) float32: entropies in nats under the policy at the time of sampling, where a loss mask asked for them."""
    norm_mask: Tensor | None = None
    """(N, T) bool: the tokens that the denominators of the loss count; None: those of `loss_mask`."""
    encoded_tokens: int = 0
    """Tokens that went through the model for sampling, prompts once each; 0 where a server did it."""
    extras: "dict[str, Tensor | RolloutBatch]" = field(default_factory=dict)
    """What a method keeps beside the rows, by names of its own: tensors of shape (N,) or (N, T), or further completions
    of the rows, as a batch with one prompt per row whose `group_id` is the index of the row. Further completions are
    rewarded, not trained on, and do not outlive the credit."""

    def __post_init__(self) -> None:
        size, length = self.completion_ids.shape
        for name, value in [*vars(self).items(), *self.extras.items()]:
            if isinstance(value, Tensor) and tuple(value.shape) not in ((size,), (size, length)):
                raise InvalidBatchError(
                    f"RolloutBatch.{name} has shape {tuple(value.shape)}; completion_ids of shape "
                    f"({size}, {length}) needs ({size},) or ({size}, {length}) there"
                )
            if isinstance(value, RolloutBatch) and len(value.prompt_ids) != size:
                raise InvalidBatchError(
                    f"RolloutBatch.{name} has {len(value.prompt_ids)} prompts; further completions need one for each "
                    f"of the {size} rows"
                )
        lengths = self.completion_mask.sum(-1)
        if not torch.equal(self.completion_mask, torch.arange(length, device=lengths.device) < lengths[:, None]):
            raise InvalidBatchError(
                "RolloutBatch.completion_mask has a hole; completions are right-padded, so true entries form one run "
                "from column 0. Tokens that must not be trained on go into loss_mask"
            )
        group = self.group_id
        if size and (group.min() < 0 or group.max() >= len(self.prompt_ids) or (group.diff() < 0).any()):
            raise InvalidBatchError(
                f"RolloutBatch.group_id must be ascending indices below {len(self.prompt_ids)}, the number of prompts"
            )
        if (self.forced_len > lengths).any():
            raise InvalidBatchError("RolloutBatch.forced_len exceeds the length of a completion")

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def sampled_mask(self) -> Tensor:
        """(N, T) bool: completion tokens that were sampled, not forced."""
        columns = torch.arange(self.completion_ids.shape[1], device=self.completion_ids.device)
        return self.completion_mask & (columns >= self.forced_len[:, None])

    @property
    def further(self) -> "list[RolloutBatch]":
        """The batches among the extras."""
        return [value for value in self.extras.values() if isinstance(value, RolloutBatch)]

    def completions(self) -> list[list[int]]:
        """Token ids of each completion, unpadded."""
        lengths = self.completion_mask.sum(-1).tolist()
        return [ids[:length] for ids, length in zip(self.completion_ids.tolist(), lengths, strict=True)]

    def groups(self, start: int, stop: int) -> "RolloutBatch":
        """The batch of prompts `start` to `stop` (exclusive), whole groups."""
        return self.select(range(start, min(stop, len(self.prompt_ids))))

    def first_rows(self, count: int) -> "RolloutBatch":
        """The batch of the first `count` rows, at least 1; the last group may be cut."""
        state = self._mapped(lambda value: value[:count] if isinstance(value, Tensor) else value.select(range(count)))
        return RolloutBatch(**{**state, "prompt_ids": self.prompt_ids[: int(state["group_id"][-1]) + 1]})

    def select(self, groups: Sequence[int]) -> "RolloutBatch":
        """The batch of these prompts, given in ascending order, with all their completions and extras."""
        chosen = torch.tensor(list(groups), dtype=torch.int64, device=self.group_id.device)
        keep = torch.isin(self.group_id, chosen)
        rows = keep.nonzero().squeeze(1).tolist() if self.further else []
        state = self._mapped(lambda value: value[keep] if isinstance(value, Tensor) else value.select(rows))
        state["group_id"] = torch.searchsorted(chosen, state["group_id"])
        return RolloutBatch(**{**state, "prompt_ids": [self.prompt_ids[group] for group in groups]})

    def tree(self, *, trained_only: bool = False) -> PrefixTree:
        """The prefix tree of prompts and completions; row `i` is its sequence `i`, column `t` its column `t`.

        Args:
            trained_only: cut every completion behind its last token in `loss_mask`. Later tokens cannot change the
                log-probabilities of earlier ones, so the loss and its gradient stay the same.
        """
        completions = self.completions()
        if trained_only and self.loss_mask is not None:
            columns = torch.arange(self.loss_mask.shape[1] + 1, device=self.loss_mask.device)
            ends = (torch.nn.functional.pad(self.loss_mask, (1, 0)) * columns).amax(-1).tolist()
            completions = [ids[:end] for ids, end in zip(completions, ends, strict=True)]
        responses: list[list[list[int]]] = [[] for _ in self.prompt_ids]
        for group, completion in zip(self.group_id.tolist(), completions, strict=True):
            responses[group].append(completion)
        return PrefixTree.from_groups(self.prompt_ids, responses)

    def to(self, device: torch.device | str) -> "RolloutBatch":
        """A copy with all tensors on `device`."""
        return RolloutBatch(**self._mapped(lambda value: value.to(device)))

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and tensors, without further completions; `RolloutBatch(**state)` restores the batch."""
        state = self._mapped(lambda value: value)
        return {**state, "extras": {name: v for name, v in self.extras.items() if isinstance(v, Tensor)}}

    def _mapped(self, change: Callable[[Any], Any]) -> dict[str, Any]:
        """The fields by name, with `change` applied to every tensor and to every batch among the extras."""
        state = {each.name: getattr(self, each.name) for each in fields(self)}
        state = {name: change(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        return {**state, "extras": {name: change(value) for name, value in self.extras.items()}}

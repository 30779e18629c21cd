"""What the methods of this room share: the batch of rollouts and the four places where a method plugs in.

A method is a choice of prompts, rollout, credit and loss mask; everything else (losses, denominators, accumulation,
checkpoints) is common. Each place is a plain callable:

- `PromptSource`: which prompts to sample from;
- `Rollout`: completions of those prompts, with a forced beginning where a method wants one;
- `Credit`: advantages, one per sequence or one per token;
- `LossMask`: the completion tokens that get gradient.

A callable that is an object may also have `state_dict` and `load_state_dict` (saved and restored with the trainer),
`on_evaluate(metrics)` (called after each evaluation) and `metrics(batch)` (numbers to log with each generation).

Shapes: ``N`` sequences, ``T`` padded completion length. Rows of a group are contiguous, in the order of the prompts.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from stemma.errors import InvalidBatchError, InvalidDataError
from stemma.prefix.tree import PrefixTree
from stemma.train.seeds import stream

if TYPE_CHECKING:
    from stemma.models.rollout import Generator

Row = Mapping[str, Any]
"""One prompt: its token ids under ``prompt_ids``, beside them whatever the reward functions want to know. Where the
prompt ends with the beginning of an answer, ``prefix_ids`` holds that tail of ``prompt_ids``: reward functions get it
as the beginning of the completion."""

Reward = Callable[..., Sequence[float | None]]
"""``f(prompts, completions, completion_ids, **columns)`` -> one reward per completion, None where it cannot be scored;
TRL's signature. ``prompts`` and ``completions`` are texts, ``columns`` the other entries of the rows."""


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
    """(N, T) float64: see `_losses.token_weights`."""
    old_logprobs: Tensor | None = None
    """(N, T) float32: log-probabilities under the policy at the time of sampling, computed by the trainer."""
    ref_logprobs: Tensor | None = None
    """(N, T) float32: log-probabilities under the reference model."""
    entropies: Tensor | None = None
    """(N, T) float32: entropies in nats under the policy at the time of sampling, where a loss mask asked for them."""
    norm_mask: Tensor | None = None
    """(N, T) bool: the tokens that the denominators of the loss count; None: those of `loss_mask`."""
    retained_len: Tensor | None = None
    """(N,) int64: leading completion tokens that PPPO trains on."""
    continuations: "RolloutBatch | None" = None
    """Other endings of beginnings of this batch's rows: `group_id` is the index of the row that a continuation shares
    its forced beginning with. They are rewarded, not trained on, and do not outlive the credit."""
    encoded_tokens: int = 0
    """Tokens that went through the model for sampling, prompts once each; 0 where a server did it."""

    def __post_init__(self) -> None:
        size, length = self.completion_ids.shape
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                continue
            expected = ((size,),) if value.ndim == 1 else ((size, length),)
            if tuple(value.shape) not in expected:
                raise InvalidBatchError(
                    f"RolloutBatch.{field.name} has shape {tuple(value.shape)}; completion_ids of shape "
                    f"({size}, {length}) needs ({size},) or ({size}, {length}) there"
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

    def completions(self) -> list[list[int]]:
        """Token ids of each completion, unpadded."""
        lengths = self.completion_mask.sum(-1).tolist()
        return [ids[:length] for ids, length in zip(self.completion_ids.tolist(), lengths, strict=True)]

    def groups(self, start: int, stop: int) -> "RolloutBatch":
        """The batch of prompts `start` to `stop` (exclusive), whole groups."""
        keep = (self.group_id >= start) & (self.group_id < stop)
        sliced: dict[str, Any] = {
            field.name: value[keep] if isinstance(value, Tensor) else value
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        sliced |= {"prompt_ids": self.prompt_ids[start:stop], "group_id": sliced["group_id"] - start}
        return RolloutBatch(**{**sliced, "continuations": None})

    def tree(self, *, trained_only: bool = False) -> PrefixTree:
        """The prefix tree of prompts and completions; row `i` is its sequence `i`, column `t` its column `t`.

        Args:
            trained_only: cut every completion behind its last token in `loss_mask`. Later tokens cannot change the
                log-probabilities of earlier ones, so the loss and its gradient stay the same.
        """
        completions = self.completions()
        if trained_only and self.loss_mask is not None and self.loss_mask.any():
            columns = torch.arange(1, self.loss_mask.shape[1] + 1, device=self.loss_mask.device)
            ends = (self.loss_mask * columns).amax(-1).tolist()
            completions = [ids[:end] for ids, end in zip(completions, ends, strict=True)]
        responses: list[list[list[int]]] = [[] for _ in self.prompt_ids]
        for group, completion in zip(self.group_id.tolist(), completions, strict=True):
            responses[group].append(completion)
        return PrefixTree.from_groups(self.prompt_ids, responses)

    def to(self, device: torch.device | str) -> "RolloutBatch":
        """A copy with all tensors on `device`."""
        state = self.state_dict().items()
        moved: dict[str, Any] = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in state}
        return RolloutBatch(**moved)

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and tensors, without continuations; `RolloutBatch(**state)` restores the batch."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "continuations"}


class PromptSource(Protocol):
    """Prompts of one generation."""

    def __call__(self, generation: int, count: int, /) -> Sequence[Row]:
        """`count` rows (for all processes together), a function of `generation` alone, so that a resumed run goes on
        with the same prompts and every process can take its own share."""
        ...


class Generate(Protocol):
    """Sampling as the trainer hands it to a rollout: the policy, its generator and the options are bound."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        seeds: Sequence[int],
        /,
        forced: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> RolloutBatch:
        """`num_generations` completions of each prompt (token ids), group by group; one seed for each prompt.

        `forced[b][g]` are the token ids that completion g of prompt b begins with, possibly none.
        """
        ...


class Rollout(Protocol):
    """Sampling."""

    def __call__(
        self, generate: Generate, rows: Sequence[Row], num_generations: int, seeds: Sequence[int], step: int, /
    ) -> RolloutBatch:
        """`num_generations` completions of each row, group by group. Every random choice about a row comes from its
        seed alone, so that a run does not depend on the number of processes. `step`: optimiser steps so far."""
        ...


class Credit(Protocol):
    """Advantages."""

    def __call__(self, batch: RolloutBatch, /) -> Tensor:
        """(N,) or (N, T) advantages of a batch whose rewards are known; 0 where the reward is NaN."""
        ...


class LossMask(Protocol):
    """Which tokens are trained on. An attribute ``needs_entropies = True`` makes the trainer fill `batch.entropies`
    first; a method ``normaliser(batch)`` gives the (N, T) bool tokens that denominators of the loss count instead."""

    def __call__(self, batch: RolloutBatch, step: int, /) -> Tensor:
        """(N, T) bool; the trainer takes its intersection with `completion_mask`. `step`: optimiser steps so far."""
        ...


def all_tokens(batch: RolloutBatch, step: int) -> Tensor:
    """The loss mask of GRPO: every completion token."""
    return batch.completion_mask


def independent_samples(
    generate: Generate, rows: Sequence[Row], num_generations: int, seeds: Sequence[int], step: int
) -> RolloutBatch:
    """The rollout of GRPO: independent samples of the policy, each prompt encoded once."""
    return generate([row["prompt_ids"] for row in rows], num_generations, seeds)


def sample(
    model: nn.Module,
    generator: "Generator",
    max_completion_length: int,
    prompts: Sequence[Sequence[int]],
    num_generations: int,
    seeds: Sequence[int],
    /,
    forced: Sequence[Sequence[Sequence[int]]] | None = None,
) -> RolloutBatch:
    """Sampling by a generator, as a batch; bound to its first three arguments it is a `Generate`."""
    sampled = generator(
        model,
        prompts,
        num_generations=num_generations,
        max_new_tokens=max_completion_length,
        seed=seeds,
        forced=forced,
    )
    completions = [torch.tensor(ids) for group in sampled.completions for ids in group]
    lengths = torch.tensor([len(ids) for ids in completions])
    pad = torch.nn.utils.rnn.pad_sequence
    return RolloutBatch(
        prompt_ids=[list(prompt) for prompt in prompts],
        group_id=torch.arange(len(prompts)).repeat_interleave(num_generations),
        completion_ids=pad(completions, batch_first=True),
        completion_mask=torch.arange(int(lengths.max())) < lengths[:, None],
        truncated=~torch.tensor([flag for group in sampled.finished for flag in group]),
        forced_len=torch.tensor([length for group in sampled.forced_lengths for length in group]),
        sampling_logprobs=pad([x.float() for group in sampled.logprobs for x in group], batch_first=True),
        encoded_tokens=sampled.prefilled_tokens + sampled.decoded_tokens,
    )


class ShuffledRows:
    """Prompt source over a list: a new permutation each epoch, decided by the seed and the number of the epoch."""

    def __init__(self, rows: Sequence[Row], *, seed: int) -> None:
        if not rows:
            raise InvalidDataError("the prompt source has no rows; give at least one prompt")
        self._rows, self._seed = rows, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __call__(self, generation: int, count: int) -> list[Row]:
        return [self._row(position) for position in range(generation * count, (generation + 1) * count)]

    def _row(self, position: int) -> Row:
        epoch, index = divmod(position, len(self._rows))
        if self._order[0] != epoch:
            order = torch.randperm(len(self._rows), generator=stream(self._seed, "epoch", epoch))
            self._order = (epoch, order.tolist())
        return self._rows[self._order[1][index]]


def end_token_ids(model: nn.Module, processing_class: Any) -> list[int]:
    """Ids that end a completion: the tokenizer's and those of the model's generation config.

    Raises:
        InvalidDataError: there is none, so that no completion would ever end.
    """
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {processing_class.eos_token_id, *(found if isinstance(found, list) else [found])} - {None}
    if not ids:
        raise InvalidDataError(
            "neither the tokenizer nor the model's generation config has an eos_token_id; set tokenizer.eos_token"
        )
    return sorted(ids)


def checked_advantages(advantages: Tensor, size: int) -> Tensor:
    """The advantages, checked: finite everywhere, of shape (N,) or (N, T) with N = `size`."""
    if advantages.shape[:1] != (size,) or advantages.ndim > 2 or not bool(torch.isfinite(advantages).all()):
        raise InvalidBatchError(
            f"the credit function returned advantages of shape {tuple(advantages.shape)} and range "
            f"{advantages.min().item()}..{advantages.max().item()}; expected finite numbers of shape "
            f"({size},) or ({size}, T), 0 for rows without a reward"
        )
    return advantages


def mean_of(values: Iterable[float]) -> float:
    """Mean of the numbers that are not NaN; NaN when there is none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan

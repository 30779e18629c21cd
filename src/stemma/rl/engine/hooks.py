"""The hooks of the trainer, where a method plugs in, the default of each, and the run that a method joins.

A method is a choice of prompts, rollout, credit and loss mask; everything else (losses, denominators, accumulation,
checkpoints) is common. Each of the four is a plain callable:

- `PromptSource`: which prompts to sample from;
- `Rollout`: completions of those prompts, with a forced beginning where a method wants one;
- `Credit`: advantages, one per sequence or one per token;
- `LossMask`: the completion tokens that get gradient.

A callable that is an object may also have `state_dict` and `load_state_dict` (saved and restored with the trainer),
`on_evaluate(metrics)` (called after each evaluation) and `metrics(batch)` (numbers to log with each generation).

A method's file in `stemma.rl` offers `hooks(config, run) -> dict`: keyword arguments of the trainer for the method's
`Config` and a `Run`. That is all: the command line finds it by its place. Its `Config` may also have

- `defaults`, a mapping: what the run's own options are where the user says nothing;
- `needs`, a tuple of `Need`: what the run must have besides its prompts.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from stemma.data.traces import Trace
from stemma.errors import InvalidBatchError, InvalidDataError
from stemma.models import tokens
from stemma.rl.engine.batch import RolloutBatch
from stemma.rl.engine.options import Config
from stemma.train.seeds import stream

if TYPE_CHECKING:
    from stemma.decode.rollout import Generator

__all__ = [
    "Credit",
    "Generate",
    "IsBoundary",
    "LossMask",
    "Need",
    "PromptSource",
    "Reward",
    "Rollout",
    "Row",
    "Run",
    "ShuffledRows",
    "all_tokens",
    "checked_advantages",
    "end_token_ids",
    "independent_samples",
    "mean_of",
    "sample",
]


Row = Mapping[str, Any]
"""One prompt: its token ids under `prompt_ids`, beside them whatever the reward functions want to know. Where the
prompt ends with the beginning of an answer, `prefix_ids` holds that tail of `prompt_ids`: reward functions get it
as the beginning of the completion."""


Reward = Callable[..., Sequence[float | None]]
"""`f(prompts, completions, completion_ids, **columns)` -> one reward per completion, None where it cannot be scored;
TRL's signature. `prompts` and `completions` are texts, `columns` the other entries of the rows."""


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
    """Advantages. A credit that builds on another one keeps it as its attribute `credit`."""

    def __call__(self, batch: RolloutBatch, /) -> Tensor:
        """(N,) or (N, T) advantages of a batch whose rewards are known; 0 where the reward is NaN."""
        ...


class LossMask(Protocol):
    """Which tokens are trained on. An attribute `needs_entropies = True` makes the trainer fill `batch.entropies`
    first; a method `normaliser(batch)` gives the (N, T) bool tokens that denominators of the loss count instead."""

    def __call__(self, batch: RolloutBatch, step: int, /) -> Tensor:
        """(N, T) bool; the trainer takes its intersection with `completion_mask`. `step`: optimiser steps so far."""
        ...


Need = Literal["demonstrations", "traces", "evaluation"]
"""What a method may ask of a run: `demonstration_ids` in its rows, verified solutions, evaluations while it trains."""

IsBoundary = Callable[[Sequence[int], int], bool]
"""`is_boundary(token_ids, cut)`: whether the beginning of a solution may end before position `cut`."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a method may know of the run that it joins. Most methods use little of it."""

    options: Config
    """Options of the trainer."""
    model: nn.Module
    """The policy."""
    processing_class: Any
    """The tokenizer."""
    accelerator: Any = None
    """An `accelerate.Accelerator`; None: one process."""
    credit: Credit | None = None
    """The credit that the user chose; None: that of `options`. A method with a credit of its own builds on it or
    refuses it."""
    reward: Reward | None = None
    """The reward function; None: the caller gives it to the trainer, and the method leaves it alone."""
    rows: Sequence[Row] = ()
    """The rows that prompts are drawn from, or some of an endless source, to be checked before the run."""
    traces: Sequence[Trace] = ()
    """Verified solutions of problems."""
    is_boundary: IsBoundary | None = None
    """Where the beginning of a solution may end; None: anywhere."""


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
    completions = [torch.tensor(ids, dtype=torch.int64) for group in sampled.completions for ids in group]
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
    ids = tokens.end_token_ids(model, processing_class)
    if not ids:
        raise InvalidDataError(
            "neither the tokenizer nor the model's generation config has an eos_token_id; set tokenizer.eos_token"
        )
    return ids


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

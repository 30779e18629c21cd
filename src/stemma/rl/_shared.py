"""What the methods of this room share: the batch of rollouts and the four places where a method plugs in.

A method is a choice of prompts, rollout, credit and loss mask; everything else (losses, denominators, accumulation,
checkpoints) is common. Each place is a plain callable:

- `PromptSource`: which prompts to sample from;
- `Rollout`: completions of those prompts, with a forced beginning where a method wants one;
- `Credit`: advantages, one per sequence or one per token;
- `LossMask`: the completion tokens that get gradient.

Shapes: ``N`` sequences, ``T`` padded completion length. Rows of a group are contiguous, in the order of the prompts.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stemma.errors import InvalidBatchError, InvalidDataError
from stemma.prefix.tree import PrefixTree
from stemma.train.seeds import stream

Row = Mapping[str, Any]
"""One prompt: its token ids under ``prompt_ids``, beside them whatever the reward functions want to know."""

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
        sliced["prompt_ids"] = self.prompt_ids[start:stop]
        sliced["group_id"] = sliced["group_id"] - start
        return RolloutBatch(**sliced)

    def tree(self) -> PrefixTree:
        """The prefix tree of prompts and completions; row `i` is its sequence `i`, column `t` its column `t`."""
        responses: list[list[list[int]]] = [[] for _ in self.prompt_ids]
        for group, completion in zip(self.group_id.tolist(), self.completions(), strict=True):
            responses[group].append(completion)
        return PrefixTree.from_groups(self.prompt_ids, responses)

    def to(self, device: torch.device | str) -> "RolloutBatch":
        """A copy with all tensors on `device`."""
        moved: dict[str, Any] = self.state_dict()
        for name, value in moved.items():
            moved[name] = value.to(device) if isinstance(value, Tensor) else value
        return RolloutBatch(**moved)

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and tensors; `RolloutBatch(**state)` restores the batch."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class PromptSource(Protocol):
    """Prompts of one generation."""

    def __call__(self, generation: int, count: int, /) -> Sequence[Row]:
        """`count` rows (for all processes together), a function of `generation` alone, so that a resumed run goes on
        with the same prompts and every process can take its own share."""
        ...


class Rollout(Protocol):
    """Sampling."""

    def __call__(self, model: nn.Module, rows: Sequence[Row], num_generations: int, seed: int, /) -> RolloutBatch:
        """`num_generations` completions of each row, group by group; `seed` decides every random choice."""
        ...


class Credit(Protocol):
    """Advantages."""

    def __call__(self, batch: RolloutBatch, /) -> Tensor:
        """(N,) or (N, T) advantages of a batch whose rewards are known; 0 where the reward is NaN."""
        ...


class LossMask(Protocol):
    """Which tokens are trained on. An attribute ``needs_entropies = True`` makes the trainer fill `batch.entropies`."""

    def __call__(self, batch: RolloutBatch, step: int, /) -> Tensor:
        """(N, T) bool; the trainer takes its intersection with `completion_mask`. `step`: optimiser steps so far."""
        ...


def all_tokens(batch: RolloutBatch, step: int) -> Tensor:
    """The loss mask of GRPO: every completion token."""
    return batch.completion_mask


class Sampler:
    """The rollout of GRPO: independent samples of the policy, each prompt encoded once.

    Args:
        max_completion_length: tokens after which a completion is cut off.
        eos_token_id: the id, or ids, that end a completion.
        temperature, top_p, top_k: as in `stemma.models.rollout.generate_groups`.
    """

    def __init__(
        self,
        *,
        max_completion_length: int,
        eos_token_id: int | Sequence[int] | None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> None:
        self._options: dict[str, Any] = {
            "max_new_tokens": max_completion_length,
            "eos_token_id": eos_token_id,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
        }

    def __call__(self, model: nn.Module, rows: Sequence[Row], num_generations: int, seed: int) -> RolloutBatch:
        from stemma.models.rollout import generate_groups

        prompts = [list(row["prompt_ids"]) for row in rows]
        sampled = generate_groups(model, prompts, num_generations=num_generations, seed=seed, **self._options)
        completions = [torch.tensor(ids) for group in sampled.completions for ids in group]
        lengths = torch.tensor([len(ids) for ids in completions])
        pad = torch.nn.utils.rnn.pad_sequence
        return RolloutBatch(
            prompt_ids=prompts,
            group_id=torch.arange(len(prompts)).repeat_interleave(num_generations),
            completion_ids=pad(completions, batch_first=True),
            completion_mask=torch.arange(int(lengths.max())) < lengths[:, None],
            truncated=~torch.tensor([flag for group in sampled.finished for flag in group]),
            forced_len=torch.zeros(len(completions), dtype=torch.int64),
            sampling_logprobs=pad([x.float() for group in sampled.logprobs for x in group], batch_first=True),
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


def score_completions(
    rewards: Sequence[Reward], rows: Sequence[Row], batch: RolloutBatch, decode: Callable[[list[int]], str]
) -> list[list[float | None]]:
    """The value of every reward function for every completion.

    Args:
        rewards: reward functions, called with one entry per completion in every argument.
        rows: one row per prompt of the batch.
        decode: token ids to text.

    Returns:
        Per function, N values; None where it cannot score the completion.

    Raises:
        InvalidDataError: a function raised, or returned the wrong number of values, NaN, an infinity or something that
            is no number. The message names the function and the sample.
    """
    completion_ids = batch.completions()
    group = batch.group_id.tolist()
    prompts = [str(row["prompt"]) if "prompt" in row else decode(list(row["prompt_ids"])) for row in rows]
    arguments: dict[str, list[Any]] = {
        "prompts": [prompts[g] for g in group],
        "completions": [decode(ids) for ids in completion_ids],
        "completion_ids": completion_ids,
    }
    for name in dict.fromkeys(key for row in rows for key in row if key not in ("prompt", *arguments)):
        arguments[name] = [rows[g].get(name) for g in group]
    return [_call_reward(function, arguments) for function in rewards]


def _call_reward(function: Reward, arguments: dict[str, list[Any]]) -> list[float | None]:
    name, expected = getattr(function, "__name__", type(function).__name__), len(arguments["completions"])
    try:
        values = list(function(**arguments))
    except Exception as error:
        culprit = _first_failing(function, arguments)
        raise InvalidDataError(
            f"reward function '{name}' raised {type(error).__name__}: {error}; {culprit}. Return None for a completion "
            "that cannot be scored"
        ) from error
    if len(values) != expected:
        raise InvalidDataError(
            f"reward function '{name}' returned {len(values)} values for {expected} completions; return one each"
        )
    result: list[float | None] = []
    for index, value in enumerate(values):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise InvalidDataError(
                f"reward function '{name}' returned {value!r} for {_sample(arguments, index)}; return a finite number, "
                "or None for a completion that cannot be scored"
            )
        result.append(number)
    return result


def _first_failing(function: Reward, arguments: dict[str, list[Any]]) -> str:
    """Call the function on one completion at a time to name the sample that it fails on."""
    for index in range(len(arguments["completions"])):
        try:
            function(**{name: [values[index]] for name, values in arguments.items()})
        except Exception:
            return f"it fails on {_sample(arguments, index)}"
    return "it fails only on the whole batch, on no single sample"


def _sample(arguments: dict[str, list[Any]], index: int) -> str:
    prompt = arguments["prompts"][index]
    return f"sample {index} (prompt ends {prompt[-40:]!r}, completion {arguments['completions'][index][:80]!r})"


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

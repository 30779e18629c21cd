"""Sampling several continuations of each prompt while the prompt is encoded once.

The one primitive behind every rollout: continue the given token ids, `num_generations` times each, ids in and ids out.
The keys and values of a prompt are computed once and repeated for its continuations; all groups advance together, and
a row leaves the batch, cache included, as soon as it has emitted an end-of-sequence token.

Every row owns its random numbers (one uniform number per position, drawn from the seed before sampling starts), so a
result does not depend on how rows are batched or on which rows finish first. Beginnings can be forced: a row then takes
the given tokens, and their log-probabilities, before it samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from stemma.decode.loop import Decoder
from stemma.decode.sampling import StopCondition, TokenSampler
from stemma.errors import InvalidBatchError
from stemma.models.adapter import in_mode
from stemma.models.limits import check_prompts, vocabulary_size
from stemma.models.support import refuse_adapters_of_rows
from stemma.models.tokens import as_id_list, end_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Forced", "Generator", "LocalGenerator", "Rollouts", "check_counts", "checked_forced", "generate_groups"]

Forced = Sequence[Sequence[Sequence[int]]]
"""`forced[b][g]`: token ids that continuation `g` of prompt `b` begins with."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Continuations of B prompts, G of each.

    Attributes:
        prompts: B lists of token ids, as given.
        completions: B lists of G lists of token ids: the forced beginning, then what was sampled, the end-of-sequence
            token included where there is one.
        logprobs: B lists of G tensors, (length of the completion,), on the CPU, float32 (float64 for a float64
            model): log-probability of each token, sampled or forced, under the softmax at the sampling temperature over
            the whole vocabulary, that is before `top_k` and `top_p`; at temperature 0 under the plain softmax.
        finished: B lists of G flags: whether the completion ended by itself, with an end-of-sequence token or a stop
            string (else it was cut off).
        forced_lengths: B lists of G numbers: leading tokens of the completion that were forced.
        prefilled_tokens: prompt tokens that went through the model (shared ones once, padding not counted).
        decoded_tokens: completion tokens that went through the model, forced ones included (the last one of a row never
            does).
    """

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    logprobs: list[list[Tensor]]
    finished: list[list[bool]]
    forced_lengths: list[list[int]]
    prefilled_tokens: int
    decoded_tokens: int

    @property
    def sampled_tokens(self) -> int:
        """Number of sampled tokens, end-of-sequence tokens included, forced ones not."""
        lengths = sum(len(completion) for group in self.completions for completion in group)
        return lengths - sum(map(sum, self.forced_lengths))


class Generator(Protocol):
    """Continues prompts: the model of this process, or a server that holds a copy of it."""

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        /,
        *,
        num_generations: int,
        max_new_tokens: int,
        seed: int | Sequence[int],
        forced: Forced | None = None,
    ) -> Rollouts:
        """`num_generations` continuations of every prompt; the arguments are those of `generate_groups`."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalGenerator:
    """Samples from the model itself, with `generate_groups`; the attributes are its options of the same names."""

    eos_token_id: int | Sequence[int] | Literal["model"] | None = "model"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_strings: str | Sequence[str] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        TokenSampler(self.temperature, self.top_p, self.top_k)  # refuses wrong options before a model is at work
        StopCondition([], self.stop_strings, self.tokenizer)
        check_counts(max_batch_size=self.max_batch_size)

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        /,
        *,
        num_generations: int,
        max_new_tokens: int,
        seed: int | Sequence[int],
        forced: Forced | None = None,
    ) -> Rollouts:
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return generate_groups(
            model,
            prompts,
            num_generations=num_generations,
            max_new_tokens=max_new_tokens,
            seed=seed,
            forced=forced,
            **options,
        )


@torch.no_grad()
def generate_groups(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_generations: int,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | Literal["model"] | None = "model",
    pad_token_id: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    forced: Forced | None = None,
    seed: int | Sequence[int] = 0,
    max_batch_size: int | None = None,
) -> Rollouts:
    """Sample `num_generations` continuations of every prompt.

    The model runs in evaluation mode, without gradients; afterwards every module is back in the mode it was in. The
    global random state is not touched.

    Args:
        model: a Hugging Face causal language model, or a PEFT model around one; enabled for shared prefixes or not.
        prompts: B non-empty lists of token ids, of any lengths.
        num_generations: continuations per prompt (G).
        max_new_tokens: a row is cut off after so many tokens, forced ones included.
        eos_token_id: the id (or ids) that ends a row; "model" for those of the model's generation config and of the
            tokenizer, if one is given; None lets every row run to `max_new_tokens`.
        pad_token_id: id that fills the left of shorter prompts; it is masked, so any id of the vocabulary will do.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample from the smallest set of most likely tokens whose probability reaches `top_p`, in (0, 1].
        top_k: sample from the `top_k` most likely tokens; 0 means all.
        stop_strings: a row ends with the token that completes one of them in its sampled text.
        tokenizer: the model's, needed with `stop_strings`.
        forced: B lists of G lists of token ids, which the continuations begin with. An end-of-sequence token among
            them ends its row there, and what follows it is dropped.
        seed: decides every random choice together with the index of the row. With B seeds, one for each prompt, the
            samples of a prompt do not depend on which other prompts are in the call.
        max_batch_size: most rows to decode at a time (whole groups; at least one); None decodes all together.

    Raises:
        InvalidBatchError: a prompt is empty, has an id outside the vocabulary, or is too long for the model; forced
            beginnings of another number of prompts or continuations, with such an id, or above `max_new_tokens`.
        UnsupportedModelError: the model keeps no cache, or one that cannot be repeated (recurrent states); an adapter
            of peft that depends on the whole row (learned tokens, activated LoRA).
        ValueError: a sampling option is outside its range.
        NonFiniteError: the model's logits are not numbers.
    """
    check_counts(num_generations=num_generations, max_new_tokens=max_new_tokens, max_batch_size=max_batch_size)
    sampler = TokenSampler(temperature, top_p, top_k)
    refuse_adapters_of_rows(model)
    prompt_ids = [[int(token) for token in prompt] for prompt in prompts]
    check_prompts(model, prompt_ids, max_new_tokens)
    eos_ids = end_token_ids(model, tokenizer) if eos_token_id == "model" else as_id_list(eos_token_id)
    stop = StopCondition(eos_ids, stop_strings, tokenizer)
    forced_ids = checked_forced(
        forced, len(prompt_ids), num_generations, max_new_tokens, eos_ids, vocabulary_size(model)
    )
    uniform_BGT = _uniform(seed, len(prompt_ids), num_generations, max_new_tokens)
    groups_at_once = len(prompt_ids) if max_batch_size is None else max(1, max_batch_size // num_generations)

    decoder = Decoder(model, sampler, stop, pad_token_id)
    with in_mode(model, training=False):
        for first in range(0, len(prompt_ids), groups_at_once):
            chunk = slice(first, first + groups_at_once)
            decoder(prompt_ids[chunk], [ids for group in forced_ids[chunk] for ids in group], uniform_BGT[chunk])
    starts = range(0, len(decoder.completions), num_generations)
    groups = [slice(start, start + num_generations) for start in starts]
    return Rollouts(
        prompts=prompt_ids,
        completions=[decoder.completions[group] for group in groups],
        logprobs=[decoder.logprobs[group] for group in groups],
        finished=[decoder.finished[group] for group in groups],
        forced_lengths=[[len(ids) for ids in group] for group in forced_ids],
        prefilled_tokens=decoder.prefilled_tokens,
        decoded_tokens=sum(len(completion) - 1 for completion in decoder.completions),
    )


def _uniform(seed: int | Sequence[int], *shape: int) -> Tensor:
    """The uniform random numbers (B, G, T) of all rows, float64."""
    if isinstance(seed, int):
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if len(seed) != shape[0]:
        raise ValueError(f"seed must be one number or one for each of the {shape[0]} prompts, got {len(seed)}")
    rows = [torch.rand(shape[1:], generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seed]
    return torch.stack(rows)


def check_counts(**counts: int | None) -> None:
    """Raise a ValueError that names a count below 1; None is no count."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def checked_forced(
    forced: Forced | None,
    num_prompts: int,
    num_generations: int,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    vocab_size: int,
) -> list[list[list[int]]]:
    """The forced beginnings of every continuation, cut behind their first end-of-sequence token.

    Raises:
        InvalidBatchError: see `generate_groups`.
    """
    if forced is None:
        return [[[] for _ in range(num_generations)] for _ in range(num_prompts)]
    if len(forced) != num_prompts or any(len(group) != num_generations for group in forced):
        raise InvalidBatchError(
            f"forced has {len(forced)} groups of {sorted({len(group) for group in forced})} beginnings; expected one "
            f"per continuation: {num_prompts} groups of {num_generations} (an empty list forces nothing)"
        )
    checked: list[list[list[int]]] = []
    for index, group in enumerate(forced):
        checked.append([])
        for beginning in group:
            ids = [int(token) for token in beginning]
            wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
            if wrong is not None:
                raise InvalidBatchError(
                    f"a forced beginning of prompt {index} has token id {wrong}, outside the vocabulary of {vocab_size}"
                )
            end = next((position + 1 for position, token in enumerate(ids) if token in eos_ids), len(ids))
            if end > max_new_tokens:
                raise InvalidBatchError(
                    f"a forced beginning of prompt {index} has {end} tokens, more than "
                    f"max_new_tokens={max_new_tokens}; shorten it or raise max_new_tokens"
                )
            checked[-1].append(ids[:end])
    return checked

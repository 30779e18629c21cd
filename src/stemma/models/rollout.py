"""Sampling several continuations of each prompt while the prompt is encoded once.

The one primitive behind every rollout: continue the given token ids, `num_generations` times each, ids in and ids out.
The keys and values of a prompt are computed once and repeated for its continuations; all groups advance together, and
a row leaves the batch, cache included, as soon as it has emitted an end-of-sequence token.

Every row owns its random numbers (one uniform number per position, drawn from the seed before sampling starts), so a
result does not depend on how rows are batched or on which rows finish first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from stemma.errors import InvalidBatchError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Continuations of B prompts, G of each.

    Attributes:
        prompts: B lists of token ids, as given.
        completions: B lists of G lists of sampled token ids, the end-of-sequence token included where one was emitted.
        logprobs: B lists of G tensors, (length of the completion,), on the CPU, float32 (float64 for a float64
            model): log-probability of each sampled token under the softmax at the sampling temperature over the whole
            vocabulary, that is before `top_k` and `top_p`; at temperature 0 under the plain softmax.
        finished: B lists of G flags: whether the completion ends with an end-of-sequence token (else it was cut off).
        prefilled_tokens: prompt tokens that went through the model (each prompt once, padding not counted).
        decoded_tokens: sampled tokens that went through the model (the last one of a row never does).
    """

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    logprobs: list[list[Tensor]]
    finished: list[list[bool]]
    prefilled_tokens: int
    decoded_tokens: int

    @property
    def sampled_tokens(self) -> int:
        """Number of sampled tokens, end-of-sequence tokens included."""
        return sum(len(completion) for group in self.completions for completion in group)


@torch.no_grad()
def generate_groups(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_generations: int,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    max_batch_size: int | None = None,
) -> Rollouts:
    """Sample `num_generations` continuations of every prompt.

    The model runs in evaluation mode, without gradients; afterwards every module is back in the mode it was in. The
    global random state is not touched.

    Args:
        model: a Hugging Face causal language model, or a PEFT model around one; enabled for shared prefixes or not.
        prompts: B non-empty lists of token ids, of any lengths.
        num_generations: continuations per prompt (G).
        max_new_tokens: a row is cut off after so many sampled tokens.
        eos_token_id: the id (or ids) that ends a row; None lets every row run to `max_new_tokens`.
        pad_token_id: id that fills the left of shorter prompts; it is masked, so any id of the vocabulary will do.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample from the smallest set of most likely tokens whose probability reaches `top_p`, in (0, 1].
        top_k: sample from the `top_k` most likely tokens; 0 means all.
        seed: decides every random choice together with the index of the row.
        max_batch_size: most rows to decode at a time (whole groups; at least one); None decodes all together.

    Raises:
        InvalidBatchError: a prompt is empty, has an id outside the vocabulary, or is too long for the model.
        UnsupportedModelError: the model keeps no cache, or one that cannot be repeated (recurrent states).
        ValueError: a sampling option is outside its range.
        FloatingPointError: the model's logits are not numbers.
    """
    _check_options(num_generations, max_new_tokens, temperature, top_p, top_k, max_batch_size)
    prompt_ids = [[int(token) for token in prompt] for prompt in prompts]
    _check_prompts(model, prompt_ids, max_new_tokens)
    eos_ids = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    generator = torch.Generator().manual_seed(seed)
    uniform_BGT = torch.rand(len(prompt_ids), num_generations, max_new_tokens, generator=generator, dtype=torch.float64)
    sampler = _Sampler(temperature=temperature, top_p=top_p, top_k=top_k)
    groups_at_once = len(prompt_ids) if max_batch_size is None else max(1, max_batch_size // num_generations)

    completions: list[list[list[int]]] = []
    logprobs: list[list[Tensor]] = []
    with _evaluation_mode(model):
        for first in range(0, len(prompt_ids), groups_at_once):
            chunk = slice(first, first + groups_at_once)
            ids, values = _continue(model, prompt_ids[chunk], uniform_BGT[chunk], sampler, eos_ids, pad_token_id)
            for start in range(0, len(ids), num_generations):
                completions.append(ids[start : start + num_generations])
                logprobs.append(values[start : start + num_generations])
    finished = [[completion[-1] in eos_ids for completion in group] for group in completions]
    return Rollouts(
        prompts=prompt_ids,
        completions=completions,
        logprobs=logprobs,
        finished=finished,
        prefilled_tokens=sum(len(prompt) for prompt in prompt_ids),
        decoded_tokens=sum(len(completion) - 1 for group in completions for completion in group),
    )


def _continue(
    model: PreTrainedModel,
    prompts: list[list[int]],
    uniform_BGT: Tensor,
    sampler: _Sampler,
    eos_ids: list[int],
    pad_token_id: int,
) -> tuple[list[list[int]], list[Tensor]]:
    """Token ids and log-probabilities of B * G rows, group by group."""
    device = next(model.parameters()).device
    num_generations, max_new_tokens = uniform_BGT.shape[1:]
    uniform_NT = uniform_BGT.flatten(0, 1).to(device)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths_B.max())
    ids_BP = torch.full((len(prompts), longest), pad_token_id, device=device)
    for row, prompt in enumerate(prompts):
        ids_BP[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
    mask_BP = (torch.arange(longest, device=device) >= longest - lengths_B[:, None]).long()

    forward = _Forward(model)
    logits_BV, cache = forward(ids_BP, mask_BP, (mask_BP.cumsum(1) - 1).clamp(min=0), None)
    _repeat(cache, num_generations, room=max_new_tokens)
    logits_NV = logits_BV.repeat_interleave(num_generations, 0)
    mask_NL = mask_BP.repeat_interleave(num_generations, 0)
    lengths_N = lengths_B.repeat_interleave(num_generations, 0)

    tokens_NT = torch.full((len(lengths_N), max_new_tokens), -1, device=device)
    logprobs_NT = torch.zeros(tokens_NT.shape, dtype=_sampling_dtype(logits_NV), device=device)
    eos = torch.tensor(eos_ids, dtype=torch.int64, device=device)
    rows = torch.arange(len(lengths_N), device=device)  # the rows that are still in the batch
    for step in range(max_new_tokens):
        tokens, values = sampler(logits_NV, uniform_NT[rows, step])
        tokens_NT[rows, step], logprobs_NT[rows, step] = tokens, values
        alive = (~torch.isin(tokens, eos)).nonzero().squeeze(1)
        if step + 1 == max_new_tokens or not len(alive):
            break
        if len(alive) < len(rows):
            cache.batch_select_indices(alive)
            rows, tokens, mask_NL = rows[alive], tokens[alive], mask_NL[alive]
        mask_NL = torch.cat([mask_NL, mask_NL.new_ones(len(rows), 1)], 1)
        logits_NV, cache = forward(tokens[:, None], mask_NL, (lengths_N[rows] + step)[:, None], cache)

    counts = (tokens_NT >= 0).sum(1).tolist()
    tokens_host, logprobs_host = tokens_NT.tolist(), logprobs_NT.cpu()
    return (
        [row[:count] for row, count in zip(tokens_host, counts)],
        [logprobs_host[row, :count].clone() for row, count in enumerate(counts)],
    )


class _Forward:
    """One step of the model: the logits of the last position and the grown cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.accepted = inspect.signature(base.forward).parameters

    def __call__(
        self, ids_NL: Tensor, mask_NL: Tensor, positions_NL: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Cache]:
        # Not every type takes positions (some derive them from the mask) or can skip the logits of a prompt.
        optional = {"position_ids": positions_NL, "logits_to_keep": 1}
        output = self.model(
            input_ids=ids_NL,
            attention_mask=mask_NL,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self.accepted},
        )
        cache = getattr(output, "past_key_values", None)
        if not isinstance(cache, Cache):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} returned a cache of type {type(cache).__name__}, which cannot be "
                "repeated for the samples of a prompt; use a model that fills a transformers cache"
            )
        return output.logits[:, -1], cache


class _RoomyLayer(DynamicLayer):
    """Keys and values (N, K, L, D) of one layer with room for what is still to come.

    A `DynamicLayer` copies everything it holds for every new token, which costs more than the model itself where
    prompts are long; this one writes the new token behind the others.
    """

    def __init__(self, layer: DynamicLayer, repeats: int, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.length = layer.get_seq_length()
        self.key_room, self.value_room = (
            torch.nn.functional.pad(states, (0, 0, 0, room)).repeat_interleave(repeats, 0)
            for states in (layer.keys, layer.values)
        )
        self._show()

    def _show(self) -> None:
        self.keys, self.values = self.key_room[:, :, : self.length], self.value_room[:, :, : self.length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[2]
        self.key_room[:, :, start : self.length] = key_states
        self.value_room[:, :, start : self.length] = value_states
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.key_room, self.value_room = self.key_room[indices], self.value_room[indices]
        self._show()


def _repeat(cache: Cache, repeats: int, room: int) -> None:
    """Repeat every row of the cache in place, leaving room for so many more tokens where the layer keeps them all."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = _RoomyLayer(layer, repeats, room)
        elif isinstance(layer, DynamicLayer):  # such as a sliding window, which bounds its own size
            layer.batch_repeat_interleave(repeats)
        else:
            raise UnsupportedModelError(
                f"layer {index} keeps a {type(layer).__name__}, which cannot be repeated for the samples of a prompt; "
                "use a model whose layers all cache keys and values"
            )


@dataclass(frozen=True, slots=True)
class _Sampler:
    temperature: float
    top_p: float
    top_k: int

    def __call__(self, logits_NV: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
        """Sampled token ids (N,) int64 and their log-probabilities (N,), from logits and one uniform number per row."""
        logits_NV = logits_NV.to(_sampling_dtype(logits_NV))
        if self.temperature > 0:
            logits_NV = logits_NV / self.temperature
        logprobs_NV = logits_NV.log_softmax(-1)
        if logprobs_NV.isnan().any():
            raise FloatingPointError(
                "the model's logits are not finite while sampling: its weights have diverged or its precision is too "
                "low; lower the learning rate, or load the model in float32"
            )
        if self.temperature == 0:
            tokens = logits_NV.argmax(-1)
        else:
            # Inverse transform sampling, accumulated in float64: rounding never picks a token of probability zero.
            cumulative_NV = self._kept_probabilities(logprobs_NV).double().cumsum(-1)
            threshold_N1 = uniform_N[:, None] * cumulative_NV[:, -1:]
            # A float64 below 1 times the total may round up to the total, which no entry exceeds.
            threshold_N1 = torch.minimum(threshold_N1, cumulative_NV[:, -1:] * (1 - 2**-52))
            tokens = torch.searchsorted(cumulative_NV, threshold_N1, right=True).squeeze(1)
        return tokens, logprobs_NV.gather(1, tokens[:, None]).squeeze(1)

    def _kept_probabilities(self, logprobs_NV: Tensor) -> Tensor:
        """Probabilities (N, V), zero outside the top `top_k`, and then outside the nucleus of mass `top_p`."""
        kept_NV = logprobs_NV
        if 0 < self.top_k < kept_NV.shape[1]:
            least_N1 = kept_NV.topk(self.top_k, dim=-1).values[:, -1:]
            kept_NV = kept_NV.masked_fill(kept_NV < least_N1, float("-inf"))
        probabilities_NV = kept_NV.softmax(-1)
        if self.top_p < 1:
            sorted_NV, order_NV = probabilities_NV.sort(dim=-1, descending=True, stable=True)
            # A token is kept while the mass before it is below top_p, so the most likely one always is.
            outside_NV = sorted_NV.cumsum(-1) - sorted_NV >= self.top_p
            probabilities_NV = torch.zeros_like(sorted_NV).scatter(1, order_NV, sorted_NV.masked_fill(outside_NV, 0))
        return probabilities_NV


def _sampling_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check_options(
    num_generations: int, max_new_tokens: int, temperature: float, top_p: float, top_k: int, max_batch_size: int | None
) -> None:
    for name, value in (("num_generations", num_generations), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (all tokens) or positive, got {top_k}")
    if max_batch_size is not None and max_batch_size < 1:
        raise ValueError(f"max_batch_size must be None or at least 1, got {max_batch_size}")


def _check_prompts(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> None:
    if not prompts:
        raise InvalidBatchError("there are no prompts to continue; pass at least one list of token ids")
    vocab_size = model.get_input_embeddings().num_embeddings
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise InvalidBatchError(f"prompt {index} is empty; a continuation needs at least one token to start from")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            raise InvalidBatchError(f"prompt {index} has token id {wrong}, outside the vocabulary of {vocab_size}")
        if positions is not None and len(prompt) + max_new_tokens > positions:
            raise InvalidBatchError(
                f"prompt {index} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} it exceeds the model's "
                f"{positions} positions. Shorten the prompt or lower max_new_tokens"
            )

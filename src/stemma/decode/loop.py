"""The decoding loop behind `stemma.decode.rollout`: prompts encoded once, rows that leave as soon as they end.

Where the model can, all rows decode over one tree of prompts (`stemma.decode.shared_cache`), with the attention
that scores and trains. Elsewhere the prompt's keys and values are repeated for each row, in buffers that grow in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from stemma.decode.sampling import StopCondition, TokenSampler, sampling_dtype
from stemma.decode.shared_cache import SharedPrefixCache
from stemma.errors import UnsupportedModelError
from stemma.models.adapter import base_model, is_enabled
from stemma.models.limits import dynamic_rope_limit
from stemma.scoring.enable import while_enabled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Decoder", "shared_prefixes"]

_MAX_LOGITS = 2**26
"""Most logits to hold at a time for the log-probabilities of forced tokens."""


class Decoder:
    """Decodes the rows of some groups together, one call after the other; its results are lists over all rows so far.

    Attributes:
        completions: token ids of each row.
        logprobs: (length of the completion,) log-probabilities of its tokens, on the CPU.
        finished: whether it ended by itself.
        prefilled_tokens: prompt tokens that went through the model.
    """

    def __init__(self, model: PreTrainedModel, sampler: TokenSampler, stop: StopCondition, pad_token_id: int) -> None:
        self.forward, self.sampler, self.stop, self.pad_token_id = _Forward(model), sampler, stop, pad_token_id
        self.device = next(model.parameters()).device
        self.completions: list[list[int]] = []
        self.logprobs: list[Tensor] = []
        self.finished: list[bool] = []
        self.prefilled_tokens = 0

    def __call__(self, prompts: list[list[int]], beginnings: list[list[int]], uniform_BGT: Tensor) -> None:
        """Decode G rows of each prompt, with the forced beginning and the random numbers of each row."""
        samples = uniform_BGT.shape[1]
        with shared_prefixes(self.forward.model, max(map(len, prompts)) + uniform_BGT.shape[2]) as shared:
            parts = [list(range(len(prompts)))]
            if not shared and len(set(map(len, prompts))) > 1 and not self.forward.sees_through_padding():
                lengths = {len(prompt): None for prompt in prompts}
                parts = [[i for i, prompt in enumerate(prompts) if len(prompt) == length] for length in lengths]
            rows: dict[int, tuple[list[int], Tensor, bool]] = {}
            for part in parts:
                numbers = [index * samples + sample for index in part for sample in range(samples)]
                own = [beginnings[row] for row in numbers]
                rows |= zip(numbers, self._decode(shared, [prompts[i] for i in part], own, uniform_BGT[part]))
        for row in range(len(rows)):
            for results, value in zip((self.completions, self.logprobs, self.finished), rows[row]):
                results.append(value)  # type: ignore[attr-defined]

    def _decode(
        self, shared: bool, prompts: list[list[int]], beginnings: list[list[int]], uniform_BGT: Tensor
    ) -> Iterator[tuple[list[int], Tensor, bool]]:
        """Completion, log-probabilities and end of every row."""
        device, longest = self.device, max(map(len, prompts))
        max_new_tokens = uniform_BGT.shape[2]
        uniform_NT = uniform_BGT.flatten(0, 1).to(device)
        forced_NT = torch.full((len(beginnings), max_new_tokens), -1, device=device)
        for row, ids in enumerate(beginnings):
            forced_NT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64, device=device)
        logits_NV, cache, lengths_N = self._prefill(shared, prompts, uniform_BGT.shape[1], max_new_tokens)
        mask_NL = torch.arange(longest + max_new_tokens, device=device) >= longest - lengths_N[:, None]
        mask_NL = mask_NL.long()

        tokens_NT = torch.full(forced_NT.shape, -1, device=device)
        logprobs_NT = torch.zeros(tokens_NT.shape, dtype=sampling_dtype(logits_NV), device=device)
        finished_N = torch.zeros(len(tokens_NT), dtype=torch.bool, device=device)

        # What every row begins with goes through the model together, but for one token: that one may end a row.
        first = max(min(map(len, beginnings)) - 1, 0)
        tokens_NT[:, :first] = forced_NT[:, :first]
        width = max(1, _MAX_LOGITS // logits_NV.numel())
        for start in range(0, first, width):
            ids_NC = forced_NT[:, start : min(start + width, first)]
            stop = start + ids_NC.shape[1]
            positions_NC = lengths_N[:, None] + torch.arange(start, stop, device=device)
            logits_NCV, cache = self.forward(ids_NC, mask_NL[:, : longest + stop], positions_NC, cache, stop - start)
            before_NCV = torch.cat([logits_NV[:, None], logits_NCV[:, :-1]], 1)
            logprobs_NT[:, start:stop] = self.sampler.logprobs(before_NCV).gather(2, ids_NC[:, :, None]).squeeze(2)
            logits_NV = logits_NCV[:, -1]

        rows = torch.arange(len(tokens_NT), device=device)  # the rows that are still in the batch
        for step in range(first, max_new_tokens):
            tokens, values = self.sampler(logits_NV, uniform_NT[rows, step], forced_NT[rows, step])
            tokens_NT[rows, step], logprobs_NT[rows, step] = tokens, values
            ended = self.stop(tokens_NT[rows, : step + 1], forced_NT[rows, : step + 1])
            finished_N[rows] = ended
            alive = (~ended).nonzero().squeeze(1)
            if step + 1 == max_new_tokens or not len(alive):
                break
            if len(alive) < len(rows):
                cache.batch_select_indices(alive)
                rows, tokens, mask_NL = rows[alive], tokens[alive], mask_NL[alive]
            positions_N1 = (lengths_N[rows] + step)[:, None]
            logits_N1V, cache = self.forward(tokens[:, None], mask_NL[:, : longest + step + 1], positions_N1, cache, 1)
            logits_NV = logits_N1V[:, 0]

        counts = (tokens_NT >= 0).sum(1).tolist()
        completions = [row[:count] for row, count in zip(tokens_NT.tolist(), counts)]
        logprobs = [row[:count].clone() for row, count in zip(logprobs_NT.cpu(), counts)]
        return zip(completions, logprobs, finished_N.tolist())

    def _prefill(
        self, shared: bool, prompts: list[list[int]], num_generations: int, room: int
    ) -> tuple[Tensor, Cache, Tensor]:
        """Last logits (N, V), cache and length (N,) of the prompt of every row; equal prompts are encoded once."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        number = {prompt: index for index, prompt in enumerate(distinct)}
        source_B = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=self.device)
        source_N = source_B.repeat_interleave(num_generations)
        lengths_B = torch.tensor([len(prompt) for prompt in distinct], device=self.device)
        longest = int(lengths_B.max())
        ids_BP = torch.full((len(distinct), longest), self.pad_token_id, device=self.device)
        for index, prompt in enumerate(distinct):
            ids_BP[index, longest - len(prompt) :] = torch.tensor(prompt, device=self.device)
        mask_BP = (torch.arange(longest, device=self.device) >= longest - lengths_B[:, None]).long()
        positions_BP = (mask_BP.cumsum(1) - 1).clamp(min=0)
        tree = self._tree([distinct[i] for i in source_N.tolist()], room + 1) if shared else None
        if tree is not None:
            sources = source_N.tolist()
            self.prefilled_tokens += tree.prefilled_tokens + len(distinct)
            # The tree is planned for all rows, and each prompt's last token fed once for all of its rows.
            tree.batch_select_indices(torch.tensor([sources.index(i) for i in range(len(distinct))]))
            logits_B1V, cache = self.forward(ids_BP[:, -1:], mask_BP, positions_BP[:, -1:], tree, 1)
            cache.batch_select_indices(source_N)
        else:
            self.prefilled_tokens += sum(map(len, distinct))
            logits_B1V, cache = self.forward(ids_BP, mask_BP, positions_BP, None, 1)
            _spread(cache, source_N, room)
        return logits_B1V[source_N, 0], cache, lengths_B[source_N]

    def _tree(self, prompts: list[tuple[int, ...]], room: int) -> SharedPrefixCache | None:
        """The tree of the rows' prompts; None for a model that scores over trees and cannot keep one."""
        try:
            tree = SharedPrefixCache.of(self.forward.model, prompts, room=room)
        except UnsupportedModelError:
            if "position_ids" not in self.forward.accepted:
                raise
            return None
        tree.positions_given = True
        return tree


_exact: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Whether a model passes the self-test of `enable`."""

_sees_through: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Whether padding changes nothing in a model's rows; see `_Forward.sees_through_padding`."""


@contextmanager
def shared_prefixes(model: PreTrainedModel, longest: int) -> Iterator[bool]:
    """Whether sequences of up to `longest` tokens decode over a tree of prompts; the model is enabled meanwhile.

    They do not on devices other than the CPU (whose fused kernel is the only one used here), where the rotary
    frequencies depend on the length, and in types that `enable` refuses.
    """
    inner = base_model(model)
    limit = dynamic_rope_limit(model)
    suitable = next(model.parameters()).device.type == "cpu" and (limit is None or longest <= limit)
    with ExitStack() as stack:
        if suitable and (is_enabled(model) or _exact.get(inner, True)):
            untested = not is_enabled(model) and inner not in _exact
            try:
                stack.enter_context(while_enabled(model, self_test=untested))
            except UnsupportedModelError:
                _exact[inner] = False
            else:
                if untested:
                    _exact[inner] = True
        yield suitable and is_enabled(model)


class _Forward:
    """One step of the model: the logits (N, keep, V) of the last positions and the grown cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.accepted = inspect.signature(base.forward).parameters

    def sees_through_padding(self) -> bool:
        """Whether padding on the left changes nothing; some types count positions by column, whatever they are told.

        Found out once for each model, with a row of three tokens.
        """
        inner = base_model(self.model)
        if inner not in _sees_through:
            device = next(inner.parameters()).device
            ends = []
            for padding in (0, 3):
                ids = torch.tensor([[0] * padding + [0, 1, 1]], device=device)
                mask = torch.tensor([[0] * padding + [1, 1, 1]], device=device)
                positions = torch.tensor([[0] * padding + [0, 1, 2]], device=device)
                first, cache = self(ids[:, :-1], mask[:, :-1], positions[:, :-1], None, 1)
                second, _ = self(ids[:, -1:], mask, positions[:, -1:], cache, 1)
                ends.append(torch.cat([first, second]))
            alone, padded = ends
            rounding = torch.finfo(alone.dtype).eps ** 0.5
            _sees_through[inner] = bool((padded - alone).norm() <= rounding * alone.norm())
        return _sees_through[inner]

    def __call__(
        self, ids_NL: Tensor, mask_NL: Tensor, positions_NL: Tensor, cache: Cache | None, keep: int
    ) -> tuple[Tensor, Cache]:
        # Not every type takes positions (some derive them from the mask) or can skip the logits of a prompt.
        optional = {"position_ids": positions_NL, "logits_to_keep": keep}
        # Types that can be enabled take them, if only by keyword.
        accepted = {*self.accepted, "position_ids"} if isinstance(cache, SharedPrefixCache) else self.accepted
        output = self.model(
            input_ids=ids_NL,
            attention_mask=mask_NL,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in accepted},
        )
        cache = getattr(output, "past_key_values", None)
        if not isinstance(cache, Cache):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} returned a cache of type {type(cache).__name__}, which cannot be "
                "repeated for the samples of a prompt; use a model that fills a transformers cache"
            )
        return output.logits[:, -keep:], cache


class _RoomyLayer(DynamicLayer):
    """Keys and values (N, K, L, D) of one layer with room for what is still to come.

    A `DynamicLayer` copies everything it holds for every new token, which costs more than the model itself where
    prompts are long; this one writes the new token behind the others.
    """

    def __init__(self, layer: DynamicLayer, source_N: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.length = layer.get_seq_length()
        self.key_room, self.value_room = (
            torch.nn.functional.pad(states, (0, 0, 0, room))[source_N] for states in (layer.keys, layer.values)
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


def _spread(cache: Cache, source_N: Tensor, room: int) -> None:
    """Give every row the states of its prompt, with room for so many more tokens where the layer keeps them all."""
    for index, layer in enumerate(getattr(cache, "layers", [cache])):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = _RoomyLayer(layer, source_N, room)
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):  # a window bounds its own size
            layer.batch_select_indices(source_N)
        else:
            raise UnsupportedModelError(
                f"layer {index} keeps a {type(layer).__name__}, which cannot be repeated for the samples of a prompt; "
                "use a model whose layers all cache keys and values"
            )

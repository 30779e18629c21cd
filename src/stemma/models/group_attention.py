"""Decoding many continuations against one copy of their prompt.

The keys and values of a prompt stay where the prefill put them, once. In each layer all continuations of the prompt
query them in one block, each continuation queries its own tokens in another, and the two answers are merged by
log-sum-exp, which is what one softmax over both would give.

This needs layers that hand their attention to transformers' `AttentionInterface` and mask it causally. Whether they do
is observed while the prompts are encoded; a model with anything else (windows, sinks, biases, attention of its own)
decodes with the prompt repeated for each row instead, and so do devices other than the CPU, where the many small blocks
of this version cost more than they save.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stemma.attention.kernels import block_forward
from stemma.models.adapter import base_model
from stemma.models.layer_attention import KERNEL_PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "groups_of_"
_KNOWN = {"scaling", "dropout", "is_causal", "softcap", "position_ids", "cache_position"}
_running: ContextVar[GroupAttention] = ContextVar("stemma_group_attention")


class GroupAttention:
    """Attention of the rows of some groups, while they decode.

    Args:
        suitable: whether the model dispatches its attention.
        room: tokens that a row will have at most.

    Attributes:
        grouped: this attends in the model's place.
        suitable: nothing in the encoding of the prompts speaks against that so far.
    """

    def __init__(self, suitable: bool, room: int) -> None:
        self.grouped = False
        self.suitable, self._room = suitable, room
        self._seen: dict[int, Tensor] = {}  # keys that each layer attended to when the prompts were encoded
        self._layers: dict[int, _GroupedLayer] = {}
        self._counts: list[int] = []

    def adopt(self, cache: Cache, lengths_B: Tensor, source_N: Tensor) -> bool:
        """Decode against the prompts in the cache from now on; False where that would not be exact, or not pay.

        Args:
            cache: filled by the prompts, left-padded; its layers are replaced.
            lengths_B: their lengths.
            source_N: the prompt of every row.
        """
        sources, counts = source_N.unique_consecutive(return_counts=True)
        exact = self.suitable and all(
            type(layer) is DynamicLayer and layer.is_initialized and self._seen.get(index) is layer.keys
            for index, layer in enumerate(cache.layers)
        )
        self._seen.clear()
        self.suitable = False  # whatever is seen from now on comes too late, and must not be kept
        if not exact or source_N.device.type != "cpu" or len(sources) == len(source_N):
            return False
        self.grouped, self._counts = True, counts.tolist()
        spans = [(source, int(lengths_B[source])) for source in sources.tolist()]
        for index, layer in enumerate(cache.layers):
            cache.layers[index] = self._layers[index] = _GroupedLayer(layer, spans, len(source_N), self._room)
        return True

    def select(self, indices: Tensor) -> None:
        """Keep these rows, ascending; the cache has to be told as well."""
        if self.grouped:
            group_N = torch.arange(len(self._counts)).repeat_interleave(torch.tensor(self._counts))
            self._counts = group_N[indices].bincount(minlength=len(self._counts)).tolist()

    def observe(self, module: nn.Module, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        """Take note of an attention call while the prompts are encoded."""
        if not self.suitable:
            return
        index = getattr(module, "layer_idx", None)
        unknown = [option for name, option in options.items() if name not in _KNOWN]
        harmless = not any(isinstance(option, Tensor) or type(option) in (int, float) for option in unknown)
        causal = getattr(module, "is_causal", True) and options.get("is_causal") is not False
        harmless &= not hasattr(module, KERNEL_PREFIX)
        if index is None or index in self._seen or not harmless or not causal or key.shape != value.shape:
            self.suitable = False
        else:
            self._seen[index] = key

    def attend(self, module: nn.Module, query: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        """(N, C, heads, head_dim) from queries (N, heads, C, head_dim)."""
        layer = self._layers[module.layer_idx]  # type: ignore[index]
        options: dict[str, Any] = {"scale": query.shape[-1] ** -0.5 if scale is None else scale, "softcap": softcap}
        rows, heads, chunk, _ = query.shape
        stacked = query.transpose(0, 1)  # (heads, N, C, head_dim)
        answers, start = [], 0
        for count, (key, value) in zip(self._counts, layer.prompts, strict=True):
            if count:
                block = stacked[:, start : start + count].reshape(1, heads, count * chunk, -1)
                answers.append(block_forward(block, key, value, causal=False, **options))
                start += count
        output = torch.cat([part for part, _ in answers], 2).reshape(heads, rows, chunk, -1).transpose(0, 1)
        total = torch.cat([part for _, part in answers], 2).reshape(heads, rows, chunk).transpose(0, 1)

        own, length = (layer.keys, layer.values), layer.length
        blocks = [(slice(0, length), False)]
        if chunk > 1:  # what was there before this call, and the call's own tokens among themselves
            blocks = [(slice(0, length - chunk), False), (slice(length - chunk, length), True)]
        for span, causal in blocks:
            if span.stop > span.start:
                key, value = (states[:, :, span] for states in own)
                output, total = _merge(output, total, *block_forward(query, key, value, causal=causal, **options))
        return output.transpose(1, 2).contiguous()


def _merge(output: Tensor, total: Tensor, other: Tensor, other_total: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over two sets of keys from that over each, with their log-sum-exps."""
    share = torch.sigmoid(other_total - total)[..., None].to(output.dtype)
    return torch.lerp(output, other, share), torch.logaddexp(total, other_total)


class _GroupedLayer(DynamicLayer):
    """Keys and values of one layer: of each prompt once, and of what each row has added.

    Attributes:
        prompts: for each group keys and values (1, K, P, D).
        keys, values: (N, K, L, D) of the rows' own tokens.
        length: L.
    """

    def __init__(self, layer: DynamicLayer, spans: list[tuple[int, int]], rows: int, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.prompts = [
            tuple(states[source : source + 1, :, -length:] for states in (layer.keys, layer.values))
            for source, length in spans
        ]
        self.padded, self.length = layer.get_seq_length(), 0
        _, heads, _, dim = layer.keys.shape
        self.key_room, self.value_room = (states.new_empty(rows, heads, room, dim) for states in (layer.keys,) * 2)
        self._show()

    def _show(self) -> None:
        self.keys, self.values = self.key_room[:, :, : self.length], self.value_room[:, :, : self.length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[2]
        self.key_room[:, :, start : self.length] = key_states
        self.value_room[:, :, start : self.length] = value_states
        self._show()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.padded + self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        self.key_room, self.value_room = self.key_room[indices], self.value_room[indices]
        self._show()


@contextmanager
def group_attention(model: PreTrainedModel, room: int) -> Iterator[GroupAttention]:
    """Attention of a model that decodes up to `room` tokens: observed, and then taken over where that is exact."""
    inner = base_model(model)
    attention = GroupAttention(inner._can_set_attn_implementation(), room)
    if not attention.suitable:
        yield attention
        return
    original = str(inner.config.get_text_config()._attn_implementation)
    inner.set_attn_implementation(_register(original))
    token = _running.set(attention)
    try:
        yield attention
    finally:
        _running.reset(token)
        inner.set_attn_implementation(original)


def _register(original: str) -> str:
    """Register an implementation around `original` that hands over to the running `GroupAttention`."""
    name = _PREFIX + original
    if name in ALL_ATTENTION_FUNCTIONS:
        return name

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        running = _running.get()
        if running.grouped:
            return running.attend(module, query, options.get("scaling"), options.get("softcap")), None
        running.observe(module, key, value, options)
        if original == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[original]
        return function(module, query, key, value, attention_mask, **options)

    def mask(*args: Any, **kwargs: Any) -> Any:
        running = _running.get()
        if running.grouped:
            return None
        running.suitable &= kwargs["mask_function"] is causal_mask_function
        function = ALL_MASK_ATTENTION_FUNCTIONS.get(original)
        return None if function is None else function(*args, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name

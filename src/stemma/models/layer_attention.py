"""Attention of one layer under the signature of transformers: what is refused, what records it, and learned prefixes.

An attention module may have a sub-module named `KERNEL_PREFIX`, which attends to a learned prefix that has
no keys. Wherever the registered implementation of `stemma.models.adapter` computes that
module's attention, the two are merged.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import _active_collector

from stemma.attention.decode import merge
from stemma.attention.kernelized import attention_with_partial
from stemma.errors import UnsupportedModelError

__all__ = [
    "KERNEL_PREFIX",
    "attention_with_prefix",
    "layer_name",
    "observe",
    "observed_attention",
    "prefix_attention",
    "refuse_other_attention",
    "scale_of",
]

KERNEL_PREFIX = "kernel_prefix"
"""Name of the sub-module of an attention module that attends to a prefix: called with queries and scale, it returns an
output and a log-sum-exp, which are merged with the layer's attention, or None. Its `active` says what it depends on
besides its parameters."""

_HARMLESS = {"position_ids", "cache_position", "num_items_in_batch", "shift_labels"}
"""Tensors handed to attention functions that do not change what attention computes; the last two are for the loss, and
transformers' `Trainer` gives them to the whole model."""

Observer = Callable[[nn.Module, Tensor, Tensor, Tensor, float], None]
"""Told the module, queries, keys, values and scale of each attention call."""

_observer: ContextVar[Observer | None] = ContextVar("stemma_attention_observer", default=None)


@contextmanager
def observed_attention(observer: Observer) -> Iterator[None]:
    """Let `observer` see every attention call of enabled models that is neither a tree's nor a cache's."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def observe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> None:
    """Tell the observer, if there is one, of an attention call."""
    observer = _observer.get()
    if observer is not None:
        observer(module, query, key, value, scale_of(query, scaling))


def layer_name(module: nn.Module) -> str:
    """A layer, for messages."""
    return f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"


def scale_of(query: Tensor, scaling: float | None) -> float:
    """The factor on scores."""
    return query.shape[-1] ** -0.5 if scaling is None else float(scaling)


def prefix_attention(module: nn.Module, query: Tensor, scaling: float | None) -> tuple[Tensor, Tensor] | None:
    """Attention over the module's learned prefix, `(rows, heads, n, value_dim)`, and its log-sum-exp `(rows, heads,
    n)`; None where there is none."""
    prefix: Any = module._modules.get(KERNEL_PREFIX)  # where there is none, getattr costs as much as a small product
    found: tuple[Tensor, Tensor] | None = None if prefix is None else prefix(query, scale_of(query, scaling))
    return found


def attention_with_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    partial: tuple[Tensor, Tensor],
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> Tensor:
    """Attention under a dense mask, merged with what `prefix_attention` gave; `(rows, n, heads, value_dim)`."""
    where = layer_name(module)
    refuse_other_attention(where, module, **others)
    if "attentions" in (_active_collector.get() or ()):
        raise UnsupportedModelError(
            f"{where} has a learned prefix, with which attention weights are not formed; leave out output_attentions, "
            "or disable the adapter."
        )
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4):
        raise UnsupportedModelError(
            f"{where} has a mask that is no (rows, 1, n, keys) tensor; a learned prefix needs a model loaded with "
            'attn_implementation="sdpa" or "eager".'
        )
    causal = (getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1
    bias = attention_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=value.dtype, device=value.device).masked_fill(~bias, float("-inf"))
    scale, (found, sums) = scale_of(query, scaling), partial
    if s_aux is not None:
        sink = s_aux.to(sums.dtype).view(1, -1, 1).expand_as(sums)
        found, sums = merge(found, sums, torch.zeros_like(found), sink)
    dims = (query.shape[-1], value.shape[-1])
    query, key, value, found = (
        torch.nn.functional.pad(x, (0, max(dims) - x.shape[-1])) if x.shape[-1] < max(dims) else x
        for x in (query, key, value, found)
    )
    output = attention_with_partial(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        found,
        sums,
        scale=scale,
        causal=causal and bias is None,
        bias=None if bias is None else bias[..., : key.shape[2]].to(value.dtype),
        softcap=softcap,
    )
    return output[..., : dims[1]].transpose(1, 2)


def refuse_other_attention(
    where: str,
    module: nn.Module,
    *,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> None:
    """Refuse attention that is not causal softmax attention over all keys of the path."""
    unknown = [name for name, value in others.items() if isinstance(value, Tensor) and name not in _HARMLESS]
    if unknown:
        raise UnsupportedModelError(
            f"{where} hands its attention function {', '.join(sorted(unknown))}, which tree attention does not know "
            "(sparse selections of keys, say)."
        )
    if position_bias is not None:
        raise UnsupportedModelError(f"{where} adds a position bias to its scores, which no block kernel computes.")
    if (getattr(module, "is_causal", True) if is_causal is None else is_causal) is False:
        raise UnsupportedModelError(f"{where} attends in both directions; prefixes need causal attention.")
    if dropout:
        raise UnsupportedModelError(
            f"{where} has active attention dropout {dropout}: dropped weights would differ between a shared and a "
            "repeated prefix. Set attention_dropout=0 in the config, or call model.eval()."
        )

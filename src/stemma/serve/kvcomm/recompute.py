"""Tokens in the middle of a cached prompt computed again, by ordinary forward calls.

CacheBlend (arXiv 2405.16444) computes some tokens of reused text anew in every layer, with attention to all keys before
them. Here these tokens are run as one call behind the cache, at their own positions, under a mask that hides their
stale keys; what the call appends to the cache then replaces these. Keys of the second layer come from the first layer's
states alone, which are exact for any text, so they are true keys: a call that is stopped there says how far off the
estimates are.

The keys and values of the first layer depend on token and place alone, so they also tell which tokens a cache holds.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from stemma.cache.key_values import KeyValues
from stemma.cache.offsets import Layers
from stemma.errors import UnsupportedModelError
from stemma.models.adapter import base_model, input_device
from stemma.models.rotary import cached_states, encode, few_logits, plain_cache

__all__ = ["first_layer", "key_errors", "recompute", "second_layer", "token_errors", "windows"]


class _Reached(Exception):
    def __init__(self, states: KeyValues) -> None:
        self.states = states


class _Stop(DynamicLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise _Reached(KeyValues(key_states, value_states))


@torch.no_grad()
def _rerun(model: Any, ids: Sequence[int], positions: Tensor, cache: DynamicCache) -> None:
    inner = base_model(model)
    device = input_device(inner)
    _refuse_other_masks(inner)
    before, positions = cache.get_seq_length(), positions.to(device)
    hidden = torch.ones(positions.numel(), before + positions.numel(), dtype=torch.bool, device=device)
    stale = torch.zeros(before, dtype=torch.bool, device=device)
    stale[positions] = True
    hidden[:, :before] = (torch.arange(before, device=device) > positions[:, None]) | stale
    hidden[:, before:] = positions > positions[:, None]
    dtype = inner.dtype
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, torch.finfo(dtype).min)
    model(
        input_ids=torch.tensor([list(ids)], device=device)[:, positions],
        position_ids=positions[None],
        attention_mask=mask[None, None],
        past_key_values=cache,
        use_cache=True,
        **few_logits(inner),
    )


def _refuse_other_masks(inner: Any) -> None:
    kind = str(inner.config.get_text_config()._attn_implementation).removeprefix("stemma_")
    if kind not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"recomputed tokens need a mask of their own, which {kind!r} attention does not take; load the model with "
            'attn_implementation="sdpa".'
        )


def first_layer(model: Any, ids: Sequence[int], start: int) -> KeyValues:
    """Keys and values of the first layer of tokens of which the first one stands at `start`."""
    cache = plain_cache()
    cache.layers.append(_Stop())
    try:
        encode(model, ids, start=start, cache=cache)
    except _Reached as reached:
        return reached.states
    raise AssertionError("a forward has passed the first layer without a cache")


def token_errors(true: KeyValues, held: KeyValues) -> Tensor:
    """`(T,)` how far the held keys or values of each token are off, relative to the mean norm of the true ones."""
    found = []
    for own, other in zip(true, held, strict=True):
        apart, norm = (x[0].float().transpose(0, 1).flatten(1).norm(dim=1) for x in (own - other, own))
        found.append(apart / norm.mean().clamp_min(1e-30))
    return torch.maximum(*found)


def second_layer(model: Any, ids: Sequence[int], positions: Tensor, states: Layers) -> KeyValues:
    """True keys and values of the second layer at some positions.

    Args:
        model: a model whose every layer caches keys and values.
        ids: the prompt.
        positions: `(S,)` int64, ascending.
        states: of all tokens of the prompt, right in the first layer; at least two layers.

    Raises:
        UnsupportedModelError: the model's attention takes no mask of our making.
    """
    cache = plain_cache(states)
    stop = _Stop()
    stop.lazy_initialization(*states[1])
    stop.keys, stop.values = states[1]
    cache.layers[1] = stop
    try:
        _rerun(model, ids, positions, cache)
    except _Reached as reached:
        return reached.states
    raise AssertionError("a forward has passed the second layer without a cache")


def key_errors(true: KeyValues, estimated: KeyValues, positions: Tensor) -> Tensor:
    """`(S,)` relative differences of estimated keys (of all tokens) from true ones at `positions`."""
    wanted = true.key[0].float()
    off = (estimated.key[0][:, positions.to(wanted.device)].float() - wanted).square().sum(dim=(0, 2))
    return (off / wanted.square().sum(dim=(0, 2)).clamp_min(1e-30)).sqrt()


def recompute(model: Any, ids: Sequence[int], positions: Tensor, states: Layers) -> Layers:
    """KeyValues of a prompt with the tokens at `positions` computed anew; arguments as `second_layer`."""
    cache = plain_cache(states)
    _rerun(model, ids, positions, cache)
    fresh = cached_states(cache, states[0].key.shape[2])
    where = positions.to(states[0].key.device)
    return tuple(
        KeyValues(*(old.index_copy(2, where, new) for old, new in zip(pair, own, strict=True)))
        for pair, own in zip(states, fresh, strict=True)
    )


def windows(model: Any) -> tuple[int | None, int | None]:
    """The shortest sliding window and the shortest attention chunk of the model's layers."""
    config = base_model(model).config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    kinds = getattr(config, "layer_types", None) or [None] * len(layers)
    sizes = [
        (kind, int(layer.sliding_window))
        for kind, layer in zip(kinds, layers, strict=False)
        if getattr(layer, "sliding_window", None)
    ]
    chunked = [size for kind, size in sizes if kind == "chunked_attention"]
    return min((size for kind, size in sizes if kind != "chunked_attention"), default=None), min(chunked, default=None)

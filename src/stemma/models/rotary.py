"""How a model stores positions in its cache, layer by layer, found by a probe; and moving cached states with it.

Types pair channels differently, rotate a part of each head, use other frequencies in other layers (Gemma 3), scale
cosine and sine (YaRN), rotate nothing in some layers (SmolLM3), or rotate what stands in the values' place of the cache
(latent attention). None of that is read from names: a few tokens are encoded at position 0 and far behind it, and the
one rotation that leads from the first cache to the second is taken. A model for which there is none (learned positions,
recurrent layers) is refused by name.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from stemma.attention.rotary import rotate
from stemma.cache.key_values import KeyValues
from stemma.errors import UnsupportedModelError
from stemma.models.adapter import base_model, in_mode, input_device, model_label
from stemma.models.layer_attention import KERNEL_PREFIX
from stemma.models.limits import dynamic_rope_limit, max_positions, vocabulary_size
from stemma.models.rounding import rounded_anew
from stemma.models.support import refuse_adapters_of_rows

__all__ = ["Rotations", "cached_states", "encode", "few_logits", "find_rotations", "plain_cache"]

_TOKENS = 12
_FAR = 1021
_MARGIN = 1.5
"""How many times a layer's own rounding its keys and values may be off. In half precision models with rotary positions
are 0.5 times off at most; another scheme of positions is 0.05 off or more, 5 times the rounding of a first layer in
bfloat16."""
_ANGLES = 4 * _FAR * torch.finfo(torch.float32).eps
"""Rounding of the angles besides, which models compute in float32 whatever their type: 5e-4."""


@dataclass(frozen=True, eq=False)
class LayerRotation:
    """What one layer of a cache does with positions."""

    frequencies: Tensor | None
    """`(R,)` float64 radians per position of each pair; None where nothing is rotated."""
    interleaved: bool = False
    first: int = 0
    """First rotated channel."""
    of: Literal["key", "value"] = "key"
    """What of the cache is rotated; "value" in latent attention, which keeps its rotary part there."""

    def move(self, states: KeyValues, offset: int | Tensor) -> KeyValues:
        """Keys and values `(..., T, D)` as they would be `offset` positions further; see
        `stemma.attention.rotary.rotate`."""
        if self.frequencies is None:
            return states
        turned = rotate(
            getattr(states, self.of), offset, self.frequencies, interleaved=self.interleaved, first=self.first
        )
        return states._replace(**{self.of: turned})


@dataclass(frozen=True, eq=False)
class Rotations:
    """The layers of a model's cache."""

    layers: tuple[LayerRotation, ...]
    error: float
    """Largest relative difference of a layer in the probe."""

    def move(self, states: Sequence[KeyValues], offset: int | Tensor) -> tuple[KeyValues, ...]:
        """A run of tokens, all layers, `offset` positions further."""
        return tuple(layer.move(pair, offset) for layer, pair in zip(self.layers, states, strict=True))


def plain_cache(states: Sequence[KeyValues] = ()) -> DynamicCache:
    """A cache that keeps every token in every layer, sliding windows included (their masks hide what is too far)."""
    return DynamicCache([(pair.key, pair.value) for pair in states] or None)


def cached_states(cache: DynamicCache, begin: int = 0, end: int | None = None) -> tuple[KeyValues, ...]:
    """Views of what a cache holds of the tokens `[begin, end)`, layer by layer, without layers that hold nothing."""
    held = [(layer.keys, layer.values) for layer in cache.layers if isinstance(layer, DynamicLayer)]
    pairs = [(key, value) for key, value in held if key is not None and value is not None]
    return tuple(KeyValues(key[:, :, begin:end], value[:, :, begin:end]) for key, value in pairs)


@torch.no_grad()
def encode(
    model: Any,
    ids: Sequence[int],
    above: Sequence[KeyValues] = (),
    start: int | None = None,
    cache: DynamicCache | None = None,
) -> DynamicCache:
    """Run tokens of one sequence behind cached ones.

    Args:
        model: a causal language model.
        ids: at least one.
        above: states of the tokens before; they are not written.
        start: position of the first new token; the number of tokens before when None.
        cache: an empty one to fill, in place of a plain one behind `above`.

    Returns:
        The cache of all tokens.
    """
    inner = base_model(model)
    device = input_device(inner)
    cache = plain_cache(above) if cache is None else cache
    before = above[0].key.shape[2] if above else 0
    start = before if start is None else start
    model(
        input_ids=torch.tensor([list(ids)], device=device),
        position_ids=torch.arange(start, start + len(ids), device=device)[None],
        attention_mask=torch.ones(1, before + len(ids), dtype=torch.int64, device=device),
        past_key_values=cache,
        use_cache=True,
        **few_logits(inner),
    )
    return cache


def few_logits(inner: PreTrainedModel) -> dict[str, Any]:
    """The argument of a forward that is made for its cache only: logits of one position, where the type can do that."""
    # Types whose last layers share keys skip there, too, positions whose logits nobody asks for.
    shares = getattr(inner.config.get_text_config(), "num_kv_shared_layers", 0)
    spares = not shares and "logits_to_keep" in inspect.signature(inner.forward).parameters
    return {"logits_to_keep": 1} if spares else {}


@torch.no_grad()
def find_rotations(model: Any) -> Rotations:
    """Find what every layer does with positions.

    Raises:
        UnsupportedModelError: the model has no cache of keys and values alone, takes no positions, or a layer's states
            at one position are no rotation of those at another; names the layer.
    """
    inner = base_model(model)
    label = model_label(inner)
    _refuse_unsuitable(inner, label, model)
    limits = (max_positions(inner), dynamic_rope_limit(inner))
    far = min([_FAR, *(limit - _TOKENS for limit in limits if limit is not None)])
    ids = torch.randint(0, vocabulary_size(inner), (_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    try:
        with in_mode(inner, training=False):
            near_states, far_states = (cached_states(encode(model, ids, start=start)) for start in (0, far))
            with rounded_anew(inner):
                rounded = cached_states(encode(model, ids, start=0))
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise UnsupportedModelError(
            f"{label} could not encode a few tokens with an ordinary cache ({type(error).__name__}: {error}), so its "
            "keys and values cannot be moved."
        ) from error
    if not near_states:
        raise UnsupportedModelError(f"{label} filled no cache of keys and values, so there is nothing to move.")
    found = [
        _of_layer(inner, number, near, there, far, label, max(map(_difference, again, near)))
        for number, (near, there, again) in enumerate(zip(near_states, far_states, rounded, strict=True))
    ]
    return Rotations(tuple(rotation for rotation, _ in found), max(error for _, error in found))


def _refuse_unsuitable(inner: PreTrainedModel, label: str, model: Any) -> None:
    if getattr(inner.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{label} is an encoder-decoder; its keys belong to two sequences.")
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        raise UnsupportedModelError(f"{label} takes no position_ids, so its tokens cannot be encoded at two places.")
    refuse_adapters_of_rows(model)
    prefixes = [module._modules.get(KERNEL_PREFIX) for module in inner.modules()]
    if any(getattr(prefix, "active", ()) for prefix in prefixes):
        raise UnsupportedModelError(
            f"{label} has a learned prefix without keys, which meets a query by its place in the prompt, so nothing "
            "computed at one place holds at another. Disable the adapter."
        )
    try:
        own = DynamicCache(config=inner.config.get_text_config(decoder=True)).layers
    except (AttributeError, KeyError) as error:
        raise UnsupportedModelError(
            f"{label} describes no cache of its own ({error}), so it cannot be moved."
        ) from error
    for number, layer in enumerate(own):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            raise UnsupportedModelError(
                f"layer {number} of {label} keeps a recurrent state ({type(layer).__name__}), which cannot be cut into "
                "the parts of a prompt. Only models whose every layer caches keys and values will do."
            )


def _of_layer(
    inner: PreTrainedModel, number: int, near: KeyValues, there: KeyValues, far: int, label: str, rounding: float
) -> tuple[LayerRotation, float]:
    best: tuple[LayerRotation, float] | None = None
    for rotation in _candidates(inner, near):
        error = max(_difference(x, y) for x, y in zip(rotation.move(near, far), there, strict=True))
        if best is None or error < best[1]:
            best = (rotation, error)
    assert best is not None
    if not best[1] <= _MARGIN * rounding + _ANGLES:
        raise UnsupportedModelError(
            f"layer {number} of {label}: keys and values {far} positions further are no rotation of those at the "
            f"beginning (nearest: {best[1]:.1e} relative, own rounding {rounding:.0e}). It has learned positions "
            "or another scheme, so cached parts cannot be moved; use a model with rotary or no positions."
        )
    return best


def _difference(x: Tensor, y: Tensor) -> float:
    """Relative difference of the median token `(..., T, D)`: rounding may send single tokens to other experts."""
    by_token = [z.double().movedim(-2, 0).flatten(1).norm(dim=1) for z in (x.double() - y.double(), y)]
    return float((by_token[0] / by_token[1].clamp_min(1e-30)).median())


def _candidates(inner: PreTrainedModel, states: KeyValues) -> Iterator[LayerRotation]:
    """Nothing rotated, then every frequency table of the model in both pairings and directions, at either end of a
    head."""
    yield LayerRotation(None)
    tables = _frequencies(inner, states.key.shape[-1])
    for frequencies in [*tables, *(-table for table in tables)]:  # nanochat turns the other way
        turned = 2 * frequencies.shape[0]
        places: tuple[Literal["key", "value"], ...] = ("key", "value")
        for of in places:
            room = getattr(states, of).shape[-1] - turned
            for first in dict.fromkeys((0, room)) if room >= 0 else ():
                for interleaved in (False, True):
                    yield LayerRotation(frequencies, interleaved, first, of)


def _frequencies(inner: PreTrainedModel, dim: int) -> list[Tensor]:
    """The model's tables, or the usual one where it has only sines (GPT-J)."""
    tables: dict[bytes, Tensor] = {}
    for name, buffer in inner.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq") and buffer.dim() == 1:
            table = buffer.detach().double().cpu()
            tables.setdefault(table.numpy().tobytes(), table)
    if not tables:
        config = inner.config.get_text_config()
        size = int(getattr(config, "rotary_dim", None) or dim)
        return [10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)]
    return list(tables.values())

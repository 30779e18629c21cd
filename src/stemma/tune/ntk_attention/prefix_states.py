"""Keys and values of a given prefix, for the adapter that is to stand for it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stemma.cache.key_values import KeyValues
from stemma.errors import InvalidBatchError, UnsupportedModelError
from stemma.models.adapter import base_model, in_mode, input_device, is_enabled
from stemma.models.layer_attention import observed_attention
from stemma.models.limits import dynamic_rope_limit, max_positions
from stemma.models.rotary import find_rotations, plain_cache
from stemma.scoring.enable import enable

__all__ = [
    "PrefixStates",
    "attention_calls",
    "check_prefix",
    "first_position",
    "peft_prefix_states",
    "prefix_cache",
    "prefix_states",
]

PrefixStates = Mapping[nn.Module, tuple[Tensor, Tensor]]
"""Keys `(1, key_value_heads, m, head_dim)` and values of a prefix, as attention sees them, by attention module."""


def prefix_states(model: Any, ids: Any) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Keys and values of a prefix of token ids, as they are for tokens that follow at position 0.

    With rotary positions the prefix stands at positions `-m` to `-1`, so that what follows sees it as in one
    sequence. With learned positions there is nothing before 0; it stands at 0 to `m - 1`, and what follows sees it as
    in one sequence only when it is given the `position_ids` from `m` on.

    Args:
        model: an enabled model, or one to enable.
        ids: token ids, at least one.

    Raises:
        InvalidBatchError: no token.
        UnsupportedModelError: rotary frequencies that depend on the length.
    """
    tokens = torch.as_tensor(ids, dtype=torch.int64).reshape(1, -1)
    if tokens.numel() == 0:
        raise InvalidBatchError("the prefix has no token; give at least one token id.")
    if not is_enabled(model):
        enable(model)
    positions = None
    if _rotary(model):
        if dynamic_rope_limit(model) is not None:
            raise UnsupportedModelError("rotary frequencies depend on the length here, so a prefix cannot be moved.")
        positions = torch.arange(-tokens.numel(), 0)[None]
    return {module: (key, value) for module, (_, key, value, _) in attention_calls(model, tokens, positions).items()}


def peft_prefix_states(model: Any) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Keys and values that a prefix-tuning adapter of peft (P-tuning v2 included) has learned.

    peft puts them in the cache unrotated, and its tokens begin behind them, at position `m`; with rotary positions
    the keys are turned back by `m` here, so that tokens from position 0 on see the same. With learned positions the
    tokens themselves are others at position `m`: what follows must be given the `position_ids` from `m` on.

    Args:
        model: a `PeftModel` whose active adapter is prefix tuning.

    Raises:
        UnsupportedModelError: it is not, or its rotary embedding cannot be turned back.
    """
    if str(getattr(getattr(model, "active_peft_config", None), "peft_type", "")).split(".")[-1] != "PREFIX_TUNING":
        raise UnsupportedModelError("a prefix-tuning model of peft is needed (get_peft_model with PrefixTuningConfig).")
    if not is_enabled(model):
        enable(model, self_test=False)  # the self-test would run with the learned prefix in its cache
    inner = base_model(model)
    with torch.no_grad():
        layers = model.get_prompt(batch_size=1).layers
        found = attention_calls(inner, torch.zeros(1, 2, dtype=torch.int64))
        states = tuple(KeyValues(layer.keys, layer.values) for layer in layers)
        if _rotary(model):
            states = find_rotations(inner).move(states, -states[0].key.shape[2])
    return {module: (key, value) for module, (key, value) in zip(found, states, strict=True)}


def check_prefix(model: Any, prefix: PrefixStates) -> None:
    """Refuse keys and values of other attention modules.

    Raises:
        InvalidBatchError: says what to call.
    """
    own = set(base_model(model).modules())
    if not prefix or not set(prefix) <= own:
        raise InvalidBatchError(
            "the prefix must hold keys and values of this model's attention modules, and holds those of others (of "
            "another model object or a copy) or none; call prefix_states or peft_prefix_states with this model."
        )


def first_position(model: Any, prefix: PrefixStates, length: int) -> int:
    """Position of the first of `length` tokens behind the exact prefix: 0, or `m` where positions are learned.

    Raises:
        InvalidBatchError: there are not as many positions.
    """
    if _rotary(model):
        return 0
    first = next(iter(prefix.values()))[0].shape[2]
    limit = max_positions(model)
    if limit is not None and first + length > limit:
        raise InvalidBatchError(
            f"a prefix of {first} tokens and inputs of {length} need {first + length} positions, and the model has "
            f"{limit}; give shorter inputs."
        )
    return first


@torch.no_grad()
def prefix_cache(model: Any, prefix: PrefixStates, rows: int) -> Any:
    """A cache of transformers with the prefix in front of each row.

    Raises:
        UnsupportedModelError: the model's cache holds something else than the keys and values of attention.
    """
    inner, probe = base_model(model), plain_cache()
    device = input_device(inner)
    inner(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), past_key_values=probe, use_cache=True)
    kept = [tuple((x.shape[1], x.shape[3]) for x in (layer.keys, layer.values)) for layer in probe.layers]
    if kept != [tuple((x.shape[1], x.shape[3]) for x in states) for states in prefix.values()]:
        raise UnsupportedModelError(
            f"{type(inner).__name__} (model type '{inner.config.model_type}') caches something else than the keys and "
            "values of its attention (latent attention, say), so the exact prefix cannot lie in its cache. Compare the "
            "logits with those of the tokens of the prefix in front."
        )
    return plain_cache([KeyValues(*(x.expand(rows, -1, -1, -1) for x in states)) for states in prefix.values()])


def _rotary(model: Any) -> bool:
    return getattr(base_model(model).config.get_text_config(), "rope_parameters", None) is not None


Seen = tuple[Tensor, Tensor, Tensor, float]


@torch.no_grad()
def attention_calls(model: Any, ids: Tensor, positions: Tensor | None = None) -> dict[nn.Module, Seen]:
    """Queries, keys, values and scale of every attention module on one row, in the order of the layers."""
    seen: dict[nn.Module, Seen] = {}

    def observer(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        if module in seen:
            raise UnsupportedModelError(f"{type(module).__name__} attends twice in one forward, so it has no prefix.")
        seen[module] = (query, key, value, scale)

    inner = base_model(model)
    device = input_device(inner)
    extra = {} if positions is None else {"position_ids": positions.to(device)}
    with in_mode(inner, training=False), observed_attention(observer):
        inner(input_ids=ids.to(device), use_cache=False, **extra)
    return seen

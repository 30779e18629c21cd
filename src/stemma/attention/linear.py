"""Linear attention with an encoder over a prefix: causal, but every position sees all of the prefix.

Source: "Just read twice: closing the recall gap for recurrent language models", 2024, arXiv 2407.05483, section 4.1
(prefix linear attention); the feature map is that of "Simple linear attention language models balance the
recall-throughput tradeoff" (Based), 2024, arXiv 2402.18668. With `s = q . k / sqrt(f)` for `f` numbers in a query,
`phi(q) . phi(k) = 1 + s + s^2 / 2`, at least 1/2. A row whose first `M` tokens are its prefix gives

    y_i = phi(q_i) S_i / phi(q_i) . z_i,
    S_i = sum_{j <= i} phi(k_j) v_j^T + sum_{j < M} phi(e_j) u_j^T,
    z_i = sum_{j <= i} phi(k_j) + sum_{j < M} phi(e_j),

for every `i`, also inside the prefix, with keys `e` and values `u` of the encoder (the paper's `k^e`, `v^e`).
`M = 0` is causal linear attention. `(S, z)` of the last token is all that decoding needs.

Three forms give the same numbers: `reference_linear_attention` (quadratic), `recurrent_linear_attention`
(token by token) and `chunked_linear_attention` (quadratic inside chunks, a state between them; what trains and
prefills). In the last two the encoder's sums are where the state starts.

What we changed: padding leaves out the keys after the map, not before it (`phi(0)` is not 0, so that a masked key
still counts in the published code); the prefix has its own length in each row; states are float32 at least.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stemma.attention.kernelized import taylor_features

__all__ = [
    "LinearState",
    "chunked_linear_attention",
    "expanded_features",
    "linear_state",
    "prefix_mask",
    "recurrent_linear_attention",
    "reference_linear_attention",
]


class LinearState(NamedTuple):
    """Sums over keys; those of two sets of keys add up."""

    value: Tensor
    """`(batch, heads, F, D)`: `sum phi(k) v^T`."""
    key: Tensor
    """`(batch, heads, F)`: `sum phi(k)`."""


def expanded_features(x: Tensor) -> Tensor:
    """`phi`: `x (..., f)` as `[1, x / f^(1/4), vec(x x^T) / sqrt(2 f)]`, `(..., 1 + f + f^2)`.

    Returns:
        float32 at least: squares of large float16 numbers are no float16 numbers.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return taylor_features(x * x.shape[-1] ** -0.25, 2)


def prefix_mask(lengths: Tensor, mask: Tensor) -> Tensor:
    """Which tokens belong to the prefix of their row.

    Args:
        lengths: `(batch,)`, tokens of the prefix, padding not counted; more than the row has means all of it.
        mask: `(batch, T)` bool, False at padding, on whichever side.

    Returns:
        `(batch, T)` bool.
    """
    return mask & (mask.cumsum(dim=1) <= lengths[:, None])


def linear_state(key: Tensor, value: Tensor, mask: Tensor | None = None) -> LinearState:
    """The sums over a set of keys.

    Args:
        key: `(batch, heads, T, f)`.
        value: `(batch, heads, T, D)`.
        mask: `(batch, T)` bool, the keys that count; None: all.
    """
    features = _masked(expanded_features(key), mask)
    return LinearState(features.transpose(-1, -2) @ value.to(features.dtype), features.sum(dim=-2))


def reference_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    encoder_key: Tensor | None = None,
    encoder_value: Tensor | None = None,
    prefix: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The quadratic form: a weight `1 + s + s^2 / 2` for every pair. For tests and short sequences.

    Args:
        query, key: `(batch, heads, T, f)`.
        value: `(batch, heads, T, D)`.
        encoder_key, encoder_value: like `key` and `value`; read where `prefix` is True.
        prefix: `(batch, T)` bool, see `prefix_mask`; None: no prefix.
        mask: `(batch, T)` bool, False at padding; None: no padding.

    Returns:
        `(batch, heads, T, D)` in the type of `value`; 0 at padding.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    ones = torch.ones(query.shape[-2], query.shape[-2], dtype=torch.bool, device=query.device)
    weights = _masked(_weights(query.to(wide), key.to(wide)) * ones.tril(), mask, dim=-1)
    total, mass = weights @ value.to(wide), weights.sum(dim=-1)
    if encoder_key is not None and encoder_value is not None and prefix is not None:
        weights = _masked(_weights(query.to(wide), encoder_key.to(wide)), prefix, dim=-1)
        total, mass = total + weights @ encoder_value.to(wide), mass + weights.sum(dim=-1)
    return _divided(total, mass, mask).to(value.dtype)


def recurrent_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, state: LinearState | None = None, *, mask: Tensor | None = None
) -> tuple[Tensor, LinearState]:
    """Token by token: the state after each token is read by its query. What decodes.

    Args:
        query, key, value, mask: see `reference_linear_attention`.
        state: sums to begin with, as those of the encoder or of tokens before; None: empty.

    Returns:
        `(batch, heads, T, D)` in the type of `value`, and the state after the last token.
    """
    state = state or _empty(query, value)
    outputs = []
    for t in range(query.shape[-2]):
        token = slice(t, t + 1)
        now = None if mask is None else mask[:, token]
        added = linear_state(key[..., token, :], value[..., token, :], now)
        state = LinearState(state.value + added.value, state.key + added.key)
        features = expanded_features(query[..., token, :])
        outputs.append(_divided(features @ state.value, (features @ state.key[..., None])[..., 0], now))
    return torch.cat(outputs, dim=-2).to(value.dtype), state


def chunked_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LinearState | None = None,
    *,
    mask: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, LinearState]:
    """Linear time in the number of tokens: pairs inside a chunk, the state between chunks.

    Args:
        query, key, value, state, mask: see `recurrent_linear_attention`.
        chunk_size: tokens of a chunk, at least 1. Work per token is about `F D` for the state and `chunk_size D`
            for the pairs.

    Returns:
        See `recurrent_linear_attention`.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    state = state or _empty(query, value)
    wide = state.value.dtype
    outputs = []
    for start in range(0, query.shape[-2], chunk_size):
        chunk = slice(start, start + chunk_size)
        q, k, v = (x[..., chunk, :].to(wide) for x in (query, key, value))
        now = None if mask is None else mask[:, chunk]
        features = expanded_features(q)
        weights = _masked(_weights(q, k).tril(), now, dim=-1)
        total = features @ state.value + weights @ v
        mass = (features @ state.key[..., None])[..., 0] + weights.sum(dim=-1)
        outputs.append(_divided(total, mass, now))
        added = linear_state(k, v, now)
        state = LinearState(state.value + added.value, state.key + added.key)
    return torch.cat(outputs, dim=-2).to(value.dtype), state


def _weights(query: Tensor, key: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return 1 + scores + scores.square() / 2


def _masked(x: Tensor, mask: Tensor | None, dim: int = -2) -> Tensor:
    """`x (batch, heads, ..., T, ...)` with zeros where `mask (batch, T)` is False; `dim`: -1 or -2, that of T."""
    if mask is None:
        return x
    hidden = ~(mask[:, None, None, :] if dim == -1 else mask[:, None, :, None])
    return x.masked_fill(hidden, 0.0)


def _divided(total: Tensor, mass: Tensor, mask: Tensor | None) -> Tensor:
    """`total / mass`, and 0 at padding, which may see nothing at all. A token sees itself: its mass is at least 1/2."""
    return _masked(total / mass.masked_fill(mass == 0, 1.0)[..., None], mask)


def _empty(query: Tensor, value: Tensor) -> LinearState:
    f = query.shape[-1]
    wide = torch.promote_types(query.dtype, torch.float32)
    shape = (*query.shape[:-2], 1 + f + f * f)
    return LinearState(
        torch.zeros(*shape, value.shape[-1], dtype=wide, device=query.device),
        torch.zeros(shape, dtype=wide, device=query.device),
    )

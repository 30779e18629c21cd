"""Attention of new tokens to a tree of shared prefixes and to their own rows: rectangles, merged by log-sum-exp.

While decoding, the keys that several rows share are read once for all of them: their queries are stacked, so that many
matrix-vector products become one matrix product (arXiv 2402.05099, section 3). Over key segments `t`, with
scores `s` and values `v`,

    o_t = softmax(s_t) v_t,  l_t = log sum exp(s_t),
    l = log sum_t exp(l_t),  o = sum_t exp(l_t - l) o_t,

exactly the softmax over all keys. A shared segment is a rectangle without a mask, since every query stands behind every
prefix key. Grouped query heads and the new tokens of a row are folded into the rows of the rectangle, so a segment of
`R` rows is one product of `R x n x group` queries with each key head.

The log-sum-exp of the fused kernels has no gradient, so this is for decoding only; `stemma.attention.tree` trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stemma.attention.kernels import block_forward

__all__ = ["Segment", "decode_attention", "merge", "reference_decode_attention"]


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys that some of the queries share."""

    key: Tensor
    """`(1, key_value_heads, P, head_dim)`, at least one key."""
    value: Tensor
    """Like `key`."""
    queries: slice | Tensor
    """Which queries see them, numbered row by row, token by token (query `t` of row `r` is `r * n + t`), in the
    order of the tree: a slice or an int64 index, not empty."""


def merge(output: Tensor, log_sum_exp: Tensor, other: Tensor, other_log_sum_exp: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from the attention over each: associative and commutative.

    Args:
        output: `(..., head_dim)`, attention over the first set.
        log_sum_exp: `(...)`, its log-sum-exp; -inf where it has no visible key (then `output` must be finite).
        other: attention over the second set, like `output`.
        other_log_sum_exp: like `log_sum_exp`.

    Returns:
        Output and log-sum-exp over both sets.
    """
    difference = (log_sum_exp - other_log_sum_exp).masked_fill(other_log_sum_exp == float("-inf"), float("inf"))
    merged = torch.logaddexp(log_sum_exp, other_log_sum_exp)
    return torch.lerp(other, output, torch.sigmoid(difference)[..., None]), merged


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    *,
    scale: float,
    bias: Tensor | None = None,
    order: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    partial: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of the `n` new tokens of every row to shared segments and to the row's own keys.

    Args:
        query: `(rows, heads, n, head_dim)`.
        key: `(rows, key_value_heads, U, head_dim)`, each row's own keys, those of the new tokens last.
        value: like `key`.
        segments: what rows share; together with its own keys they cover each key of a query exactly once.
        scale: factor on the scores.
        bias: `(rows or 1, 1, n or 1, U)` added to the scores of own keys, -inf hides (padding, and for `n > 1` the
            later tokens); None when every query sees every own key. A query must see one own key.
        order: `(rows,)` the row at each place of the tree and `(rows,)` the place of each row, where segments count
            in another order than rows; else None.
        softcap: `c` of `c * tanh(score / c)`, or None.
        sinks: `(heads,)` logits that take part in the softmax and carry no value, or None.
        partial: attention over other keys, `(rows, heads, n, head_dim)`, and its log-sum-exp `(rows, heads, n)`,
            -inf for none; or None.

    Returns:
        `(rows, n, heads, head_dim)` in the type of `query`.
    """
    rows, heads, new, dim = query.shape
    key_heads = key.shape[1]
    # A single token sees all own keys, so its group folds into the queries of its key head.
    folds = new == 1 and heads != key_heads
    folded = query.reshape(rows, key_heads, heads // key_heads, dim) if folds else query
    output, sums = block_forward(folded, key, value, causal=False, scale=scale, softcap=softcap, bias=bias)
    output = (output.reshape(rows, heads, new, dim) if folds else output).transpose(1, 2)
    if not segments and sinks is None and partial is None:
        return output
    wide = torch.promote_types(query.dtype, torch.float32)
    output, sums = output.to(wide), sums.reshape(rows, heads, new).transpose(1, 2)
    if segments:
        shared, shared_sums = _shared(query, key_heads, segments, scale, order, softcap)
        # Own sums are finite, and often nobody asks for the merged ones: fewer steps than `merge`.
        output = torch.lerp(output, shared, torch.sigmoid(shared_sums - sums)[..., None])
        if partial is not None or sinks is not None:
            sums = torch.logaddexp(sums, shared_sums)
    if partial is not None:
        output, sums = merge(output, sums, *(x.transpose(1, 2).to(wide) for x in partial))
    if sinks is not None:
        output = output * torch.sigmoid(sums - sinks.to(sums.dtype))[..., None]
    return output.to(query.dtype)


def _shared(
    query: Tensor,
    key_heads: int,
    segments: Sequence[Segment],
    scale: float,
    order: tuple[Tensor, Tensor] | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Partial attention `(rows, n, heads, head_dim)`, `(rows, n, heads)` over the shared segments; its log-sum-exp is
    -inf where no segment holds the query."""
    rows, heads, new, dim = query.shape
    group, count = heads // key_heads, rows * new
    # (key heads, rows, tokens, group, dim): the queries of a run of rows are consecutive.
    stacked = query.unflatten(1, (key_heads, group)).permute(1, 0, 3, 2, 4)
    if order is not None:
        stacked = stacked[:, order[0]]
    stacked = stacked.reshape(key_heads, count, group, dim)
    wide = torch.promote_types(query.dtype, torch.float32)
    output: Tensor | None = None
    sums: Tensor | None = None
    for segment in segments:
        asked = stacked[:, segment.queries]
        partial, partial_sums = block_forward(
            asked.reshape(1, key_heads, -1, dim), segment.key, segment.value, causal=False, scale=scale, softcap=softcap
        )
        partial, partial_sums = partial.view_as(asked).to(wide), partial_sums.view(asked.shape[:-1])
        if output is None or sums is None:
            if asked.shape[1] == count and isinstance(segment.queries, slice):
                output, sums = partial, partial_sums
                continue
            output = partial.new_zeros(key_heads, count, group, dim)
            sums = partial_sums.new_full((key_heads, count, group), float("-inf"))
        merged, merged_sums = merge(output[:, segment.queries], sums[:, segment.queries], partial, partial_sums)
        output[:, segment.queries], sums[:, segment.queries] = merged, merged_sums
    assert output is not None
    assert sums is not None
    output = output.view(key_heads, rows, new, group, dim)
    sums = sums.view(key_heads, rows, new, group)
    if order is not None:
        output, sums = output[:, order[1]], sums[:, order[1]]
    return output.permute(1, 2, 0, 3, 4).flatten(2, 3), sums.permute(1, 2, 0, 3).flatten(2)


def reference_decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    *,
    scale: float,
    bias: Tensor | None = None,
    order: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    partial: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What `decode_attention` computes, query by query over its keys laid end to end. For tests; same
    arguments."""
    rows, heads, new, dim = query.shape
    group = heads // key.shape[1]
    output = torch.empty(rows, new, heads, dim, dtype=query.dtype, device=query.device)
    for row in range(rows):
        place = row if order is None else int(order[1][row])
        for token in range(new):
            number = place * new + token
            seen = [segment for segment in segments if number in torch.arange(rows * new)[segment.queries]]
            keys = torch.cat([*(segment.key[0] for segment in seen), key[row]], dim=1).repeat_interleave(group, 0)
            values = torch.cat([*(segment.value[0] for segment in seen), value[row]], dim=1).repeat_interleave(group, 0)
            scores = (keys @ query[row, :, token, :, None])[..., 0] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if bias is not None:
                own = bias.expand(rows, 1, new, key.shape[2])[row, :, token]
                scores[:, -key.shape[2] :] += own
            if sinks is not None:
                scores = torch.cat([scores, sinks[:, None].to(scores.dtype)], dim=1)
            if partial is not None:
                scores = torch.cat([partial[1][row, :, token, None], scores], dim=1)
                values = torch.cat([partial[0][row, :, token, None], values], dim=1)
            weights = torch.softmax(scores, dim=1)[:, : values.shape[1]]
            output[row, token] = (weights[:, None] @ values)[:, 0]
    return output

"""Attention of one block: `(output, log_sum_exp)` forward, and the exact backward given the *merged* output.

The backward of a fused attention kernel rebuilds the probabilities as `exp(score - log_sum_exp)` and the row term as
`sum(grad_output * output)`. Handed the log-sum-exp and output of the *whole* row instead of the block's own, both are
those of the whole softmax, so the block's gradients are exact and nothing is differentiated through the merge.

Two kernels: torch's fused CPU attention, which takes grouped queries as they are, and plain math in slices of bounded
size for what no fused kernel offers here (soft-capped scores, other devices).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["block_backward", "block_forward", "in_own_precision"]

_SLICE_ELEMENTS = 1 << 24
"""Scores that plain math holds at once (64 MiB in float32): its memory does not grow with the block."""


class Gradients(NamedTuple):
    """Gradients of one block with respect to its queries, keys and values, in their shapes."""

    query: Tensor
    key: Tensor
    value: Tensor


def block_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one block.

    Args:
        query: `(blocks, heads, queries, head_dim)`.
        key: `(blocks, key_value_heads, keys, head_dim)`; `heads` is a multiple of `key_value_heads`. At least one
            key: torch's fused kernel ends the process on none.
        value: like `key`.
        causal: query `i` sees keys `0..i` (then there are as many keys as queries), else all keys.
        scale: factor on the scores.
        softcap: `c` of `c * tanh(score / c)`, or None.
        bias: `(blocks or 1, 1, queries or 1, keys)`, added to the scores (after soft-capping), of their dtype; -inf
            hides. Every query must see a key: the fused kernel gives a row without any the log-sum-exp 0.

    Returns:
        Output `(blocks, heads, queries, head_dim)` and log-sum-exp `(blocks, heads, queries)`, the latter in
        float32 (float64 for float64 input).
    """
    if softcap is None and query.device.type == "cpu":
        if bias is not None:
            bias = bias.expand(query.shape[0], 1, query.shape[2], key.shape[2])
        return torch._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
    with in_own_precision(query.device):
        return _math_forward(query, key, value, causal, scale, softcap, bias)


def block_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
    bias: Tensor | None = None,
) -> Gradients:
    """Gradients of one block, exact for the whole row when `output` and `log_sum_exp` are the merged ones.

    Args:
        grad_output: `(blocks, heads, queries, head_dim)`, gradient of the merged output.
        query, key, value, causal, scale, softcap, bias: as in `block_forward`.
        output: merged output, like `grad_output`.
        log_sum_exp: merged log-sum-exp, `(blocks, heads, queries)`.
    """
    if softcap is None and query.device.type == "cpu":
        if bias is not None:
            bias = bias.expand(query.shape[0], 1, query.shape[2], key.shape[2])
        return Gradients(
            *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_output, query, key, value, output, log_sum_exp, 0.0, causal, attn_mask=bias, scale=scale
            )
        )
    with in_own_precision(query.device):
        return _math_backward(grad_output, query, key, value, output, log_sum_exp, causal, scale, softcap, bias)


def in_own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Where autocast is on, switch it off: sums over many features, and log-sum-exps to merge by, are for float32."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _grouped(query: Tensor, key_heads: int) -> Tensor:
    """`(blocks, heads, queries, dim)` as `(blocks, key_heads, group, queries, dim)`."""
    return query.unflatten(1, (key_heads, query.shape[1] // key_heads))


def _query_slices(query: Tensor, keys: int) -> list[slice]:
    rows = max(1, _SLICE_ELEMENTS // max(1, query.shape[0] * query.shape[1] * keys))
    return [slice(begin, min(begin + rows, query.shape[2])) for begin in range(0, query.shape[2], rows)]


def _scores(query: Tensor, key: Tensor, rows: slice, causal: bool, scale: float) -> Tensor:
    """Scores of some query rows, `(blocks, key_heads, group, rows, keys)`, before soft-capping; float32 at least."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (
        torch.einsum("bkgqd,bknd->bkgqn", _grouped(query, key.shape[1])[:, :, :, rows].to(wide), key.to(wide)) * scale
    )
    if causal:
        index = torch.arange(key.shape[2], device=key.device)
        scores = scores.masked_fill(index[None, :] > index[rows, None], float("-inf"))
    return scores


def _math_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scale: float,
    softcap: float | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    outputs, sums = [], []
    for rows in _query_slices(query, key.shape[2]):
        scores = _scores(query, key, rows, causal, scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
            if causal:  # tanh turned the hidden scores into -softcap
                index = torch.arange(key.shape[2], device=key.device)
                scores = scores.masked_fill(index[None, :] > index[rows, None], float("-inf"))
        if bias is not None:
            scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, rows])[:, :, None].to(scores.dtype)
        total = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - total[..., None])
        outputs.append(torch.einsum("bkgqn,bknd->bkgqd", weights, value.to(weights.dtype)).flatten(1, 2))
        sums.append(total.flatten(1, 2))
    return torch.cat(outputs, dim=2).to(query.dtype), torch.cat(sums, dim=2)


def _math_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    causal: bool,
    scale: float,
    softcap: float | None,
    bias: Tensor | None = None,
) -> Gradients:
    wide = torch.promote_types(query.dtype, torch.float32)
    heads = key.shape[1]
    grad_query = torch.empty(query.shape, dtype=wide, device=query.device)
    grad_key = torch.zeros(key.shape, dtype=wide, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=wide, device=value.device)
    row_term = (grad_output.to(wide) * output.to(wide)).sum(dim=-1)
    for rows in _query_slices(query, key.shape[2]):
        scores = _scores(query, key, rows, causal, scale)
        slope: Tensor | float = 1.0
        if softcap is not None:
            bent = torch.tanh(scores / softcap)
            slope = 1 - bent * bent
            scores = (softcap * bent).masked_fill(scores == float("-inf"), float("-inf"))
        if bias is not None:
            scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, rows])[:, :, None].to(scores.dtype)
        weights = torch.exp(scores - _grouped(log_sum_exp, heads)[:, :, :, rows, None])
        grad = _grouped(grad_output, heads)[:, :, :, rows].to(wide)
        grad_value += torch.einsum("bkgqn,bkgqd->bknd", weights, grad)
        grad_weights = torch.einsum("bkgqd,bknd->bkgqn", grad, value.to(wide))
        grad_scores = weights * (grad_weights - _grouped(row_term, heads)[:, :, :, rows, None]) * slope * scale
        grad_query[:, :, rows] = torch.einsum("bkgqn,bknd->bkgqd", grad_scores, key.to(wide)).flatten(1, 2)
        grad_key += torch.einsum("bkgqn,bkgqd->bknd", grad_scores, _grouped(query, heads)[:, :, :, rows].to(wide))
    return Gradients(grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype))

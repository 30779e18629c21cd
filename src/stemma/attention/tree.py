"""Exact attention over a prefix tree, without masks.

The packed row is cut into the blocks of `stemma.prefix.layout.Layout`: causal squares and full rectangles. Each
block gives output `o_b` and log-sum-exp `l_b`; those of one query are merged by log-sum-exp,

    l = log(sum_b exp(l_b)),  o = sum_b exp(l_b - l) * o_b,

which is the softmax over all visible keys. The backward hands the *merged* `o` and `l` to each block's fused
backward and adds up what comes back (see `stemma.attention.kernels`). An attention sink `s` (gpt-oss) is one
more term: log-sum-exp `s`, output zero; so is attention over a learned prefix (`stemma.attention.kernelized`).

Prefix Grouper (arXiv 2506.05433) is the tree of two levels; there the prefix's keys and values are repeated for each
response. Here they are read where they lie, whatever the number of responses and levels.

Low-precision outputs are merged, and gradients of several blocks added, in float32, so the error does not grow with the
number of branches.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stemma.attention.decode import merge
from stemma.attention.flex import flex_tree_attention
from stemma.attention.kernels import block_backward, block_forward
from stemma.attention.varlen import varlen_backward, varlen_forward
from stemma.prefix.layout import Block, Layout

__all__ = ["reference_tree_attention", "tree_attention"]


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    partial: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every packed token to the tokens on its path.

    Args:
        query: `(1, heads, T, head_dim)`, floating point, rotary embedding applied.
        key: `(1, key_value_heads, C + T, head_dim)`, the context's keys first; `heads` is a multiple of
            `key_value_heads`.
        value: `(1, key_value_heads, C + T, value_dim)`.
        layout: where the tokens stand.
        scale: factor on the scores, default `head_dim ** -0.5`.
        window: a key is visible when `position_query - position_key < window`; None for all.
        softcap: `c` of `c * tanh(score / c)`; None for none.
        sinks: `(heads,)` logits that take part in the softmax and carry no value; None for none.
        partial: attention over other keys, `(1, heads, T, value_dim)`, and its log-sum-exp `(1, heads, T)`; None
            for none. Not with "flex".
        backend: "blocks" (any device), "varlen" (CUDA, half precision) or "flex" (CUDA); None picks "varlen" where it
            applies, else "blocks".

    Returns:
        `(1, heads, T, value_dim)`, differentiable in `query`, `key`, `value`, `sinks` and `partial`.

    Raises:
        ValueError: shapes that do not fit the layout, or an unknown backend.
    """
    tokens, head_dim = query.shape[2], query.shape[3]
    if query.shape[0] != 1 or tokens != layout.num_tokens or key.shape[2] != layout.context + tokens:
        raise ValueError(
            f"tree_attention expected query (1, heads, {layout.num_tokens}, head_dim) and "
            f"{layout.context + layout.num_tokens} keys, got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads are not a multiple of {key.shape[1]} key/value heads.")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}.")
    scale = head_dim**-0.5 if scale is None else float(scale)
    value_dim = value.shape[-1]
    if partial is not None and value_dim < head_dim:
        partial = (torch.nn.functional.pad(partial[0], (0, head_dim - value_dim)), partial[1])
    # Fused kernels want one head size (latent attention has two), one dtype (rotary tables may widen queries).
    if value_dim < head_dim:
        value = torch.nn.functional.pad(value, (0, head_dim - value_dim))
    elif value_dim > head_dim:
        query = torch.nn.functional.pad(query, (0, value_dim - head_dim))
        key = torch.nn.functional.pad(key, (0, value_dim - head_dim))
    query, key = query.to(value.dtype), key.to(value.dtype)
    backend = backend or _default_backend(query, softcap)
    if backend == "flex":
        if partial is not None:
            raise ValueError("the 'flex' backend takes no attention over other keys; leave the backend to None.")

        output = flex_tree_attention(
            query, key, value, layout, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    elif backend in ("blocks", "varlen"):
        output = _TreeAttention.apply(
            query, key, value, sinks, *(partial or (None, None)), layout, scale, window, softcap, backend
        )
    else:
        raise ValueError(f"backend must be 'blocks', 'varlen', 'flex' or None, got {backend!r}.")
    return output[..., :value_dim]


def _default_backend(query: Tensor, softcap: float | None) -> str:
    half = query.dtype in (torch.float16, torch.bfloat16)
    return "varlen" if query.is_cuda and half and softcap is None and query.shape[-1] <= 256 else "blocks"


def reference_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    partial: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What `tree_attention` computes, with one dense mask over all pairs of tokens. For tests; same arguments."""
    device, shift, tokens = query.device, layout.context, layout.num_tokens
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    position = torch.cat([torch.arange(shift), torch.from_numpy(layout.positions)]).to(device)
    index = torch.arange(shift + tokens, device=device) - shift
    end = torch.cat([torch.full((shift,), tokens), torch.from_numpy(layout.subtree_end)]).to(device)
    visible = (index[None, :] <= index[shift:, None]) & (index[shift:, None] < end[None, :])
    if window is not None:
        visible &= position[shift:, None] - position[None, :] < window
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, tokens, 1)], dim=-1)
    if partial is None:
        return torch.softmax(scores, dim=-1)[..., : shift + tokens] @ value
    weights = torch.softmax(torch.cat([scores, partial[1][..., None]], dim=-1), dim=-1)
    return weights[..., : shift + tokens] @ value + weights[..., -1:] * partial[0]


class _TreeAttention(torch.autograd.Function):
    """Blocks forward, blocks backward; saves q, k, v, the output and one log-sum-exp a row and head."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        partial: Tensor | None,
        partial_sums: Tensor | None,
        layout: Layout,
        scale: float,
        window: int | None,
        softcap: float | None,
        backend: str,
    ) -> Tensor:
        if backend == "varlen":
            output, log_sum_exp = varlen_forward(query, key, value, layout, scale, window)
        else:
            output, log_sum_exp = _blocks_forward(query, key, value, layout, scale, window, softcap)
        if sinks is not None:
            sink = sinks.detach().to(log_sum_exp.dtype).view(1, -1, 1)
            merged = torch.logaddexp(log_sum_exp, sink)
            output.mul_(torch.exp(log_sum_exp - merged)[..., None])
            log_sum_exp = merged
        if partial is not None and partial_sums is not None:
            output, log_sum_exp = merge(
                output, log_sum_exp, partial.to(output.dtype), partial_sums.to(log_sum_exp.dtype)
            )
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, partial, partial_sums, output, log_sum_exp)
        ctx.settings = (layout, scale, window, softcap, backend)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, partial, partial_sums, output, log_sum_exp = ctx.saved_tensors
        layout, scale, window, softcap, backend = ctx.settings
        if backend == "varlen":
            grads = varlen_backward(grad_output, query, key, value, output, log_sum_exp, layout, scale, window)
        else:
            grads = _blocks_backward(
                grad_output, query, key, value, output, log_sum_exp, layout, scale, window, softcap
            )
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            row_term = (grad_output.to(log_sum_exp.dtype) * output.to(log_sum_exp.dtype)).sum(dim=-1)
            weight = torch.exp(sinks.to(log_sum_exp.dtype).view(1, -1, 1) - log_sum_exp)
            grad_sinks = -(weight * row_term).sum(dim=(0, 2)).to(sinks.dtype)
        grad_partial = grad_partial_sums = None
        if partial is not None:
            grad, wide = grad_output.to(log_sum_exp.dtype), log_sum_exp.dtype
            weight = torch.exp(partial_sums.to(wide) - log_sum_exp)
            grad_partial = (weight[..., None] * grad).to(partial.dtype)
            grad_partial_sums = (weight * (grad * (partial.to(wide) - output.to(wide))).sum(dim=-1)).to(
                partial_sums.dtype
            )
        return *grads, grad_sinks, grad_partial, grad_partial_sums, None, None, None, None, None


def _pick(tensor: Tensor, rows: slice | Tensor, count: int) -> Tensor:
    """Rows of `(1, heads, tokens, ...)` as `(blocks, heads, rows, ...)`; a view for slices."""
    if isinstance(rows, slice):
        picked = tensor[:, :, rows]
        return picked if count == 1 else picked[0].unflatten(1, (count, -1)).transpose(0, 1)
    if rows.dim() == 1:
        return tensor.index_select(2, rows)
    return tensor[0, :, rows].transpose(0, 1)


def _rows_of(partial: Tensor, block: Block, index: slice | Tensor) -> tuple[Tensor, slice | Tensor]:
    """Turn `(blocks, heads, rows, ...)` back into `(1, heads, tokens, ...)`, with the rows it belongs to."""
    if isinstance(index, slice):
        return (partial if block.count == 1 else partial.transpose(0, 1).flatten(1, 2)[None]), index
    if index.dim() == 1:
        return partial, index
    flat, rows = partial.transpose(0, 1).flatten(1, 2)[None], index.flatten()
    if block.valid is not None:
        keep = block.valid.flatten()
        return flat[:, :, keep], rows[keep]
    return flat, rows


def _blocks_forward(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    heads, tokens, dim = query.shape[1:]
    # Tokens before heads in memory, as the model's output projection wants them.
    output = torch.empty(1, tokens, heads, dim, dtype=wide, device=query.device).transpose(1, 2)
    log_sum_exp = torch.empty(1, heads, tokens, dtype=wide, device=query.device)
    for block in layout.blocks(window, query.device):
        partial, sums = block_forward(
            _pick(query, block.query, block.count),
            _pick(key, block.key, block.count),
            _pick(value, block.key, block.count),
            causal=block.causal,
            scale=scale,
            softcap=softcap,
        )
        partial, rows = _rows_of(partial, block, block.query)
        sums, _ = _rows_of(sums, block, block.query)
        if block.first:
            output[:, :, rows] = partial.to(wide)
            log_sum_exp[:, :, rows] = sums
            continue
        old = log_sum_exp[:, :, rows]
        merged = torch.logaddexp(old, sums)
        kept, added = torch.exp(old - merged)[..., None], torch.exp(sums - merged)[..., None]
        if isinstance(rows, slice):
            output[:, :, rows].mul_(kept).addcmul_(partial.to(wide), added)
        else:
            output[:, :, rows] = output[:, :, rows] * kept + partial * added
        log_sum_exp[:, :, rows] = merged
    return output, log_sum_exp


_ROUNDED_QUERIES = 1024
"""Queries whose gradients to a key the CPU kernel may add up in half precision; sums over more are taken in float32."""


def _cut(block: Block) -> list[Block]:
    """A rectangle in runs of queries, each of which adds its key gradients in float32; squares as they are."""
    if block.causal or not isinstance(block.query, slice):
        return [block]
    begins = range(block.query.start, block.query.stop, _ROUNDED_QUERIES)
    return [replace(block, query=slice(b, min(b + _ROUNDED_QUERIES, block.query.stop))) for b in begins]


def _blocks_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    total = tuple(
        torch.zeros(1, x.shape[2], x.shape[1], x.shape[3], dtype=wide, device=x.device).transpose(1, 2)
        for x in (query, key, value)
    )
    blocks = layout.blocks(window, query.device)
    if query.device.type == "cpu" and query.dtype != wide:
        blocks = [part for block in blocks for part in _cut(block)]
    for block in blocks:
        grad = _pick(grad_output, block.query, block.count)
        if block.valid is not None:  # rows that only fill up carry no gradient
            grad = grad * block.valid[:, None, :, None]
        grads = block_backward(
            grad,
            _pick(query, block.query, block.count),
            _pick(key, block.key, block.count),
            _pick(value, block.key, block.count),
            _pick(output, block.query, block.count),
            _pick(log_sum_exp, block.query, block.count),
            causal=block.causal,
            scale=scale,
            softcap=softcap,
        )
        for sum_, part, index in zip(total, grads, (block.query, block.key, block.key), strict=True):
            part, rows = _rows_of(part, block, index)
            if isinstance(rows, slice):
                sum_[:, :, rows] += part
            else:
                sum_.index_add_(2, rows, part.to(wide))
    return total[0].to(query.dtype), total[1].to(key.dtype), total[2].to(value.dtype)

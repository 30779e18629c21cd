"""The blocks of a layout in a few variable-length calls, for CUDA.

A fused CUDA kernel wants few launches, so blocks whose queries do not overlap are put behind one another and computed
by one variable-length call: for full attention one call for all squares and one for each level of inner nodes. Rows of
a call are a view where they are contiguous, else gathered.

The kernel is torch's FlashAttention (`torch.nn.attention.varlen`), in half precision. Its own autograd drops the
gradient of the log-sum-exp, so forward and backward are called directly and the backward is handed the merged output.
The schedule and the arithmetic are tested on any device with a kernel that loops over the segments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stemma.attention.kernels import block_backward, block_forward
from stemma.prefix.layout import Block, Layout

__all__ = ["flash_kernel", "reference_kernel", "schedule", "varlen_backward", "varlen_forward"]

Rows = slice | Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """One variable-length call: segments of queries, each with a segment of keys."""

    query: Rows
    """Query rows of all segments, one behind the other."""
    key: Rows
    """Key rows of all segments."""
    query_ends: Tensor
    """`(segments + 1,)` int32 cumulative query lengths."""
    key_ends: Tensor
    """`(segments + 1,)` int32 cumulative key lengths."""
    max_query: int
    """Longest query segment."""
    max_key: int
    """Longest key segment."""
    causal: bool
    """Each segment is a causal square, else a full rectangle."""
    first: bool
    """Outputs are stored, not merged."""


class Kernel(NamedTuple):
    """A variable-length attention kernel on `(tokens, heads, head_dim)`; log-sum-exp is `(heads, tokens)` "
    "float32."""

    forward: Callable[[Tensor, Tensor, Tensor, Call, float], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def schedule(layout: Layout, window: int | None, device: torch.device) -> list[Call]:
    """Group the blocks of a layer into calls: same kind, and no query row twice."""
    groups: list[tuple[bool, bool, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]] = []
    for block in layout.blocks(window, "cpu"):
        for query, key in _segments(block):
            kind = [group for group in groups if group[:2] == (block.causal, block.first)]
            free = next((group for group in kind if not group[2][query].any()), None)
            if free is None:
                free = (block.causal, block.first, np.zeros(layout.num_tokens, dtype=bool), [])
                groups.append(free)
            free[2][query] = True
            free[3].append((query, key))
    calls = []
    for causal, first, _, members in groups:
        if not causal or first:  # neighbours in the row become a view
            members = sorted(members, key=lambda member: int(member[0][0]))
        sizes = np.array([[query.size, key.size] for query, key in members])
        ends = torch.from_numpy(np.concatenate([np.zeros((1, 2)), sizes.cumsum(axis=0)]).astype(np.int32)).to(device)
        calls.append(
            Call(
                query=_rows(np.concatenate([query for query, _ in members]), device),
                key=_rows(np.concatenate([key for _, key in members]), device),
                query_ends=ends[:, 0].contiguous(),
                key_ends=ends[:, 1].contiguous(),
                max_query=int(sizes[:, 0].max()),
                max_key=int(sizes[:, 1].max()),
                causal=causal,
                first=first,
            )
        )
    return calls


def _segments(block: Block) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (query rows, key rows) of each square or rectangle of a block."""

    def rows(index: Rows) -> list[np.ndarray]:
        if isinstance(index, slice):
            return np.split(np.arange(index.start, index.stop), block.count)
        matrix = index.numpy() if index.dim() == 2 else index.numpy()[None]
        lengths = [matrix.shape[1]] * len(matrix) if block.valid is None else block.valid.sum(dim=1).tolist()
        return [row[:length] for row, length in zip(matrix, lengths, strict=True)]

    return list(zip(rows(block.query), rows(block.key), strict=True))


def _rows(index: np.ndarray, device: torch.device) -> Rows:
    if (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(np.ascontiguousarray(index)).to(device)


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    """Rows of `(1, heads, tokens, dim)` as `(tokens, heads, dim)`."""
    picked = tensor[0].transpose(0, 1)
    return picked[rows] if isinstance(rows, slice) else picked.index_select(0, rows)


def _calls(layout: Layout, window: int | None, device: torch.device) -> list[Call]:
    if window is not None and window >= layout.max_length:
        window = None
    return layout.remember(("varlen", window, device), lambda: schedule(layout, window, device))


def varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """Merged output `(1, heads, T, head_dim)` and log-sum-exp `(1, heads, T)`, both float32 at least."""
    kernel = kernel or flash_kernel
    wide = torch.promote_types(query.dtype, torch.float32)
    heads, tokens, dim = query.shape[1:]
    output = torch.empty(tokens, heads, dim, dtype=wide, device=query.device)
    log_sum_exp = torch.empty(heads, tokens, dtype=wide, device=query.device)
    for call in _calls(layout, window, query.device):
        partial, sums = kernel.forward(
            _take(query, call.query), _take(key, call.key), _take(value, call.key), call, scale
        )
        if call.first:
            output[call.query] = partial.to(wide)
            log_sum_exp[:, call.query] = sums.to(wide)
            continue
        old = log_sum_exp[:, call.query]
        merged = torch.logaddexp(old, sums.to(wide))
        kept, added = ((part - merged).exp().transpose(0, 1)[..., None] for part in (old, sums))
        output[call.query] = output[call.query] * kept + partial.to(wide) * added
        log_sum_exp[:, call.query] = merged
    return output.transpose(0, 1)[None], log_sum_exp[None]


def varlen_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given the merged output and log-sum-exp."""
    kernel = kernel or flash_kernel
    wide = torch.promote_types(query.dtype, torch.float32)
    total = [torch.zeros(x.shape[2], x.shape[1], x.shape[3], dtype=wide, device=x.device) for x in (query, key, value)]
    for call in _calls(layout, window, query.device):
        grads = kernel.backward(
            _take(grad_output, call.query).contiguous(),
            _take(query, call.query),
            _take(key, call.key),
            _take(value, call.key),
            _take(output, call.query).contiguous(),
            log_sum_exp[0][:, call.query].contiguous(),
            call,
            scale,
        )
        for sum_, part, rows in zip(total, grads, (call.query, call.key, call.key), strict=True):
            if isinstance(rows, slice):
                sum_[rows] += part
            else:
                sum_.index_add_(0, rows, part.to(wide))
    dq, dk, dv = (x.transpose(0, 1)[None].to(query.dtype) for x in total)
    return dq, dk, dv


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    import torch.nn.attention.varlen

    window = [-1, 0] if call.causal else [-1, -1]
    output, sums, _ = torch.ops.torch_attn._varlen_attn(
        query,
        key,
        value,
        call.query_ends,
        call.key_ends,
        call.max_query,
        call.max_key,
        call.causal,
        scale,
        window,
        query.shape[1] != key.shape[1],
    )
    return output, sums


def _flash_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, query, key, value, output, sums, call, scale = arguments
    return torch.ops.torch_attn._varlen_attn_backward(
        grad_output,
        query,
        key,
        value,
        output,
        sums.float(),
        call.query_ends,
        call.key_ends,
        call.max_query,
        call.max_key,
        call.causal,
        torch.zeros(2, dtype=torch.uint64, device=query.device),  # random state of a dropout that is always 0
        scale,
        [-1, 0] if call.causal else [-1, -1],
    )


flash_kernel = Kernel(_flash_forward, _flash_backward)
"""FlashAttention of torch, on CUDA in float16 or bfloat16."""


def _looped(call: Call, tokens: Tensor) -> list[tuple[slice, slice]]:
    query, key = call.query_ends.tolist(), call.key_ends.tolist()
    return [(slice(*query[i : i + 2]), slice(*key[i : i + 2])) for i in range(len(query) - 1)]


def _reference_forward(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    parts = [
        block_forward(*(_batch(x) for x in (query[q], key[k], value[k])), causal=call.causal, scale=scale, softcap=None)
        for q, k in _looped(call, query)
    ]
    return torch.cat([out[0].transpose(0, 1) for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)


def _reference_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, query, key, value, output, sums, call, scale = arguments
    parts = [
        block_backward(
            _batch(grad_output[q]),
            _batch(query[q]),
            _batch(key[k]),
            _batch(value[k]),
            _batch(output[q]),
            sums[None, :, q],
            causal=call.causal,
            scale=scale,
            softcap=None,
        )
        for q, k in _looped(call, query)
    ]
    dq, dk, dv = (torch.cat([part[i][0].transpose(0, 1) for part in parts]) for i in range(3))
    return dq, dk, dv


def _batch(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)[None]


reference_kernel = Kernel(_reference_forward, _reference_backward)
"""One block a segment, on any device. For tests of the schedule."""

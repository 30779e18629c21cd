"""Tree attention through FlexAttention: a second CUDA backend, compiled, for any dtype and for soft-capping.

Visibility is one comparison with one integer a key, `k <= q < subtree_end[k]`; positions give the window. The block
mask is built by a compiled kernel on CUDA, so no mask of tokens x tokens exists there. torch has no backward of
FlexAttention on the CPU, so there this backend serves forward passes in tests only.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stemma.prefix.layout import Layout

__all__ = ["flex_tree_attention"]


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Arguments and result as in `stemma.attention.tree.tree_attention`."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    mask = _block_mask(layout, window, query.device)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    run = _compiled() if query.is_cuda else flex_attention
    output, aux = run(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is None:
        return output
    merged = torch.logaddexp(aux.lse, sinks.to(aux.lse.dtype).view(1, -1, 1))
    return output * torch.exp(aux.lse - merged)[..., None].to(output.dtype)


def _block_mask(layout: Layout, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def build() -> Any:
        context, tokens = layout.context, layout.num_tokens
        end = torch.cat([torch.full((context,), tokens), torch.from_numpy(layout.subtree_end)]).to(device)
        position = torch.cat([torch.arange(context), torch.from_numpy(layout.positions)]).to(device)

        def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (k - context <= q) & (q < end[k])
            return seen if window is None else seen & (position[q + context] - position[k] < window)

        return create_block_mask(
            visible, None, None, tokens, context + tokens, device=device, _compile=device.type == "cuda"
        )

    return layout.remember(("flex", window, device), build)

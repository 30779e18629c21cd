"""Markers that stand in a mask's place, and what a mask function of transformers says about visibility.

Masks are made outside the layers. Where Stemma computes a layer's attention, on a tree call or over a cache of shared
prefixes, the mask function returns a `Mask`, which travels to the layers and tells each its window.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Mask", "ReadingCache", "asked_cache", "mask_is_for", "probe"]


class ReadingCache(Protocol):
    """A cache that computes attention itself, as its keys and values do not lie in one tensor."""

    def check_mask(self, attention_mask: Tensor | None, new_tokens: int) -> tuple[int, int]:
        """Refuse a mask `(rows, columns)` bool of real tokens that does not fit; return the longest row, and the
        padding left of it."""
        ...

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        partial: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention `(rows, tokens, heads, value_dim)` of new tokens, whose keys and values are taken in, merged with
        attention over a learned prefix (`(rows, heads, tokens, value_dim)` and its log-sum-exp)."""
        ...


@dataclass(frozen=True)
class Mask:
    """What stands in a mask's place on a tree call, or when a cache attends."""

    window: int | None = None
    refusal: str = ""
    cache: ReadingCache | None = None

    def __getitem__(self, index: Any) -> "Mask":
        """Models slice their masks to the rows in use; should rows really be left out, the attention call refuses."""
        return self


asked_cache: ContextVar[tuple[ReadingCache, int, int] | None] = ContextVar("stemma_asked_cache", default=None)
"""The cache that was last asked for the sizes of a mask, with the mask's columns and rows."""


def mask_is_for(cache: ReadingCache, length: int, new_tokens: int) -> None:
    """Note that the next mask, of `new_tokens` rows and `length` columns, will be for attention over `cache`."""
    asked_cache.set((cache, length, new_tokens))


def probe(mask_function: Any, length: int, row: int = 0, first: int = 0) -> Mask:
    """The sliding window of an index-based mask function on `length` tokens behind `first` columns of padding in a
    row of the batch, or why it has none."""
    keys = torch.arange(length)
    zero, batch = torch.zeros((), dtype=torch.int64), torch.tensor(row)
    window: int | None = None
    for position in sorted({length - 1, length // 2, length // 3}, reverse=True):
        try:
            visible = torch.as_tensor(mask_function(batch, zero, torch.tensor(first + position), first + keys))
            visible = visible.cpu().expand(length)
        except (IndexError, RuntimeError):
            return Mask(refusal="it depends on places in the row, as blocks of an image do, and not on positions.")
        seen = int(visible.sum())
        if window is None and seen < position + 1:
            window = seen
        if not torch.equal(visible, (keys <= position) & (keys > position - (length if window is None else window))):
            return Mask(
                refusal=f"of {length} tokens, position {position} sees {seen}, which is neither causal attention nor a "
                "sliding window. Chunked, blockwise and bidirectional masks cannot be computed over a prefix tree "
                "(chunked attention can, as long as no sequence is longer than a chunk)."
            )
    return Mask(window)

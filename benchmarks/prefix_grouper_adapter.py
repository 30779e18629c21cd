"""Runs the published `prefix_grouper` package (arXiv 2506.05433, version 0.0.1.post1) correctly on CPU.

The package splits attention into two calls, prefix with itself and suffixes with prefix and suffix, and hands each
call a two-dimensional padding mask, which only FlashAttention reads as it is meant: SDPA raises on its shape, or drops
causality for a group of one. This adapter is an attention function for transformers' `AttentionInterface` that calls
the package's own `PrefixGrouper.forward` and builds what SDPA needs inside: the causal flag where nothing is padded and
queries and keys are the same tokens, else the four-dimensional bottom-right causal mask, made once per step.

Install the package with `pip install --no-deps prefix-grouper==0.0.1.post1`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.workloads import Workload, pad_right

ATTENTION_NAME = "prefix_grouper_sdpa"


def missing() -> str | None:
    """The reason why the package cannot run, or None."""
    if importlib.util.find_spec("prefix_grouper") is None:
        return "not installed: pip install --no-deps prefix-grouper==0.0.1.post1"
    return None


def enable(model: Any) -> None:
    """Register the adapter and point the model's attention at it; the model's code stays as it is."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, attention)
    model.set_attn_implementation(ATTENTION_NAME)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefix_grouper: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (B, H, T, D), key and value (B, K, T, D) to (B, T, H, D): the package's two-part attention."""
    masks = prefix_grouper.sdpa_masks

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        mask = masks[id(padding)]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)

    return prefix_grouper.forward(sdpa, query, key, value), None


def sdpa_mask(padding: torch.Tensor, queries: int) -> torch.Tensor | None:
    """Bottom-right causal mask for the last `queries` of the keys in `padding` (B, keys) bool.

    None stands for SDPA's own causal flag. Without padding the mask is (queries, keys), else (B, 1, queries, keys); a
    padded query keeps its own key, so that its softmax is defined.
    """
    keys = padding.shape[1]
    unpadded = bool(padding.all())
    if unpadded and queries == keys:
        return None
    query = torch.arange(keys - queries, keys)[:, None]
    key = torch.arange(keys)
    if unpadded:
        return key <= query
    return ((key <= query) & padding[:, None, None, :]) | (key == query)


def split(workload: Workload, boundary: int | None) -> tuple[list[list[int]], list[list[list[int]]], list[int]]:
    """Prefixes, their suffixes, and the prefix length of each row, for one level of grouping.

    None groups at the prompts; a number groups the rows by that many leading tokens.
    """
    if boundary is None:
        return workload.prompts, workload.responses, workload.prompt_lengths
    grouped: dict[tuple[int, ...], list[list[int]]] = {}
    for row in workload.rows:
        grouped.setdefault(tuple(row[:boundary]), []).append(row[boundary:])
    return [list(prefix) for prefix in grouped], list(grouped.values()), [boundary] * len(workload.rows)


def best_boundary(workload: Workload) -> int | None:
    """The level of a multi-level workload whose one-level grouping leaves the fewest tokens."""

    def packed_tokens(boundary: int | None) -> int:
        prefixes, suffixes, _ = split(workload, boundary)
        return sum(map(len, prefixes)) + sum(len(suffix) for group in suffixes for suffix in group)

    return min((None, *workload.segments), key=packed_tokens)


def pack(workload: Workload, boundary: int | None = None) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The grouper, the packed ids (groups, T), the padded suffixes (N, C) and their mask."""
    from prefix_grouper import PrefixGrouper

    prefixes, suffixes, _ = split(workload, boundary)
    flat = [suffix for group in suffixes for suffix in group]
    prefix_ids, suffix_ids = pad_right(prefixes), pad_right(flat)
    prefix_mask = pad_right([[1] * len(prefix) for prefix in prefixes]).bool()
    suffix_mask = pad_right([[1] * len(suffix) for suffix in flat]).bool()
    grouper = PrefixGrouper.from_ungrouped_masks(
        prefix_mask, suffix_mask, [len(group) for group in suffixes], padding_mode="right"
    )
    ids = grouper.concat_input(prefix_ids, prefix_mask, suffix_ids, suffix_mask)
    grouper.sdpa_masks = {
        id(grouper.prefix_attn_mask): sdpa_mask(grouper.prefix_attn_mask, grouper.prefix_attn_mask.shape[1]),
        id(grouper.suffix_attn_mask): sdpa_mask(grouper.suffix_attn_mask, suffix_ids.shape[1]),
    }
    return grouper, ids, suffix_ids, suffix_mask


def forward(model: Any, grouper: Any, ids: torch.Tensor, **kwargs: Any) -> Any:
    """The model's forward on packed ids, each suffix numbered on from the end of its prefix."""
    positions = torch.zeros_like(ids)
    for row, info in enumerate(grouper.group_info):
        pieces = [torch.arange(info.prefix_len)]
        pieces += [torch.arange(info.prefix_len, info.prefix_len + length) for length in info.suffix_lens]
        packed = torch.cat(pieces)
        positions[row, : len(packed)] = packed
    return model(input_ids=ids, position_ids=positions, use_cache=False, prefix_grouper=grouper, **kwargs)


def predictors(workload: Workload, boundary: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(S,) group and (S,) packed column of the token before each scored token, in the workload's row order."""
    prefixes, suffixes, prefix_lengths = split(workload, boundary)
    group_of, start_of = [], []
    for group, (prefix, group_suffixes) in enumerate(zip(prefixes, suffixes)):
        start = len(prefix)
        for suffix in group_suffixes:
            group_of.append(group)
            start_of.append(start)
            start += len(suffix)
    rows, columns = [], []
    for n, (row, prompt_tokens) in enumerate(zip(workload.rows, workload.prompt_lengths)):
        before = torch.arange(prompt_tokens - 1, len(row) - 1)
        inside = torch.where(before < prefix_lengths[n], before, before - prefix_lengths[n] + start_of[n])
        rows.append(torch.full_like(before, group_of[n]))
        columns.append(inside)
    return torch.cat(rows), torch.cat(columns)

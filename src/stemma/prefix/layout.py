"""The layout of one forward call: a run of the packed row, what lies above it, and the blocks its attention is made of.

A layout covers the packed tokens `[begin, end)` of a tree: the whole row, one node, or neighbouring subtrees under
one parent. Whatever lies above that run is its *context*: the path from the root, whose keys and values are handed in
and which all queries see. A packed forward has no context; a streamed one walks the tree and hands each part the keys
and values of its path.

The attention of a layout is a list of `Block`: query rows, key rows, and whether the square between them is
causal.
No block needs a mask, and together they cover each visible (query, key) pair exactly once:

- full attention: one causal square a node (its tokens among themselves), one full rectangle an inner node (its keys,
  all queries below it), one full rectangle for the context;
- a sliding window `W` (key visible when `position_q - position_k < W`): causal squares along the node, and for keys
  that leave the window while the queries walk on, a triangle. In reversed order of both queries and keys that triangle
  is an ordinary causal square, so it needs no mask either. Keys above a node are gathered, at most `W - 1` a node.

Trade-off: a windowed layer whose window is shorter than the longest sequence gathers keys per node instead of sharing
one rectangle per inner node. It stays exact and never builds a mask; it makes more and smaller kernel calls.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from stemma.prefix.radix import ranges
from stemma.prefix.tree import PrefixTree

__all__ = ["Block", "Layout"]

Rows = slice | torch.Tensor
"""Rows of a packed tensor: a slice (no copy), or an int64 index `(rows,)`, or `(blocks, rows)` for several."""

_BATCHED_TOKENS = 32
"""Squares with fewer tokens than this are gathered into batches; above it a kernel call costs less than the copy."""


@dataclass(frozen=True)
class Block:
    """Some queries against some keys, or several such squares in one call."""

    query: Rows
    """Rows that ask."""
    key: Rows
    """Rows of keys."""
    causal: bool
    """Row `i` of the queries sees rows `0..i` of the keys; else it sees all of them."""
    first: bool = False
    """No earlier block wrote to these queries, so the output is stored and not merged."""
    count: int = 1
    """Number of equally long squares that a slice holds, one behind the other."""
    valid: torch.Tensor | None = None
    """`(blocks, rows)` bool for an index of several squares of unequal length: False where a row only fills up (it
    repeats the last valid row of its square, and its output is thrown away). None when all rows are valid."""


@dataclass(eq=False)
class Layout:
    """Where the tokens of one forward call stand. Made by `of`; `T` tokens, `C` context tokens.

    Key rows number the context first: the key of token `t` is row `C + t`.
    """

    tokens: np.ndarray
    """`(T,)` token ids."""
    positions: np.ndarray
    """`(T,)` positions, the depth of each token in the tree."""
    subtree_end: np.ndarray
    """`(T,)`: token `q` sees token `k` exactly when `k <= q < subtree_end[k]` (and the whole context)."""
    node_start: np.ndarray
    """`(R,)` first token of each node."""
    node_end: np.ndarray
    """`(R,)` behind the last own token."""
    node_subtree_end: np.ndarray
    """`(R,)` behind the last token below."""
    node_parent: np.ndarray
    """`(R,)` parent node, -1 when the parent is the context or the empty root."""
    context: int
    """`C`, the number of tokens above the run."""
    max_length: int
    """Longest path, context included."""
    _memory: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, tree: PrefixTree, begin: int = 0, end: int | None = None) -> "Layout":
        """The layout of packed tokens `[begin, end)`: a node's own tokens, or subtrees with one parent."""
        end = tree.unique_tokens if end is None else end
        low = int(np.searchsorted(tree.node_start, begin))
        high = int(np.searchsorted(tree.node_start, end))
        parent = tree.node_parent[low:high] - low
        starts = tree.node_start[low:high]
        depth = tree.node_depth[low:high]
        length = tree.node_length[low:high]
        subtree_end = np.minimum(tree.node_subtree_end[low:high], end) - begin
        return cls(
            tokens=tree.packed_tokens[begin:end],
            positions=ranges(depth, length),
            subtree_end=np.repeat(subtree_end, length),
            node_start=starts - begin,
            node_end=starts - begin + length,
            node_subtree_end=subtree_end,
            node_parent=np.maximum(parent, -1),
            context=int(depth[0]),
            max_length=int((depth + length).max()),
        )

    @property
    def num_tokens(self) -> int:
        """`T`."""
        return int(self.tokens.size)

    def pairs(self, window: int | None = None) -> int:
        """Number of visible (query, key) pairs, context included."""
        seen = self.positions + 1
        return int((seen if window is None else np.minimum(seen, window)).sum())

    def blocks(self, window: int | None = None, device: torch.device | str = "cpu") -> list[Block]:
        """The blocks of a layer, built once for each window and device.

        Args:
            window: sliding window in tokens, the query's own included; None or at least `max_length` for full
                attention.
            device: where index tensors live.
        """
        if window is not None and window >= self.max_length:
            window = None
        where = torch.device(device)

        def build() -> list[Block]:
            blocks = self._full_blocks() if window is None else self._windowed_blocks(window)
            return [_to_device(block, where) for block in blocks]

        return self.remember(("blocks", window, where), build)

    def remember(self, key: Any, build: Callable[[], Any]) -> Any:
        """What `build` gave for `key` the first time: all layers of a forward share one schedule."""
        if key not in self._memory:
            self._memory[key] = build()
        return self._memory[key]

    # ------------------------------------------------------------------ full attention

    def _full_blocks(self) -> list[Block]:
        shift = self.context
        starts, ends = self.node_start, self.node_end
        lengths = ends - starts
        blocks: list[Block] = []
        short = [np.zeros(0, dtype=np.int64)]
        cuts = np.flatnonzero((lengths[1:] != lengths[:-1]) | (starts[1:] != ends[:-1])) + 1
        for run in np.split(np.arange(lengths.size), cuts):  # equally long nodes, one behind the other
            if run.size * lengths[run[0]] <= _BATCHED_TOKENS:
                short.append(run)
            else:
                blocks.append(_square(int(starts[run[0]]), int(ends[run[-1]]), shift, int(run.size)))
        lone = np.concatenate(short)
        for nodes in _buckets(lone[np.argsort(lengths[lone], kind="stable")], lengths):
            if nodes.size > 1:
                blocks.append(_batched_square(starts[nodes], lengths[nodes], shift))
            else:
                blocks.append(_square(int(starts[nodes[0]]), int(ends[nodes[0]]), shift))
        for node in np.flatnonzero(self.node_subtree_end > self.node_end).tolist():
            below = slice(int(self.node_end[node]), int(self.node_subtree_end[node]))
            own = slice(int(self.node_start[node]) + shift, int(self.node_end[node]) + shift)
            blocks.append(Block(below, own, causal=False))
        if shift:
            blocks.append(Block(slice(0, self.num_tokens), slice(0, shift), causal=False))
        return blocks

    # ------------------------------------------------------------------ sliding window

    def _windowed_blocks(self, window: int) -> list[Block]:
        squares: list[Block] = []
        others: list[Block] = []
        shift = self.context
        tails: dict[int, np.ndarray] = {-1: np.arange(max(0, shift - window + 1), shift)}
        for node in range(self.node_start.size):
            start, end = int(self.node_start[node]), int(self.node_end[node])
            above = tails[int(self.node_parent[node])]
            own = np.arange(start, end)
            tails[node] = np.concatenate([above, own + shift])[-(window - 1) :] if window > 1 else own[:0]
            for begin in range(start, end, window):
                part = slice(begin, min(begin + window, end))
                squares.append(Block(part, _shifted(part, shift), causal=True, first=True))
                if begin > start:
                    before = own[begin - start - window : begin - start] + shift
                    others += _band(own[begin - start : part.stop - start], before, window, window)
            if above.size:
                others += _band(own[: window - 1], above, above.size, window)
        return squares + others


def _band(queries: np.ndarray, keys: np.ndarray, distance: int, window: int) -> list[Block]:
    """Blocks for consecutive keys before consecutive queries under a window.

    Query `i` stands `distance + i - j` tokens behind key `j` and sees it when that is less than `window`, that
    is when `j >= i + lag` with `lag = distance - window + 1`: a rectangle for the queries that see all keys, then
    for the rest a rectangle on the keys that all of them see, and the triangle between.
    """
    lag = distance - window + 1
    blocks = []
    whole = min(max(1 - lag, 0), queries.size)
    if whole:
        blocks.append(Block(_rows(queries[:whole]), _rows(keys), causal=False))
    stop = min(queries.size, keys.size - lag)
    if stop > whole:
        blocks.append(Block(_rows(queries[whole:stop]), _rows(keys[stop - 1 + lag :]), causal=False))
        if stop - 1 > whole:
            blocks.append(
                Block(
                    torch.from_numpy(queries[whole : stop - 1][::-1].copy()),
                    torch.from_numpy(keys[whole + lag : stop - 1 + lag][::-1].copy()),
                    causal=True,
                )
            )
    return blocks


def _rows(index: np.ndarray) -> Rows:
    """A slice where the rows are consecutive, else an index."""
    if index[-1] - index[0] + 1 == index.size:
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(np.ascontiguousarray(index))


def _shifted(rows: slice, shift: int) -> slice:
    return slice(rows.start + shift, rows.stop + shift)


def _buckets(nodes: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Split nodes sorted by length where the longest of a bucket would exceed its shortest by more than a quarter."""
    buckets: list[np.ndarray] = []
    begin = 0
    for position in range(1, nodes.size + 1):
        if position == nodes.size or lengths[nodes[position]] > 1.25 * lengths[nodes[begin]] + 4:
            buckets.append(np.sort(nodes[begin:position]))
            begin = position
    return buckets


def _square(begin: int, end: int, shift: int, count: int = 1) -> Block:
    """Causal squares of `count` equally long nodes that fill `[begin, end)`."""
    own = slice(begin, end)
    return Block(own, _shifted(own, shift), causal=True, first=True, count=count)


def _batched_square(starts: np.ndarray, lengths: np.ndarray, shift: int) -> Block:
    longest = int(lengths.max())
    equal = bool((lengths == longest).all())
    offset = np.arange(longest)[None, :]
    index = starts[:, None] + np.minimum(offset, lengths[:, None] - 1)
    valid = None if equal else torch.from_numpy(offset < lengths[:, None])
    return Block(torch.from_numpy(index), torch.from_numpy(index + shift), causal=True, first=True, valid=valid)


def _to_device(block: Block, device: torch.device) -> Block:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return replace(block, query=move(block.query), key=move(block.key), valid=move(block.valid))

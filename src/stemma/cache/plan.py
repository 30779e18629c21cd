"""Which runs of a prefix tree are read once for all rows below them, and which each row keeps for itself.

A shared run costs one more kernel call and merge in every layer and step. Handing its tokens down to what lies below it
saves that call, and costs the reading (and keeping) of one more copy for every further branch. A run is shared when the
copies weigh more than the call; both are counted in bytes of keys and values, a call as `CALL_BYTES`.

What is handed down all the way becomes the *tail* of a row. Tails go in front of the row's generated tokens, padded to
the longest, and are read in the one batched call that the generated tokens need anyway; tails so long that the padding
of all others would cost more than a call of their own stay rectangles of one row. With one row, or short prefixes, all
tokens end up in tails: that is the ordinary dense cache, so sharing never costs more than it.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["CALL_BYTES", "PrefixNodes", "Rectangle", "SharingPlan", "plan_sharing"]

CALL_BYTES = 1 << 20
"""Bytes of keys and values whose reading takes as long as one more kernel call and merge (measured on one CPU core
while a model decodes, which leaves neither keys nor instructions in its caches: about 100 microseconds)."""


@dataclass(frozen=True, eq=False)
class PrefixNodes:
    """The nodes of a prefix tree in depth-first pre-order, and the rows through each. Arrays are int64.

    Rows are numbered in the order of the tree, so those through a node are consecutive; rows without any prefix may
    stand anywhere outside.
    """

    parent: np.ndarray
    """`(R,)` index of the parent, -1 at the root."""
    length: np.ndarray
    """`(R,)` tokens of each node."""
    first: np.ndarray
    """`(R,)` first row through the node."""
    last: np.ndarray
    """`(R,)` behind the last row."""
    num_rows: int

    @property
    def depth(self) -> np.ndarray:
        """`(R,)`: tokens above each node."""
        depth = np.zeros(self.parent.size, dtype=np.int64)
        for node, parent in enumerate(self.parent):
            if parent >= 0:
                depth[node] = depth[parent] + self.length[parent]
        return depth

    @property
    def row_tokens(self) -> np.ndarray:
        """`(rows,)`: prefix tokens of each row."""
        tokens = np.zeros(self.num_rows, dtype=np.int64)
        for first, last, length in zip(self.first, self.last, self.length, strict=True):
            tokens[first:last] += length
        return tokens


@dataclass(frozen=True)
class Rectangle:
    """Keys read once for the rows `[first, last)`."""

    nodes: tuple[int, ...]
    """Nodes whose tokens they are, each the parent of the next."""
    first: int
    last: int


@dataclass(frozen=True)
class SharingPlan:
    """Every prefix token of a row is in one of the rectangles that cover the row, or in its tail."""

    rectangles: tuple[Rectangle, ...]
    tails: tuple[tuple[int, ...], ...]
    """For each row the nodes whose tokens it keeps for itself, the last ones of its path."""


def plan_sharing(nodes: PrefixNodes, token_bytes: int, *, call_bytes: int = CALL_BYTES) -> SharingPlan:
    """Decide what is shared.

    Args:
        nodes: the tree.
        token_bytes: bytes of one token's keys and values in one layer.
        call_bytes: see `CALL_BYTES`; 0 shares every run that two rows have in common.
    """
    children: list[list[int]] = [[] for _ in range(nodes.parent.size)]
    roots: list[int] = []
    for node, parent in enumerate(nodes.parent.tolist()):
        (children[parent] if parent >= 0 else roots).append(node)
    rectangles: list[Rectangle] = []
    tails: list[tuple[int, ...]] = [()] * nodes.num_rows
    stack: list[tuple[int, tuple[int, ...]]] = [(node, ()) for node in reversed(roots)]
    while stack:
        node, above = stack.pop()
        run = (*above, node)
        first, last = int(nodes.first[node]), int(nodes.last[node])
        below = children[node]
        ending = np.ones(last - first, dtype=bool)
        for child in below:
            ending[nodes.first[child] - first : nodes.last[child] - first] = False
        copies = len(below) + int(ending.sum())
        if last - first > 1 and copies == 1:  # a chain, as of a prefix that was extended: rows decide
            copies = last - first
        tokens = int(nodes.length[list(run)].sum())
        if copies > 1 and (copies - 1) * tokens * token_bytes >= call_bytes:
            rectangles.append(Rectangle(run, first, last))
            run = ()
        for row in np.flatnonzero(ending).tolist():
            tails[first + row] = run
        stack.extend((child, run) for child in reversed(below))
    limit = _longest_tail([int(nodes.length[list(tail)].sum()) for tail in tails], token_bytes, call_bytes)
    for place, tail in enumerate(tails):
        if int(nodes.length[list(tail)].sum()) > limit:
            rectangles.append(Rectangle(tail, place, place + 1))
            tails[place] = ()
    return SharingPlan(tuple(rectangles), tuple(tails))


def _longest_tail(lengths: list[int], token_bytes: int, call_bytes: int) -> int:
    """The tail length up to which rows keep their tails, at least cost: padding of all rows against calls of some."""

    def cost(limit: int) -> int:
        longer = [length for length in lengths if length > limit]
        return len(lengths) * limit * token_bytes + sum(length * token_bytes + call_bytes for length in longer)

    return min(sorted({0, *lengths}), key=cost)

"""Building blocks of the prefix tree: token rows read in, and the radix nodes of sorted rows."""

from typing import Any

import numpy as np

from stemma.errors import InvalidBatchError

__all__ = ["as_ids", "as_matrix", "radix_nodes", "ranges"]

_MAX_TOKEN_ID = 2**31 - 1


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate `arange(start, start + length)` for each pair, without a loop.

    Args:
        starts: `(R,)` int64.
        lengths: `(R,)` int64, zero allowed.

    Returns:
        `(lengths.sum(),)` int64.
    """
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


def as_ids(sequence: Any, name: str) -> np.ndarray:
    """Token ids of one sequence as `(length,)` int64; `name` is what an InvalidBatchError calls it."""
    array = np.asarray(sequence.detach().cpu() if hasattr(sequence, "detach") else sequence)
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InvalidBatchError(
            f"{name} must be a one-dimensional run of integer token ids, got shape {array.shape} of {array.dtype}."
        )
    if array.min() < 0 or array.max() > _MAX_TOKEN_ID:
        raise InvalidBatchError(
            f"{name} has token ids between {array.min()} and {array.max()}; they must lie in 0..{_MAX_TOKEN_ID}. "
            "Padding and labels such as -100 do not belong into a sequence."
        )
    return array.astype(np.int64)


def as_matrix(value: Any, name: str) -> np.ndarray:
    """A padded matrix `(rows, columns)` as numpy; `name` is what an InvalidBatchError calls it."""
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.ndim != 2 or array.size == 0:
        raise InvalidBatchError(f"{name} must be a non-empty (rows, columns) matrix, got shape {array.shape}.")
    return array


def radix_nodes(rows: list[np.ndarray], min_shared: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Nodes of the radix tree over sorted rows, in pre-order.

    Returns:
        `first`, `last` (the range of rows through each node), `bottom` (tokens from the root to the node's end)
        and `parent`, each `(R,)` int64.
    """
    # Compressed trie by the classical stack over neighbours' common prefixes. Entry: [first row, bottom, row range
    # end].
    nodes: list[list[int]] = []
    stack: list[list[int]] = []
    previous: np.ndarray | None = None
    for index, row in enumerate(rows):
        shared = 0
        if previous is not None:
            shorter = min(previous.size, row.size)
            differs = previous[:shorter] != row[:shorter]
            shared = int(differs.argmax()) if differs.any() else shorter
        popped: list[int] | None = None
        while stack and stack[-1][1] > shared:
            popped = stack.pop()
            popped[2] = index
        if popped is not None and shared > 0 and (not stack or stack[-1][1] < shared):
            nodes.append([popped[0], shared, -1])
            stack.append(nodes[-1])
        if row.size > (stack[-1][1] if stack else 0):
            nodes.append([index, row.size, -1])
            stack.append(nodes[-1])
        previous = row
    for node in stack:
        node[2] = len(rows)
    nodes.sort(key=lambda node: (node[0], node[1]))

    # Top down: a shared run below the threshold is handed to its children; rows that end there become leaves.
    kept: list[tuple[int, int, int, int]] = []  # first, last, bottom, parent
    open_nodes: list[tuple[int, int, int]] = []  # (range end, bottom, kept index or -1) of the path being walked
    for position, (first, bottom, last) in enumerate(nodes):
        while open_nodes and open_nodes[-1][0] <= first:
            open_nodes.pop()
        parent, top = (open_nodes[-1][2], open_nodes[-1][1]) if open_nodes else (-1, 0)
        child = nodes[position + 1] if position + 1 < len(nodes) else None
        is_leaf = child is None or child[0] >= last
        if is_leaf or bottom - top >= min_shared:
            open_nodes.append((last, bottom, len(kept)))
            kept.append((first, last, bottom, parent))
            continue
        assert child is not None
        if child[0] > first:
            kept.append((first, child[0], bottom, parent))
        open_nodes.append((last, top, parent))
    table = np.array(kept, dtype=np.int64)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]

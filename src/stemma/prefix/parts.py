"""Cut a tree, or a batch of its sequences, into parts of at most so many tokens."""

from dataclasses import dataclass, field

import numpy as np

from stemma.prefix.tree import PrefixTree

__all__ = ["Part", "partition", "plain_rows"]


@dataclass(frozen=True, eq=False)
class Part:
    """Packed tokens ``[begin, end)`` that run in one call, and the parts below them."""

    begin: int
    end: int
    sequences: np.ndarray
    """Sequences that end in this part."""
    below: list["Part"] = field(default_factory=list)


def partition(tree: PrefixTree, max_tokens: int, parent: int = -1) -> list[Part]:
    """Cut the subtrees below ``parent`` (-1: the root) into parts of at most ``max_tokens`` packed tokens.

    A node whose own run is longer than ``max_tokens`` makes a part of its own, longer than that.
    """
    parts: list[Part] = []
    run: list[int] = []

    def close() -> None:
        if run:
            ending = tree.order[tree.node_first[run[0]] : tree.node_last[run[-1]]]
            parts.append(Part(int(tree.node_start[run[0]]), int(tree.node_subtree_end[run[-1]]), ending))
            run.clear()

    for node in tree.children(parent):
        begin, end = int(tree.node_start[node]), int(tree.node_subtree_end[node])
        if run and end - tree.node_start[run[0]] > max_tokens:
            close()
        own_end = begin + int(tree.node_length[node])
        if end - begin <= max_tokens or own_end == end:
            run.append(node)
            continue
        close()
        first_below = int(tree.node_first[node + 1])
        ending = tree.order[tree.node_first[node] : first_below]
        parts.append(Part(begin, own_end, ending, partition(tree, max_tokens, node)))
    close()
    return parts


def plain_rows(tree: PrefixTree, max_tokens: int | None) -> list[np.ndarray]:
    """Sequences of each padded micro-batch of the plain forward, in order, at most ``max_tokens`` with padding."""
    if max_tokens is None:
        return [np.arange(tree.num_sequences)]
    rows: list[list[int]] = []
    width = 0
    for index, length in enumerate(tree.lengths):
        width = max(width, int(length))
        if not rows or width * (len(rows[-1]) + 1) > max_tokens:
            rows.append([])
            width = int(length)
        rows[-1].append(index)
    return [np.array(row) for row in rows]

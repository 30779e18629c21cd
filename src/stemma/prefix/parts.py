"""Cut a tree, or a batch of its sequences, into parts of at most so many tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from stemma.prefix.tree import PrefixTree

__all__ = ["Part", "partition", "plain_rows", "walk"]


@dataclass(frozen=True, eq=False)
class Part:
    """Packed tokens `[begin, end)` that run in one call, and the parts below them."""

    begin: int
    end: int
    sequences: np.ndarray
    """Sequences that end in this part."""
    below: list["Part"] = field(default_factory=list)


def partition(tree: PrefixTree, max_tokens: int) -> list[Part]:
    """Cut a tree into parts of at most `max_tokens` packed tokens.

    A part is a run of neighbouring subtrees, or a run of nodes of which each is the only child of the one before. A
    node whose own run is longer than `max_tokens` makes a part of its own, longer than that.
    """
    parts: list[Part] = []
    rest: list[tuple[list[int], list[Part]]] = [(list(tree.children(-1)), parts)]
    while rest:
        siblings, found = rest.pop()
        run: list[int] = []
        for node in siblings:
            begin, end = int(tree.node_start[node]), int(tree.node_subtree_end[node])
            if run and end - tree.node_start[run[0]] > max_tokens:
                found.append(_subtrees(tree, run))
                run = []
            last, below = node, list(tree.children(node))
            if end - begin <= max_tokens or not below:
                run.append(node)
                continue
            if run:
                found.append(_subtrees(tree, run))
                run = []
            while len(below) == 1 and _own_end(tree, below[0]) - begin <= max_tokens:
                last, below = below[0], list(tree.children(below[0]))
            ending = tree.order[tree.node_first[node] : tree.node_first[below[0]]]
            found.append(Part(begin, _own_end(tree, last), ending))
            rest.append((below, found[-1].below))
        if run:
            found.append(_subtrees(tree, run))
    return parts


def _subtrees(tree: PrefixTree, run: list[int]) -> Part:
    ending = tree.order[tree.node_first[run[0]] : tree.node_last[run[-1]]]
    return Part(int(tree.node_start[run[0]]), int(tree.node_subtree_end[run[-1]]), ending)


def _own_end(tree: PrefixTree, node: int) -> int:
    return int(tree.node_start[node] + tree.node_length[node])


def walk(parts: list[Part]) -> Iterator[tuple[Part, bool]]:
    """Each part twice, before and after the parts below it; the flag says whether it is entered."""
    rest = [(part, True) for part in reversed(parts)]
    while rest:
        part, enters = rest.pop()
        yield part, enters
        if enters:
            rest.append((part, False))
            rest += [(below, True) for below in reversed(part.below)]


def plain_rows(tree: PrefixTree, max_tokens: int | None) -> list[np.ndarray]:
    """Sequences of each padded micro-batch of the plain forward, in order, at most `max_tokens` with padding."""
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

"""Random prefix trees for property tests, and the slow truth about them."""

import numpy as np
from hypothesis import strategies as st

from stemma.prefix.layout import Layout
from stemma.prefix.tree import PrefixTree

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=10)
"""Few distinct ids, so that shared runs, duplicates and sequences that are prefixes of others are common."""

trees = st.builds(
    lambda rows, min_shared: PrefixTree.from_sequences(rows, min_shared=min_shared), sequences, st.integers(1, 4)
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """The layout of a whole tree, of a subtree under its path, or of one inner node alone."""
    tree = draw(trees)
    kind = draw(st.sampled_from(["whole", "subtree", "node"]))
    if kind == "whole":
        return Layout.of(tree)
    node = draw(st.integers(0, tree.num_nodes - 1))
    begin = int(tree.node_start[node])
    end = int(tree.node_subtree_end[node]) if kind == "subtree" else begin + int(tree.node_length[node])
    return Layout.of(tree, begin, end)


def visible_pairs(layout: Layout, window: int | None) -> np.ndarray:
    """``(T, C + T)`` bool, spelled out pair by pair from the definition: a token sees its own path, in the window."""
    seen = np.zeros((layout.num_tokens, layout.context + layout.num_tokens), dtype=bool)
    for node in range(layout.node_start.size):
        path = list(range(layout.context))
        ancestors = []
        above = int(layout.node_parent[node])
        while above >= 0:
            ancestors.append(above)
            above = int(layout.node_parent[above])
        for ancestor in reversed(ancestors):
            path += [layout.context + t for t in range(layout.node_start[ancestor], layout.node_end[ancestor])]
        for token in range(layout.node_start[node], layout.node_end[node]):
            path.append(layout.context + token)
            for key in path[-window:] if window is not None else path:
                seen[token, key] = True
    return seen

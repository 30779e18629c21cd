"""Attention over a prefix tree: exact blocks, merged by log-sum-exp. Pure functions on tensors."""

from stemma.attention.tree import reference_tree_attention, tree_attention

__all__ = ["reference_tree_attention", "tree_attention"]

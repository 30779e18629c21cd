"""The economy of sharing: tokens, attention pairs, FLOPs and bytes of a tree, shared against repeated.

Cost of one forward, `2 N T + 4 d A + 2 h V M` FLOPs, with `N` weights that each token passes, `T` tokens, `d`
query width, `A` attended pairs summed over layers, `h` hidden size, `V` vocabulary and `M` positions that reach
the head; a backward costs twice that. (Prefix Grouper, arXiv 2506.05433, appendix A.2, counts the same terms with whole
squares.)
"""

from dataclasses import dataclass

import numpy as np

from stemma.prefix.layout import Layout
from stemma.prefix.tree import PrefixTree

__all__ = ["Economy", "ModelShape", "economy"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder that its cost depends on."""

    body_weights: int
    """`N`: weights that one token passes, without embedding and head; of experts, the active ones."""
    query_width: int
    """`d`: query heads times head size."""
    key_value_width: int
    """Key/value heads times head size."""
    hidden_size: int
    """`h`."""
    vocabulary: int
    """`V`."""
    windows: tuple[int | None, ...]
    """Attention window of each layer, None for full attention."""
    bytes_per_value: int
    """Of keys and values."""


@dataclass(frozen=True, kw_only=True)
class Economy:
    """What a tree costs, shared against each sequence alone in a padded batch."""

    total_tokens: int
    """Tokens of all sequences."""
    padded_tokens: int
    """The same, padded to the longest."""
    unique_tokens: int
    """Tokens that a shared forward encodes."""
    plain_pairs: int
    """Attended pairs of all sequences, one layer of full attention."""
    shared_pairs: int
    """Attended pairs of the tree, one layer of full attention."""
    plain_scored: int
    """Positions that reach the head, each sequence alone."""
    shared_scored: int
    """Positions that reach the head, shared."""
    plain_flops: float
    """Forward of the padded batch."""
    shared_flops: float
    """Forward of the tree."""
    plain_key_value_bytes: int
    """Keys and values of the padded batch, all layers."""
    shared_key_value_bytes: int
    """Keys and values of the tree, all layers."""

    @property
    def token_ratio(self) -> float:
        """Total over unique tokens."""
        return self.total_tokens / self.unique_tokens

    @property
    def flops_ratio(self) -> float:
        """The most by which sharing can be faster than the padded batch."""
        return self.plain_flops / self.shared_flops


def economy(tree: PrefixTree, shape: ModelShape) -> Economy:
    """Count what the tree costs under a model of the given shape."""
    layout = Layout.of(tree)
    lengths, counts = np.unique(tree.lengths, return_counts=True)

    def plain_pairs(window: int | None) -> int:
        # A sequence of n tokens sees 1 + 2 + ... + n keys, at most a window of them each.
        full = lengths if window is None else np.minimum(lengths, window)
        beyond = 0 if window is None else (lengths - full) * window
        return int(((full * (full + 1) // 2 + beyond) * counts).sum())

    padded = tree.num_sequences * tree.max_length
    plain_scored = int(tree.scored.sum())
    predicting = np.zeros(tree.unique_tokens, dtype=bool)
    predicting[tree.previous[tree.scored_targets]] = True
    shared_scored = int(predicting.sum())
    plain_of = {window: plain_pairs(window) for window in {None, *shape.windows}}
    shared_of = {window: layout.pairs(window) for window in {None, *shape.windows}}

    def flops(tokens: int, pairs: int, scored: int) -> float:
        return (
            2.0 * shape.body_weights * tokens
            + 4.0 * shape.query_width * pairs
            + 2.0 * shape.hidden_size * shape.vocabulary * scored
        )

    per_token = 2 * shape.key_value_width * shape.bytes_per_value * len(shape.windows)
    return Economy(
        total_tokens=tree.total_tokens,
        padded_tokens=padded,
        unique_tokens=tree.unique_tokens,
        plain_pairs=plain_of[None],
        shared_pairs=shared_of[None],
        plain_scored=plain_scored,
        shared_scored=shared_scored,
        plain_flops=flops(padded, sum(plain_of[w] for w in shape.windows), plain_scored),
        shared_flops=flops(tree.unique_tokens, sum(shared_of[w] for w in shape.windows), shared_scored),
        plain_key_value_bytes=padded * per_token,
        shared_key_value_bytes=tree.unique_tokens * per_token,
    )

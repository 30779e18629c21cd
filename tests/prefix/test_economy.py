"""The economy of a tree against counting pair by pair."""

import numpy as np
from hypothesis import given

from stemma.prefix.economy import ModelShape, economy
from stemma.prefix.layout import Layout
from trees import trees, visible_pairs

SHAPE = ModelShape(
    body_weights=1000,
    query_width=8,
    key_value_width=4,
    hidden_size=16,
    vocabulary=50,
    windows=(None, 3),
    bytes_per_value=2,
)


@given(trees)
def test_counts_equal_counting(tree):
    cost = economy(tree, SHAPE)
    layout = Layout.of(tree)
    lengths = tree.lengths.tolist()
    assert cost.plain_pairs == sum(length * (length + 1) // 2 for length in lengths)
    assert cost.shared_pairs == visible_pairs(layout, None).sum()
    assert cost.padded_tokens == max(lengths) * len(lengths)
    assert cost.plain_scored == sum(length - 1 for length in lengths)
    predicting = {tuple(tree.sequence(i)[:t]) for i in range(len(lengths)) for t in range(1, lengths[i])}
    assert cost.shared_scored >= len(predicting)  # more only where min_shared keeps copies apart
    windowed = sum(min(t + 1, 3) for length in lengths for t in range(length))
    assert cost.plain_flops == 2000 * cost.padded_tokens + 32 * (cost.plain_pairs + windowed) + 1600 * cost.plain_scored
    shared = visible_pairs(layout, None).sum() + visible_pairs(layout, 3).sum()
    assert cost.shared_flops == 2000 * cost.unique_tokens + 32 * shared + 1600 * cost.shared_scored
    assert cost.shared_key_value_bytes == tree.unique_tokens * 2 * 4 * 2 * 2


def test_published_bound_of_prefix_grouper():
    """P=1024, R=128, G=8: token ratio 4.50 and attention ratio 3.24 (squares counted whole, as the paper does)."""
    from stemma import PrefixTree

    random = np.random.default_rng(0)
    tree = PrefixTree.from_groups([random.integers(0, 99, 1024)], [random.integers(0, 99, (8, 128))])
    cost = economy(tree, SHAPE)
    assert round(cost.token_ratio, 2) == 4.50
    assert round(cost.plain_pairs / cost.shared_pairs, 2) == 3.24

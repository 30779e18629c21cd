"""The blocks of a layout cover each visible pair exactly once, and nothing else."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stemma.attention.varlen import schedule
from stemma.prefix.layout import Block, Layout
from stemma.prefix.tree import PrefixTree
from trees import layouts, visible_pairs


def _squares(block: Block):
    """(query rows, key rows) of each square of a block, as lists."""

    def rows(index):
        if isinstance(index, slice):
            return np.split(np.arange(index.start, index.stop), block.count)
        return index.numpy() if index.dim() == 2 else index.numpy()[None]

    for number, (query, key) in enumerate(zip(rows(block.query), rows(block.key), strict=True)):
        keep = slice(None) if block.valid is None else block.valid[number].numpy()
        yield query[keep], key[keep]


@given(layouts(), st.sampled_from([None, 1, 2, 3, 5, 100]))
def test_blocks_cover_each_visible_pair_once(layout, window):
    count = np.zeros((layout.num_tokens, layout.context + layout.num_tokens), dtype=int)
    written = np.zeros(layout.num_tokens, dtype=int)
    for block in layout.blocks(window):
        for query, key in _squares(block):
            inside = np.tri(query.size, key.size, dtype=int) if block.causal else 1
            count[np.ix_(query, key)] += inside
            assert block.first == (not written[query].any()), "the first answer is stored, every later one merged"
            written[query] += 1
    assert np.array_equal(count, visible_pairs(layout, window))
    assert layout.pairs(window) == count.sum()


@given(layouts())
def test_one_integer_a_token_is_the_whole_mask(layout):
    index = np.arange(layout.num_tokens)
    seen = (index[None] <= index[:, None]) & (index[:, None] < layout.subtree_end[None])
    assert np.array_equal(seen, visible_pairs(layout, None)[:, layout.context :])


@given(layouts(), st.sampled_from([None, 2, 5]))
def test_a_variable_length_call_never_answers_a_query_twice(layout, window):
    for call in schedule(layout, window, device="cpu"):
        rows = np.arange(call.query.start, call.query.stop) if isinstance(call.query, slice) else call.query.numpy()
        assert np.unique(rows).size == rows.size == call.query_ends[-1]


def test_full_attention_takes_one_call_for_squares_and_one_for_each_inner_level():
    random = np.random.default_rng(0)
    stem = random.integers(0, 99, 9).tolist()
    rows = [stem + [1] * 9 + [2, leaf] for leaf in range(4)] + [stem + [3] * 9 + [4, leaf] for leaf in range(4)]
    tree = PrefixTree.from_sequences(rows)
    calls = schedule(Layout.of(tree), None, device="cpu")
    assert tree.depth == 3
    assert [call.causal for call in calls] == [True, False, False]


def test_a_batch_of_groups_makes_few_calls():
    random = np.random.default_rng(0)
    prompts = random.integers(0, 99, (4, 300))
    tree = PrefixTree.from_groups(prompts, random.integers(0, 99, (4, 16, 50)))
    blocks = Layout.of(tree).blocks()
    # four prompts' squares, four rectangles, and each prompt's 16 responses in one call where they lie
    assert len(blocks) == 12
    assert all(isinstance(block.query, slice) for block in blocks)

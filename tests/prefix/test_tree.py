"""The prefix tree against its definition: distinct prefixes, paths, and what may not be a batch."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stemma import InvalidBatchError, PrefixTree
from trees import sequences, trees


@given(sequences)
def test_nodes_hold_each_distinct_prefix_once(rows):
    prefixes = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
    assert PrefixTree.from_sequences(rows, min_shared=1).unique_tokens == len(prefixes)


@given(sequences, st.integers(1, 5))
def test_paths_spell_the_sequences(rows, min_shared):
    tree = PrefixTree.from_sequences(rows, min_shared=min_shared)
    previous, positions, end = tree.previous, tree.positions, tree.subtree_end
    for index, row in enumerate(rows):
        path = tree.path[tree.offsets[index] : tree.offsets[index + 1]]
        assert tree.packed_tokens[path].tolist() == row
        assert positions[path].tolist() == list(range(len(row)))
        assert previous[path].tolist() == [-1, *path[:-1].tolist()]
        last = path[-1]
        assert [k for k in range(tree.unique_tokens) if k <= last < end[k]] == path.tolist()


@given(sequences, st.integers(1, 5))
def test_multiplicity_counts_sequences_and_sums_to_all_tokens(rows, min_shared):
    tree = PrefixTree.from_sequences(rows, min_shared=min_shared)
    assert tree.multiplicity.sum() == tree.total_tokens == sum(map(len, rows))
    assert np.array_equal(np.bincount(tree.path, minlength=tree.unique_tokens), tree.multiplicity)


@given(sequences, st.integers(1, 6))
def test_inner_nodes_are_at_least_min_shared_long(rows, min_shared):
    tree = PrefixTree.from_sequences(rows, min_shared=min_shared)
    inner = tree.node_subtree_end > tree.node_start + tree.node_length
    assert (tree.node_length[inner] >= min_shared).all()
    assert (tree.node_length > 0).all()
    assert tree.depth == tree.node_level.max() + 1
    assert sum(len(list(tree.children(node))) for node in range(-1, tree.num_nodes)) == tree.num_nodes


@given(sequences, st.randoms(use_true_random=False))
def test_order_of_sequences_does_not_change_the_tree(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    tree, shuffled = PrefixTree.from_sequences(rows), PrefixTree.from_sequences([rows[i] for i in order])
    assert np.array_equal(tree.packed_tokens, shuffled.packed_tokens)
    assert np.array_equal(tree.node_start, shuffled.node_start)


@given(trees, st.integers(1, 40))
def test_split_keeps_every_sequence_once_and_the_budget(tree, budget):
    parts = tree.split(budget)
    assert sorted(np.concatenate(parts).tolist()) == list(range(tree.num_sequences))
    for part in parts:
        row = tree.subset(part)
        assert row.unique_tokens <= budget or row.unique_tokens == row.max_length


def test_split_keeps_groups_whole_where_they_fit():
    prompts = [[10 + group] * 10 for group in range(4)]
    tree = PrefixTree.from_groups(prompts, [[[1, 2], [3, 4]]] * 4)
    assert [part.size for part in tree.split(28)] == [4, 4]


def test_groups_score_responses_and_number_columns_from_their_start():
    tree = PrefixTree.from_groups([[5, 6, 7], [8, 9]], [[[1, 2], [3]], [[4, 4, 4]]], min_shared=2)
    assert tree.lengths.tolist() == [5, 4, 5]
    assert tree.tokens[tree.scored].tolist() == [1, 2, 3, 4, 4, 4]
    assert tree.column[tree.scored].tolist() == [0, 1, 0, 0, 1, 2]
    assert (tree.num_columns, tree.unique_tokens, tree.token_ratio) == (3, 11, 14 / 11)


def test_padded_rows_of_either_side_give_the_tree_of_the_bare_sequences():
    ids = torch.tensor([[0, 0, 5, 6, 1, 2, 0], [0, 4, 5, 6, 3, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0]])
    tree = PrefixTree.from_padded(ids, mask, logits_to_keep=3)
    assert [tree.sequence(i).tolist() for i in range(2)] == [[5, 6, 1, 2], [4, 5, 6, 3]]
    assert tree.tokens[tree.scored].tolist() == [1, 2, 3]
    assert tree.column[tree.scored].tolist() == [0, 1, 0]
    hidden = PrefixTree.from_padded(ids, mask, logits_to_keep=3, completion_mask=[[0, 1, 0], [1, 0, 0]])
    assert hidden.tokens[hidden.scored].tolist() == [2, 3]


def test_an_empty_response_and_a_prompt_without_responses_are_fine():
    tree = PrefixTree.from_groups([[1, 2, 3], [4]], [[[], [7]], []])
    assert tree.num_sequences == 2
    assert tree.scored.sum() == 1


def test_256_sequences_of_8k_tokens_take_well_under_a_second():
    random = np.random.default_rng(0)
    prefix = random.integers(0, 150_000, size=4096)
    rows = [np.concatenate([prefix, random.integers(0, 150_000, size=4096)]) for _ in range(256)]
    begin = time.process_time()
    tree = PrefixTree.from_sequences(rows)
    assert time.process_time() - begin < 1.0
    assert tree.unique_tokens == 257 * 4096


BAD = {
    "empty": lambda: PrefixTree.from_sequences([]),
    "sequence 1 is empty": lambda: PrefixTree.from_sequences([[1], []]),
    "integer token ids": lambda: PrefixTree.from_sequences([[1.5]]),
    "one-dimensional": lambda: PrefixTree.from_sequences([[[1]]]),
    "token ids between -100": lambda: PrefixTree.from_sequences([[1, -100]]),
    "token ids between 1": lambda: PrefixTree.from_sequences([[1, 2**31]]),
    "min_shared": lambda: PrefixTree.from_sequences([[1]], min_shared=0),
    "2 prompts and 1 lists": lambda: PrefixTree.from_groups([[1], [2]], [[[3]]]),
    "no token before it": lambda: PrefixTree.from_groups([[]], [[[3]]]),
    "holes": lambda: PrefixTree.from_padded([[1, 2, 3]], [[1, 0, 1]]),
    "all zero": lambda: PrefixTree.from_padded([[1, 2], [1, 2]], [[1, 1], [0, 0]]),
    "one shape": lambda: PrefixTree.from_padded([[1, 2]], [[1]]),
    "logits_to_keep": lambda: PrefixTree.from_padded([[1, 2]], [[1, 1]], logits_to_keep=3),
    "no prompt token": lambda: PrefixTree.from_padded([[0, 2, 3]], [[0, 1, 1]], logits_to_keep=2),
    "completion_mask must be": lambda: PrefixTree.from_padded([[1, 2]], [[1, 1]], completion_mask=[[1, 1]]),
    "attention_mask hides": lambda: PrefixTree.from_padded([[1, 2, 0]], [[1, 1, 0]], completion_mask=[[1, 1]]),
    "max_tokens": lambda: PrefixTree.from_sequences([[1]]).split(0),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_batch_is_refused_by_name(message):
    with pytest.raises(InvalidBatchError, match=message):
        BAD[message]()

"""The planner covers every prefix token of every row once, and shares exactly where copies weigh more than a call."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stemma.cache.plan import PrefixNodes, plan_sharing
from trees import trees


def nodes_of(tree, repeats=1, handles=()):
    """The nodes of a tree, every sequence `repeats` times, below a chain of handles of these lengths."""
    chain, rows = len(handles), tree.num_sequences * repeats
    return PrefixNodes(
        np.concatenate([np.arange(chain) - 1, np.where(tree.node_parent >= 0, tree.node_parent + chain, chain - 1)]),
        np.concatenate([np.array(handles, dtype=np.int64), tree.node_length]),
        np.concatenate([np.zeros(chain, dtype=np.int64), tree.node_first * repeats]),
        np.concatenate([np.full(chain, rows), tree.node_last * repeats]),
        rows,
    )


def paths(nodes):
    """For each row its nodes from the root."""
    return [
        [n for n in range(nodes.parent.size) if nodes.first[n] <= row < nodes.last[n]] for row in range(nodes.num_rows)
    ]


@given(trees, st.integers(1, 3), st.lists(st.integers(1, 9), max_size=2), st.sampled_from([0, 1, 4, 20, 10**6]))
def test_every_row_reads_each_of_its_tokens_once(tree, repeats, handles, call_bytes):
    nodes = nodes_of(tree, repeats, handles)
    plan = plan_sharing(nodes, 1, call_bytes=call_bytes)
    for row, path in enumerate(paths(nodes)):
        read = [node for run in plan.rectangles if run.first <= row < run.last for node in run.nodes]
        assert sorted([*read, *plan.tails[row]]) == path
        assert list(plan.tails[row]) == path[len(path) - len(plan.tails[row]) :]  # the last ones
        assert nodes.row_tokens[row] == sum(nodes.length[path])
    for run in plan.rectangles:
        assert all(nodes.parent[below] == above for above, below in zip(run.nodes, run.nodes[1:]))


@given(trees, st.integers(1, 3))
def test_all_that_two_rows_share_is_shared_when_calls_are_free(tree, repeats):
    nodes = nodes_of(tree, repeats)
    plan = plan_sharing(nodes, 1, call_bytes=0)
    shared = {node for run in plan.rectangles if run.last - run.first > 1 for node in run.nodes}
    assert shared == set(np.flatnonzero(nodes.last - nodes.first > 1).tolist())


@given(trees)
def test_nothing_is_shared_when_calls_are_dear(tree):
    nodes = nodes_of(tree)
    plan = plan_sharing(nodes, 1, call_bytes=10**9)
    assert plan.rectangles == ()
    assert [list(tail) for tail in plan.tails] == paths(nodes)


def test_one_level_is_shared_from_the_bytes_that_pay_for_its_call():
    def shared(rows, tokens):
        nodes = PrefixNodes(np.array([-1]), np.array([tokens]), np.array([0]), np.array([rows]), rows)
        return len(plan_sharing(nodes, 10, call_bytes=1000).rectangles)

    assert [shared(3, tokens) for tokens in (49, 50)] == [0, 1]  # two copies of 10 bytes a token
    assert shared(1, 10**6) == 0


def test_a_short_header_is_merged_into_its_groups_and_a_long_one_is_not():
    def runs(header):
        nodes = PrefixNodes(
            np.array([-1, 0, 0]),
            np.array([header, 500, 500]),
            np.array([0, 0, 8]),
            np.array([16, 8, 16]),
            16,
        )
        return [run.nodes for run in plan_sharing(nodes, 10, call_bytes=1000).rectangles]

    assert runs(99) == [(0, 1), (0, 2)]
    assert runs(100) == [(0,), (1,), (2,)]


@pytest.mark.parametrize(("long", "expected"), [(50, 0), (5000, 1)])
def test_one_long_tail_does_not_pad_all_others(long, expected):
    lengths = np.array([long, 5, 5, 5])
    nodes = PrefixNodes(np.full(4, -1), lengths, np.arange(4), np.arange(1, 5), 4)
    plan = plan_sharing(nodes, 10, call_bytes=2000)
    assert [run.nodes for run in plan.rectangles] == [(0,)] * expected
    assert plan.tails[1:] == ((1,), (2,), (3,))

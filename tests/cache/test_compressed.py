"""Kept keys and values, and attention mass, against loops."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allocations import Largest
from stemma.cache.compressed import KeptStates, attention_mass, priority, retained_mass
from stemma.errors import InvalidBatchError


def reference(query, key, value, query_position, key_position, *, scale, window=None, softcap=None, sinks=None):
    """Output (heads, queries, dim) and probabilities (heads, queries, keys) of one row, query by query."""
    heads, queries, _ = query.shape
    group = heads // key.shape[0]
    probabilities = torch.zeros(heads, queries, key.shape[1], dtype=torch.float64)
    for head in range(heads):
        for i in range(queries):
            logits, seen = [], []
            for j in range(key.shape[1]):
                q, k = int(query_position[i]), int(key_position[j])
                if 0 <= k <= q and (window is None or q - k < window):
                    score = query[head, i] @ key[head // group, j] * scale
                    logits.append(score if softcap is None else softcap * torch.tanh(score / softcap))
                    seen.append(j)
            if seen:
                extra = [] if sinks is None else [sinks[head]]
                probabilities[head, i, seen] = torch.softmax(torch.stack(logits + extra), 0)[: len(seen)]
    return probabilities @ value.repeat_interleave(group, 0), probabilities


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "lengths": st.lists(st.integers(1, 12), min_size=1, max_size=3),
        "key_heads": st.sampled_from([1, 2]),
        "group": st.sampled_from([1, 3]),
        "window": st.sampled_from([None, 1, 4]),
        "softcap": st.sampled_from([None, 2.0]),
        "sinks": st.booleans(),
    }
)


def random_rows(shape, extra=0):
    """Queries, keys, values and positions of left-padded rows, ``extra`` tokens behind all of them, and the rules."""
    generator = torch.Generator().manual_seed(shape["seed"])
    columns, rows = max(shape["lengths"]) + extra, len(shape["lengths"])
    heads = shape["key_heads"] * shape["group"]
    query, key, value = (
        torch.randn(rows, count, columns, 4, dtype=torch.float64, generator=generator)
        for count in (heads, shape["key_heads"], shape["key_heads"])
    )
    pads = torch.tensor([max(shape["lengths"]) - length for length in shape["lengths"]])
    position = (torch.arange(columns) - pads[:, None]).to(torch.int32)
    sinks = torch.randn(heads, dtype=torch.float64, generator=generator) if shape["sinks"] else None
    rules = {"scale": 0.7, "window": shape["window"], "softcap": shape["softcap"], "sinks": sinks}
    return query, key, value, position, rules


@given(shape=shapes, slice_elements=st.sampled_from([1, 40, 1 << 20]), votes=st.integers(0, 3))
def test_mass_is_the_column_sum_of_the_probabilities(shape, slice_elements, votes):
    query, key, value, position, rules = random_rows(shape)
    lengths = torch.tensor(shape["lengths"])[:, None]
    weight = ((position >= 0) & (position >= lengths - votes)).float() if votes else (position >= 0).float()
    mass = attention_mass(query, key, position, position, weight, slice_elements=slice_elements, **rules)
    for row in range(len(shape["lengths"])):
        _, probabilities = reference(query[row], key[row], value[row], position[row], position[row], **rules)
        expected = (probabilities.mean(0) * weight[row, :, None]).sum(0)
        torch.testing.assert_close(mass[row], expected, rtol=0, atol=1e-12)
    if not shape["sinks"]:  # every query that counts hands out all of its attention
        torch.testing.assert_close(mass.sum(1), weight.sum(1).double())


def test_mass_does_not_depend_on_the_order_of_heads():
    query, key, _, position, rules = random_rows(
        {"seed": 1, "lengths": [9], "key_heads": 2, "group": 3, "window": None, "softcap": None, "sinks": False}
    )
    weight = torch.ones(1, 9)
    mass = attention_mass(query, key, position, position, weight, **rules)
    order = torch.tensor([1, 0])
    swapped = query.unflatten(1, (2, 3))[:, order].flatten(1, 2)
    torch.testing.assert_close(attention_mass(swapped, key[:, order], position, position, weight, **rules), mass)


def test_no_attention_matrix_is_formed():
    heads, tokens, limit = 4, 600, 4 * 600 * 16
    query = torch.randn(1, heads, tokens, 8)
    position = torch.arange(tokens, dtype=torch.int32)[None]
    with Largest() as largest:
        attention_mass(
            query, query, position, position, torch.ones(1, tokens), scale=0.3, slice_elements=heads * tokens * 16
        )
    assert largest.elements <= limit < heads * tokens * tokens / 30
    with Largest() as largest:
        states = KeptStates(tokens, weigh=True)
        states.attend(query, query, query, position, torch.ones(1, tokens), scale=0.3)
    assert largest.elements < heads * tokens * tokens / 2  # 256 queries at a time


def test_queries_without_weight_are_not_computed():
    query = torch.randn(1, 2, 512, 8)
    position = torch.arange(512, dtype=torch.int32)[None]
    with Largest() as largest:
        attention_mass(query, query, position, position, torch.zeros(1, 512), scale=0.3)
    assert largest.elements <= query.numel()


# ---------------------------------------------------------------------- priority


def test_protected_tokens_come_first_then_importance_then_the_earlier_of_equals():
    importance = np.array([0.0, 3.0, 1.0, 3.0, 2.0, 0.0])
    assert priority(importance, 1, 1).tolist() == [0, 5, 1, 3, 4, 2]
    assert priority(importance, 0, 0).tolist() == [1, 3, 4, 2, 0, 5]
    assert priority(importance, 2, 4).tolist()[:6] == [1, 3, 4, 2, 0, 5]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
def test_importance_that_is_no_finite_number_is_refused(wrong):
    with pytest.raises(InvalidBatchError, match="finite and not negative"):
        priority(np.array([1.0, wrong, 2.0]), 1, 1)


def test_fewer_tokens_than_are_protected_are_refused():
    with pytest.raises(InvalidBatchError, match="2 tokens cannot keep its first 2 and last 1"):
        priority(np.ones(2), 2, 1)


def test_retained_mass_is_the_cumulative_share_and_does_not_depend_on_scale():
    importance = np.array([1.0, 5.0, 0.0, 2.0])
    order = priority(importance, 1, 0)
    assert retained_mass(importance, order).tolist() == [0, 1 / 8, 6 / 8, 1, 1]
    assert np.array_equal(retained_mass(importance * 64, order), retained_mass(importance, order))
    assert retained_mass(np.zeros(4), np.arange(4)).tolist() == [0, 0.25, 0.5, 0.75, 1]


# ---------------------------------------------------------------------- storage


steps_of = st.lists(st.integers(1, 3), max_size=6)


@given(shape=shapes, room=st.sampled_from([1, 3, 40]), steps=steps_of, drop=st.booleans())
def test_attention_over_what_is_kept_is_that_over_all_with_the_rest_hidden(shape, room, steps, drop):
    extra = sum(steps)
    query, key, value, position, rules = random_rows(shape, extra)
    random = np.random.default_rng(shape["seed"])
    states = KeptStates(room, weigh=True)
    prompt, alive = max(shape["lengths"]), position.clone()
    begin = 0
    weights = torch.zeros(position.shape, dtype=torch.float64)
    for index, new in enumerate([prompt, *steps]):
        at, end = slice(begin, begin + new), begin + new
        got = states.attend(
            query[:, :, at],
            key[:, :, at],
            value[:, :, at],
            position[:, at],
            (position[:, at] >= 0).float(),
            padded=index == 0 and bool((position < 0).any()),
            **rules,
        )
        for row in range(len(position)):
            output, probabilities = reference(
                query[row][:, at],
                key[row][:, :end],
                value[row][:, :end],
                position[row, at],
                alive[row, :end],
                **rules,
            )
            real = position[row, at] >= 0
            torch.testing.assert_close(got[row][real], output.transpose(0, 1)[real], rtol=0, atol=1e-12)
            weights[row, :end] += probabilities.mean(0).sum(0)
            held = states.position[row]
            assert states.position[row][held >= 0].tolist() == sorted(set(held[held >= 0].tolist()))
            stored = held[held >= 0] + (prompt - shape["lengths"][row])
            torch.testing.assert_close(states.mass[row, held >= 0], weights[row, stored], rtol=0, atol=1e-12)
        begin = end
        if index == 0 and drop:
            columns = []
            for row, length in enumerate(shape["lengths"]):
                chosen = np.sort(random.choice(length, random.integers(1, length + 1), replace=False))
                columns.append(chosen + prompt - length)
                gone = np.setdiff1d(np.arange(prompt), columns[-1])
                alive[row, gone] = -1
            states.keep(columns, room, weigh=True)


def test_padding_stays_hidden_from_tokens_that_come_one_by_one():
    shape = {"seed": 3, "lengths": [5, 2], "key_heads": 1, "group": 1, "window": None, "softcap": None, "sinks": False}
    query, key, value, position, rules = random_rows(shape, 1)
    states = KeptStates(9, weigh=False)
    states.attend(query[:, :, :5], key[:, :, :5], value[:, :, :5], position[:, :5], padded=True, **rules)
    got = states.attend(query[:, :, 5:], key[:, :, 5:], value[:, :, 5:], position[:, 5:], **rules)
    expected, _ = reference(query[1, :, 5:], key[1], value[1], position[1, 5:], position[1], **rules)
    torch.testing.assert_close(got[1], expected.transpose(0, 1), rtol=0, atol=1e-12)


def test_windows_bound_what_is_stored():
    states = KeptStates(4, weigh=False)
    x = torch.randn(1, 1, 100, 4, dtype=torch.float64)
    for column in range(100):
        at = slice(column, column + 1)
        states.attend(x[:, :, at], x[:, :, at], x[:, :, at], torch.tensor([[column]]).int(), scale=1.0, window=8)
    assert states.trimmed
    assert states.length <= 16
    assert states.key.shape[2] == states.length


def test_rows_can_be_selected_and_repeated():
    states = KeptStates(1, weigh=True)
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    states.attend(x, x, x, torch.arange(3).int().expand(2, 3), torch.ones(2, 3), scale=1.0)
    mass = states.mass.clone()
    states.select(torch.tensor([1, 0, 1]))
    assert torch.equal(states.key, x[[1, 0, 1]])
    assert torch.equal(states.value, x[[1, 0, 1]])
    assert torch.equal(states.mass, mass[[1, 0, 1]])


def test_bytes_are_those_of_what_is_held():
    states = KeptStates(10, weigh=True)
    x = torch.randn(2, 3, 5, 4)
    states.attend(x, x, x, torch.arange(5).int().expand(2, 5), torch.ones(2, 5), scale=1.0)
    assert states.token_bytes == 2 * 3 * 4 * 4
    assert states.column_bytes == states.token_bytes + 4 + 4
    assert states.allocated_bytes == 2 * 10 * states.column_bytes
    states.keep([np.array([0, 3]), np.array([1, 4])], 1, weigh=False)
    assert states.column_bytes == states.token_bytes + 4
    assert states.allocated_bytes == 2 * 3 * states.column_bytes

"""Sizes of layers under a budget, against brute force."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stemma.cache.compressed import priority, retained_mass
from stemma.serve.prefix_kv.budget import proportional, pyramid, reference_waterline, total_tokens, waterline

importances = st.integers(0, 10**6).flatmap(
    lambda seed: st.tuples(
        st.just(seed), st.integers(1, 3), st.integers(2, 8), st.sampled_from(["random", "ties", "zeros"])
    )
)


def curves_of(case, first=1, last=1):
    seed, layers, tokens, kind = case
    random = np.random.default_rng(seed)
    found = []
    for _ in range(layers):
        importance = random.random(tokens) ** random.integers(1, 8)
        if kind == "ties":
            importance = random.integers(0, 3, tokens).astype(float)
        elif kind == "zeros":
            importance[random.random(tokens) < 0.6] = 0
        found.append(retained_mass(importance, priority(importance, first, last)))
    return found


@given(case=importances, share=st.floats(0.01, 1))
def test_no_other_sizes_retain_more_in_the_layer_that_retains_least(case, share):
    curves = curves_of(case)
    layers, tokens = len(curves), curves[0].size - 1
    total = total_tokens(share, layers, tokens, 2)
    sizes = waterline(curves, total, 2)
    assert sizes.sum() == total
    assert ((sizes >= 2) & (sizes <= tokens)).all()
    best = max(
        min(curve[size] for curve, size in zip(curves, each, strict=True))
        for each in itertools.product(range(2, tokens + 1), repeat=layers)
        if sum(each) == total
    )
    assert min(curve[size] for curve, size in zip(curves, sizes, strict=True)) == best
    assert sizes.tolist() == reference_waterline(curves, total, 2).tolist()


@given(seed=st.integers(0, 10**6), layers=st.integers(1, 6), tokens=st.integers(2, 60))
def test_larger_budgets_keep_a_superset(seed, layers, tokens):
    curves = curves_of((seed, layers, tokens, "zeros"))
    sizes = [waterline(curves, total, 2) for total in range(2 * layers, layers * tokens + 1)]
    assert all((more >= less).all() and (more - less).sum() == 1 for less, more in itertools.pairwise(sizes))


def test_a_large_case_is_that_of_the_reference():
    random = np.random.default_rng(0)
    curves = []
    for layer in range(12):
        importance = random.random(300) ** (1 + layer)
        curves.append(retained_mass(importance, priority(importance, 1, 1)))
    for total in (24, 25, 900, 1801, 3599, 3600):
        assert waterline(curves, total, 2).tolist() == reference_waterline(curves, total, 2).tolist()


def test_diffuse_layers_get_more():
    flat, steep = np.ones(100), np.exp(-np.arange(100.0))
    curves = [retained_mass(x, priority(x, 1, 1)) for x in (flat, steep)]
    flat_size, steep_size = waterline(curves, 60, 2)
    assert flat_size > 50 > 10 > steep_size


@pytest.mark.parametrize(("keep", "expected"), [(0.29, 29), (0.2, 20), (0.3, 30), (0.005, 8), (1.0, 100), (0.999, 99)])
def test_the_budget_is_exact_in_decimals(keep, expected):
    assert total_tokens(keep, 4, 25, 2) == expected
    assert expected == max(8, int(Fraction(str(keep)) * 100))


@given(
    weights=st.lists(st.floats(0.01, 3), min_size=1, max_size=6),
    tokens=st.integers(2, 50),
    share=st.floats(0.01, 1),
)
def test_proportional_sizes_meet_the_budget_and_follow_the_weights(weights, tokens, share):
    total = total_tokens(share, len(weights), tokens, 2)
    sizes = proportional(weights, tokens, total, 2)
    assert sizes.sum() == total
    assert ((sizes >= 2) & (sizes <= tokens)).all()
    order = np.argsort(weights, kind="stable")
    assert (np.diff(sizes[order]) >= -1).all()  # a heavier layer is at most a rounding smaller


def test_uniform_and_pyramid():
    assert proportional([1.0] * 3, 10, 17, 2).tolist() == [6, 6, 5]
    assert sum(pyramid(5)) == pytest.approx(5)
    assert pyramid(5)[-1] == pytest.approx(1 / 20)
    assert pyramid(5) == sorted(pyramid(5), reverse=True)
    assert pyramid(1) == [1.0]
    assert proportional(pyramid(4), 100, 200, 2).tolist() == [98, 66, 34, 2]

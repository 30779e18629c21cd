"""Decode attention against one softmax over all keys, and the algebra of merging."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stemma.attention.decode import Segment, decode_attention, merge, reference_decode_attention
from stemma.attention.kernels import _math_forward, block_forward

DTYPES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def partial(keys, values, query):
    """Attention of one query over some keys; none: output 0, log-sum-exp -inf."""
    if keys.shape[0] == 0:
        return torch.zeros(values.shape[1], dtype=values.dtype), torch.tensor(-math.inf, dtype=values.dtype)
    scores = keys @ query
    return torch.softmax(scores, 0) @ values, torch.logsumexp(scores, 0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.sampled_from([1.0, 100.0, 1e4]), st.integers(0, 10**6))
def test_merging_is_attention_over_all_keys_in_any_order(sizes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(sum(sizes), 3, dtype=torch.float64, generator=generator) * scale
    values = torch.randn(sum(sizes), 2, dtype=torch.float64, generator=generator)
    query = torch.randn(3, dtype=torch.float64, generator=generator)
    parts = [partial(k, v, query) for k, v in zip(keys.split(sizes), values.split(sizes))]
    expected, expected_sum = partial(keys, values, query)
    forward = parts[0]
    for part in parts[1:]:
        forward = merge(*forward, *part)
    backward = parts[-1]
    for part in reversed(parts[:-1]):
        backward = merge(*part, *backward)
    for output, total in (forward, backward):
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(total, expected_sum, rtol=1e-12, atol=1e-12)


def test_merging_with_nothing_is_exact_and_nothing_with_nothing_stays_nothing():
    output, total = torch.randn(4, 3), torch.randn(4)
    nothing, none = torch.zeros(4, 3), torch.full((4,), -math.inf)
    for merged in (merge(output, total, nothing, none), merge(nothing, none, output, total)):
        assert torch.equal(merged[0], output)
        assert torch.equal(merged[1], total)
    both = merge(nothing, none, nothing, none)
    assert torch.equal(both[0], nothing)
    assert torch.equal(both[1], none)


def test_numbers_that_are_none_do_not_vanish_in_a_merge():
    output, total = merge(torch.tensor([[math.nan]]), torch.tensor([math.nan]), torch.ones(1, 1), torch.zeros(1))
    assert output.isnan().all()
    assert total.isnan().all()


@st.composite
def cases(draw):
    """Rows, new tokens, heads, runs of rows with shared keys, an order of rows, sinks, a soft-cap, other keys."""
    rows, new, key_heads = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    runs = []
    for _ in range(draw(st.integers(0, 4))):
        first = draw(st.integers(0, rows - 1))
        last = draw(st.integers(first + 1, rows))
        queries = slice(first * new, last * new)
        if draw(st.booleans()):
            chosen = draw(st.lists(st.integers(first * new, last * new - 1), min_size=1, unique=True))
            queries = torch.tensor(sorted(chosen))
        runs.append((draw(st.integers(1, 5)), queries))
    return {
        "sizes": (rows, new, key_heads, draw(st.integers(1, 3)), draw(st.integers(0, 4))),
        "runs": runs,
        "order": draw(st.one_of(st.none(), st.permutations(range(rows)))),
        "softcap": draw(st.sampled_from([None, 1.5])),
        "sinks": draw(st.booleans()),
        "partial": draw(st.sampled_from(["none", "all heads", "all but the first head"])),
        "padded": draw(st.booleans()),
        "dtype": draw(st.sampled_from(list(DTYPES))),
    }


@given(cases(), st.integers(0, 10**6))
def test_decode_attention_is_the_reference(case, seed):
    rows, new, key_heads, group, before = case["sizes"]
    generator, dtype, dim = torch.Generator().manual_seed(seed), case["dtype"], 4

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    own = before + new
    query = normal(rows, new, key_heads * group, dim).transpose(1, 2)  # as models hand it over
    key, value = normal(rows, key_heads, own, dim), normal(rows, key_heads, own, dim)
    segments = [
        Segment(normal(1, key_heads, length, dim), normal(1, key_heads, length, dim), queries)
        for length, queries in case["runs"]
    ]
    bias = None
    if new > 1 or case["padded"]:
        visible = torch.arange(own) <= torch.arange(before, own)[:, None]
        visible = visible & (torch.arange(own) >= torch.randint(0, before + 1, (rows, 1, 1), generator=generator))
        bias = torch.zeros(rows, 1, new, own, dtype=dtype).masked_fill(~visible[:, None], -math.inf)
    order = None
    if case["order"] is not None:
        order = (torch.tensor(case["order"]), torch.argsort(torch.tensor(case["order"])))
    options = {
        "scale": 0.7,
        "bias": bias,
        "order": order,
        "softcap": case["softcap"],
        "sinks": normal(key_heads * group) if case["sinks"] else None,
    }
    if case["partial"] != "none":
        partial, sums = normal(rows, key_heads * group, new, dim), 2 * normal(rows, key_heads * group, new)
        if case["partial"] != "all heads":
            sums[:, 0] = -math.inf
        wide = torch.promote_types(dtype, torch.float32)
        options["partial"] = (partial.to(wide), sums.to(wide))
    got = decode_attention(query, key, value, segments, **options)
    doubles = [x.double() for x in (query, key, value)]
    options = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    if "partial" in options:
        options["partial"] = tuple(x.double() for x in options["partial"])
    segments = [Segment(s.key.double(), s.value.double(), s.queries) for s in segments]
    expected = reference_decode_attention(*doubles, segments, **options)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


def test_each_shared_run_is_one_call_whatever_the_number_of_rows(monkeypatch):
    from stemma.attention import decode

    calls = []
    monkeypatch.setattr(decode, "block_forward", lambda q, *a, **k: calls.append(q.shape) or block_forward(q, *a, **k))
    for rows in (2, 8):
        query, own = torch.randn(rows, 4, 1, 8), torch.randn(rows, 2, 3, 8)
        shared = torch.randn(1, 2, 50, 8)
        decode_attention(query, own, own, [Segment(shared, shared, slice(0, rows))], scale=1.0)
    # (blocks, heads, queries, head_dim): own keys row by row, then all rows and both heads of a group in one product.
    assert calls == [(2, 2, 2, 8), (1, 2, 4, 8), (8, 2, 2, 8), (1, 2, 16, 8)]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_bias_hides_keys_in_both_kernels(queries, softcap):
    query, key = torch.randn(2, 4, queries, 8, dtype=torch.float64), torch.randn(2, 2, 5, 8, dtype=torch.float64)
    bias = torch.zeros(2, 1, queries, 5, dtype=torch.float64)
    bias[0, ..., :2] = -math.inf
    got = block_forward(query, key, key, causal=False, scale=0.3, softcap=softcap, bias=bias)
    plain = _math_forward(query, key, key, False, 0.3, softcap, bias)
    cut = block_forward(query[:1], key[:1, :, 2:], key[:1, :, 2:], causal=False, scale=0.3, softcap=softcap)
    for a, b, c in zip(got, plain, cut):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a[:1], c)

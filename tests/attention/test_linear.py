"""Prefix linear attention: three forms, one result; who sees whom; padding; types."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stemma.attention.linear import (
    LinearState,
    chunked_linear_attention,
    expanded_features,
    linear_state,
    prefix_mask,
    recurrent_linear_attention,
    reference_linear_attention,
)

HEADS, F, D = 2, 3, 4


def tensors(length, seed=0, batch=2, scale=1.0, dtype=torch.float64):
    """query, key, value, encoder key, encoder value."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (F, F, D, F, D)
    return [torch.randn(batch, HEADS, length, n, generator=generator, dtype=dtype) * scale for n in sizes]


def by_loops(q, k, v, e, u, lengths, first=None):
    """The sums of the module's docstring, written out; `first` real token of each row (left padding)."""
    output = torch.zeros_like(v)
    batch, heads, length, f = q.shape
    for b in range(batch):
        start = 0 if first is None else first[b]
        for h in range(heads):
            for i in range(start, length):
                pairs = [(k[b, h, j], v[b, h, j]) for j in range(start, i + 1)]
                pairs += [(e[b, h, j], u[b, h, j]) for j in range(start, min(start + lengths[b], length))]
                total, mass = torch.zeros(v.shape[-1], dtype=v.dtype), 0.0
                for key, value in pairs:
                    s = float(q[b, h, i] @ key) / math.sqrt(f)
                    total, mass = total + (1 + s + s * s / 2) * value, mass + 1 + s + s * s / 2
                output[b, h, i] = total / mass
    return output


def all_forms(q, k, v, e, u, prefix, mask, chunk_size):
    state = linear_state(e, u, prefix)
    return [
        reference_linear_attention(q, k, v, encoder_key=e, encoder_value=u, prefix=prefix, mask=mask),
        recurrent_linear_attention(q, k, v, state, mask=mask)[0],
        chunked_linear_attention(q, k, v, state, mask=mask, chunk_size=chunk_size)[0],
    ]


def test_the_features_are_the_second_order_series():
    q, k = torch.randn(2, 50, 5, dtype=torch.float64)
    s = (q * k).sum(-1) / math.sqrt(5)
    products = (expanded_features(q) * expanded_features(k)).sum(-1)
    torch.testing.assert_close(products, 1 + s + s * s / 2, rtol=0, atol=1e-12)
    assert (products >= 0.5).all()
    assert expanded_features(q).shape[-1] == 1 + 5 + 25


@given(
    length=st.integers(1, 9),
    lengths=st.tuples(st.integers(0, 11), st.integers(0, 11)),
    padding=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    chunk_size=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_every_form_is_the_sums_written_out(length, lengths, padding, chunk_size, seed):
    first = [min(n, length - 1) for n in padding]
    q, k, v, e, u = tensors(length, seed)
    mask = torch.arange(length) >= torch.tensor(first)[:, None]
    prefix = prefix_mask(torch.tensor(lengths), mask)
    expected = by_loops(q, k, v, e, u, lengths, first)
    for output in all_forms(q, k, v, e, u, prefix, mask, chunk_size):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_gradients_of_the_chunked_form_are_those_of_the_quadratic_one():
    inputs = [x.requires_grad_() for x in tensors(7)]
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :2] = False
    prefix = prefix_mask(torch.tensor([3, 2]), mask)
    grads = []
    for output in (f(*inputs, prefix, mask, 3) for f in (lambda *a: all_forms(*a)[0], lambda *a: all_forms(*a)[2])):
        grads.append(torch.autograd.grad(output.sin().sum(), inputs))
    for reference, chunked in zip(*grads, strict=True):
        torch.testing.assert_close(chunked, reference, rtol=0, atol=1e-12)
        assert reference.abs().max() > 1e-3


def test_who_sees_whom():
    length, prefix_length = 6, 3
    q, k, v, e, u = tensors(length, batch=1)
    k, v, e, u = (x.requires_grad_() for x in (k, v, e, u))
    mask = torch.ones(1, length, dtype=torch.bool)
    prefix = prefix_mask(torch.tensor([prefix_length]), mask)
    output = all_forms(q, k, v, e, u, prefix, mask, 2)[2]
    for i in range(length):
        grads = torch.autograd.grad(output[0, :, i].sum(), (k, v, e, u), retain_graph=True)
        seen_causal, seen_encoder = (
            (x.abs() + y.abs().sum(-1, keepdim=True)).sum((0, 1, 3)) > 0
            for x, y in ((grads[0], grads[1]), (grads[2], grads[3]))
        )
        assert seen_causal.tolist() == [j <= i for j in range(length)]
        assert seen_encoder.tolist() == [j < prefix_length for j in range(length)]


def test_without_a_prefix_it_is_causal_and_with_nothing_but_a_prefix_it_sees_both_ways():
    q, k, v, e, u = tensors(5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    none, everything = (prefix_mask(torch.full((2,), n), mask) for n in (0, 5))
    assert torch.equal(all_forms(q, k, v, e, u, none, mask, 2)[2], chunked_linear_attention(q, k, v, chunk_size=2)[0])
    empty = linear_state(k, v, torch.zeros_like(mask))
    assert empty.value.abs().sum() == empty.key.abs().sum() == 0
    # The prefix alone, as its sums answer queries:
    state = linear_state(e, u, everything)
    features = expanded_features(q)
    both_ways = features @ state.value / (features @ state.key[..., None])
    scores = q @ e.transpose(-1, -2) / math.sqrt(F)
    weights = 1 + scores + scores.square() / 2
    torch.testing.assert_close(both_ways, weights @ u / weights.sum(-1, keepdim=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_going_on_from_a_state_is_one_long_pass(cut):
    q, k, v, e, u = tensors(7)
    start = linear_state(e[..., :3, :], u[..., :3, :])
    whole, end = chunked_linear_attention(q, k, v, start, chunk_size=4)
    head, state = chunked_linear_attention(*(x[..., :cut, :] for x in (q, k, v)), start, chunk_size=2)
    tail, last = recurrent_linear_attention(*(x[..., cut:, :] for x in (q, k, v)), state)
    torch.testing.assert_close(torch.cat([head, tail], dim=-2), whole, rtol=0, atol=1e-12)
    for a, b in zip(end, last, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_whatever_it_holds(side):
    q, k, v, e, u = tensors(5, batch=1)
    mask = torch.ones(1, 5, dtype=torch.bool)
    plain = all_forms(q, k, v, e, u, prefix_mask(torch.tensor([3]), mask), mask, 2)
    junk = [x * 100 for x in tensors(4, seed=7, batch=1)]
    padded = [
        torch.cat([j, x] if side == "left" else [x, j], dim=-2) for x, j in zip((q, k, v, e, u), junk, strict=True)
    ]
    real = torch.arange(9) >= 4 if side == "left" else torch.arange(9) < 5
    prefix = prefix_mask(torch.tensor([3]), real[None])
    assert prefix.sum() == 3
    for alone, output in zip(plain, all_forms(*padded, prefix, real[None], 2), strict=True):
        torch.testing.assert_close(output[..., real, :], alone, rtol=0, atol=1e-12)
        assert (output[..., ~real, :] == 0).all()


def test_a_key_of_zeros_counts_and_a_hidden_key_does_not():
    """phi(0) is not 0: hiding keys before the map would leave their weight of 1 in the sums."""
    key, value = torch.zeros(1, 1, 2, F), torch.ones(1, 1, 2, D)
    assert linear_state(key, value).key[0, 0, 0] == 2
    assert linear_state(key, value, torch.tensor([[True, False]])).key[0, 0, 0] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_of_half_precision_do_not_overflow(dtype):
    inputs = [x.to(dtype) for x in tensors(64, scale=40.0)]
    q, k, v, e, u = inputs
    mask = torch.ones(2, 64, dtype=torch.bool)
    prefix = prefix_mask(torch.tensor([20, 64]), mask)
    features = expanded_features(k)
    assert features.dtype == torch.float32
    assert features.square().sum() > torch.finfo(torch.float16).max
    output, state = chunked_linear_attention(q, k, v, linear_state(e, u, prefix), chunk_size=16)
    assert output.dtype == dtype
    assert state.value.dtype == state.key.dtype == torch.float32
    expected = all_forms(*(x.double() for x in inputs), prefix, mask, 16)[0]
    error = (output.double() - expected).abs().max() / expected.abs().max()
    assert error < 2 * torch.finfo(dtype).eps


def test_states_add_up():
    _, k, v, _, _ = tensors(6)
    parts = [linear_state(k[..., s, :], v[..., s, :]) for s in (slice(0, 2), slice(2, 6))]
    for whole, a, b in zip(linear_state(k, v), *parts, strict=True):
        torch.testing.assert_close(whole, a + b, rtol=0, atol=1e-12)


def test_the_chunked_form_holds_no_square_of_the_length():
    """The switch: the largest tensor of the chunked form grows with the chunk, that of the quadratic form with T."""
    largest = {}

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            output = function(*arguments, **(keywords or {}))
            for x in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(x, torch.Tensor):
                    largest[self.name] = max(largest.get(self.name, 0), x.numel())
            return output

    q, k, v, _, _ = tensors(256)
    for name, form in (
        ("quadratic", lambda: reference_linear_attention(q, k, v)),
        ("chunked", lambda: chunked_linear_attention(q, k, v, chunk_size=8)),
    ):
        with Largest(name):
            form()
    assert largest["quadratic"] == 2 * HEADS * 256 * 256
    assert largest["chunked"] == q.shape[0] * HEADS * 256 * D  # nothing larger than the answer


def test_a_chunk_without_tokens_is_refused():
    q, k, v, _, _ = tensors(2)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        chunked_linear_attention(q, k, v, LinearState(*linear_state(k, v)), chunk_size=0)

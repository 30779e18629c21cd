"""Chunked log-probabilities against whole logits: values and every gradient, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stemma.prefix.logprob import chunked_logprobs, reference_logprobs


@given(st.integers(1, 9), st.integers(0, 20), st.sampled_from([1, 13, 40, 1000]), st.booleans(), st.integers(0, 99))
def test_values_and_gradients_equal_whole_logits(positions, targets, chunk, entropy, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(13, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    position = torch.randint(0, positions, (targets,), generator=generator).sort().values
    token = torch.randint(0, 13, (targets,), generator=generator)
    grads = torch.randn(2, targets, dtype=torch.float64, generator=generator)

    def head(x):
        return 3 * torch.tanh(x @ weight.T / 3)

    got = chunked_logprobs(
        head, hidden, position, token, vocabulary=13, temperature=0.7, entropy=entropy, chunk_elements=chunk
    )
    want = reference_logprobs(head(hidden), position, token, 0.7)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-12)
    loss, expected = (got[0] * grads[0]).sum(), (want[0] * grads[0]).sum()
    if entropy:
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-12)
        loss, expected = loss + (got[1] * grads[1]).sum(), expected + (want[1] * grads[1]).sum()
    else:
        assert got[1] is None
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_logits_never_exist_whole():
    sizes = []
    weight = torch.randn(1000, 8, requires_grad=True)

    def head(x):
        logits = x @ weight.T
        sizes.append(logits.numel())
        return logits

    hidden = torch.randn(64, 8, requires_grad=True)
    index = torch.arange(64)
    logprobs, _ = chunked_logprobs(head, hidden, index, index, vocabulary=1000, chunk_elements=5000)
    logprobs.sum().backward()
    assert max(sizes) == 5000
    assert sum(sizes) == 2 * 64 * 1000


def test_a_single_chunk_is_not_made_twice():
    calls = []
    weight = torch.randn(10, 8, requires_grad=True)

    def head(x):
        calls.append(1)
        return x @ weight.T

    index = torch.arange(4)
    chunked_logprobs(head, torch.randn(4, 8), index, index, vocabulary=10)[0].sum().backward()
    assert len(calls) == 1


def test_low_precision_logits_are_scored_in_float32():
    weight = torch.randn(50, 8, dtype=torch.bfloat16)
    hidden = torch.randn(6, 8, dtype=torch.bfloat16)
    index = torch.arange(6)
    got, _ = chunked_logprobs(lambda x: x @ weight.T, hidden, index, index, vocabulary=50)
    want, _ = reference_logprobs((hidden @ weight.T).float(), index, index)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)


def test_temperature_must_be_positive():
    index = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="temperature"):
        chunked_logprobs(lambda x: x, torch.ones(1, 2), index, index, vocabulary=2, temperature=0.0)

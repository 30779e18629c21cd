"""Feature maps, their sums, and attention merged with attention over other keys."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stemma.attention.kernelized import (
    FeatureMap,
    KernelSums,
    attention_with_partial,
    kernel_attention,
    kernel_sums,
    reference_attention_with_partial,
    taylor_features,
)
from stemma.errors import UnsupportedModelError

DOUBLE = torch.float64
MAPS = [
    FeatureMap(),
    FeatureMap(normalize=False),
    FeatureMap(name="random", num_features=64),
    FeatureMap(name="taylor", degree=2),
]


def normal(seed: int, *shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) * std


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(-1, -2) * scale
    return torch.softmax(scores, dim=-1) @ value, torch.logsumexp(scores, dim=-1)


def features(map_: FeatureMap, x: Tensor, scale: float) -> Tensor:
    return map_(x, scale, map_.projection(x.shape[-1], 0))


def plain(map_: FeatureMap, x: Tensor, scale: float) -> Tensor:
    """The features themselves, also of a positive map."""
    return features(map_, x, scale).exp() if map_.positive else features(map_, x, scale)


@pytest.mark.parametrize("map_", MAPS, ids=str)
def test_kernel_attention_is_the_papers_formula(map_: FeatureMap) -> None:
    query, key, value = normal(0, 5, 8), normal(1, 11, 8), normal(2, 11, 6)
    phi_q, phi_k = plain(map_, query, 0.3), plain(map_, key, 0.3)
    total, mass = phi_k.T @ value, phi_k.sum(0)
    sums = kernel_sums(features(map_, key, 0.3), value, positive=map_.positive)
    partial, log_sum = kernel_attention(features(map_, query, 0.3), sums, positive=map_.positive)
    torch.testing.assert_close(partial, phi_q @ total / (phi_q @ mass)[:, None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_sum, (phi_q @ mass).log(), rtol=1e-12, atol=1e-12)


def test_elu_map_is_elu_plus_one() -> None:
    x = normal(3, 4, 8)
    expected = torch.nn.functional.elu(x * 8**-0.25) + 1
    torch.testing.assert_close(plain(FeatureMap(normalize=False), x, 8**-0.5), expected)
    product = plain(FeatureMap(), x * 0, 8**-0.5) @ plain(FeatureMap(), x * 0, 8**-0.5).T
    torch.testing.assert_close(product, torch.ones(4, 4, dtype=DOUBLE))


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_taylor_products_are_the_exponential_series(degree: int) -> None:
    x, y = normal(4, 7, 5), normal(5, 7, 5)
    dot = (x * y).sum(-1)
    series = torch.stack([dot**power / math.factorial(power) for power in range(degree + 1)]).sum(0)
    torch.testing.assert_close((taylor_features(x, degree) * taylor_features(y, degree)).sum(-1), series)
    assert taylor_features(x, degree).shape[-1] == FeatureMap(name="taylor", degree=degree).size(5)


def test_random_features_estimate_the_exponential() -> None:
    x, y = normal(6, 4, 8, std=0.3), normal(7, 4, 8, std=0.3)
    map_ = FeatureMap(name="random", num_features=200_000)
    estimate = plain(map_, x, 1.0) @ plain(map_, y, 1.0).T
    torch.testing.assert_close(estimate, torch.exp(x @ y.T), rtol=0.05, atol=0)


def test_an_exact_kernel_reproduces_softmax_attention() -> None:
    """With one feature per query of a finite set, log phi_i(k) = score of query i, the result is exact."""
    query, key, value = normal(8, 6, 4), normal(9, 9, 4), normal(10, 9, 3)
    lookup = torch.full((6, 6), float("-inf"), dtype=DOUBLE).fill_diagonal_(0.0)
    partial, log_sum = kernel_attention(lookup, kernel_sums(key @ query.T * 0.5, value, positive=True), positive=True)
    expected, expected_sum = softmax_attention(query, key, value, 0.5)
    torch.testing.assert_close(partial, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_sum, expected_sum, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("map_", MAPS, ids=str)
@given(cut=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_sums_are_additive_and_do_not_depend_on_the_order(map_: FeatureMap, cut: int, seed: int) -> None:
    key, value = normal(seed, 13, 4), normal(seed + 1, 13, 4)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(seed))
    phi = features(map_, key, 0.5)
    whole = kernel_sums(phi, value, positive=map_.positive)
    shuffled = kernel_sums(phi[order], value[order], positive=map_.positive)
    first, second = (kernel_sums(phi[s], value[s], positive=map_.positive) for s in (slice(cut), slice(cut, None)))
    if map_.positive:
        logs = torch.stack([first.key, second.key])
        weights = torch.softmax(logs, dim=0)[..., None]
        both = KernelSums(logs.logsumexp(0), (weights * torch.stack([first.value, second.value])).sum(0))
    else:
        both = KernelSums(first.key + second.key, first.value + second.value)
    for other in (shuffled, both):
        torch.testing.assert_close(other, whole, rtol=1e-10, atol=1e-10)


def test_scaling_the_sums_shifts_the_log_sum_exp() -> None:
    phi = features(FeatureMap(), normal(11, 5, 4), 0.5)
    sums = kernel_sums(features(FeatureMap(), normal(12, 7, 4), 0.5), normal(13, 7, 4), positive=True)
    scaled = KernelSums(sums.key + 3.0, sums.value)  # Z and k times e^3
    (partial, log_sum), (same, shifted) = (kernel_attention(phi, s, positive=True) for s in (sums, scaled))
    torch.testing.assert_close((same, shifted), (partial, log_sum + 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("map_", MAPS[:3], ids=str)
def test_huge_scores_are_finite_with_their_gradients(map_: FeatureMap, dtype: torch.dtype) -> None:
    query, key, value = (normal(s, 1, 2, 6, 8).to(dtype) for s in (0, 1, 2))
    query = (query * 1000).requires_grad_()
    for shift in (1000.0, -1000.0):
        sums = kernel_sums(features(map_, key + shift, 1.0), value, positive=True)
        partial, log_sum = kernel_attention(features(map_, query, 1.0), sums, positive=True)
        output = attention_with_partial(query, key, value, partial, log_sum, scale=1.0, causal=True)
        (grad,) = torch.autograd.grad(output.sum(), query)
        assert output.isfinite().all()
        assert grad.isfinite().all()


def test_the_published_order_of_operations_fails_there() -> None:
    """Divided by the exponential of a maximum taken before masking, rows underflow to 0 / 0."""
    scores = (normal(0, 16, 8) * 30) @ normal(1, 16, 8).T
    seen = torch.exp(scores - scores.max(-1, keepdim=True).values).float().tril()
    naive = seen / seen.sum(-1, keepdim=True)
    assert naive.isnan().any()


def test_weights_that_are_not_positive_are_refused() -> None:
    phi = features(FeatureMap(name="taylor"), torch.tensor([[-9.0, 0.0]]), 1.0)
    sums = kernel_sums(
        features(FeatureMap(name="taylor"), torch.tensor([[9.0, 0.0]]), 1.0), torch.ones(1, 2), positive=False
    )
    with pytest.raises(UnsupportedModelError, match="not positive"):
        kernel_attention(phi, sums, positive=False)


def padding(rows: int, queries: int, keys: int) -> Tensor:
    """Causal with padding on the left of row 0, whose first queries see nothing."""
    visible = torch.ones(rows, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    visible[0, :, :, :2] = False
    return torch.zeros(visible.shape, dtype=DOUBLE).masked_fill(~visible, float("-inf"))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_merged_attention_and_every_gradient(key_heads: int, masked: bool, softcap: float | None) -> None:
    query, partial = normal(0, 2, 4, 5, 8), normal(1, 2, 4, 5, 8)
    key, value = normal(2, 2, key_heads, 5, 8), normal(3, 2, key_heads, 5, 8)
    leaves = [x.requires_grad_() for x in (query, key, value, partial, normal(4, 2, 4, 5))]
    options = {"scale": 0.4, "softcap": softcap, "causal": not masked, "bias": padding(2, 5, 5) if masked else None}
    target = normal(5, 2, 4, 5, 8)
    found, expected = attention_with_partial(*leaves, **options), reference_attention_with_partial(*leaves, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad((output * target).sum(), leaves) for output in (found, expected)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-11)


def test_gradients_against_finite_differences_through_the_kernel() -> None:
    query, key, value = (normal(s, 1, 1, 3, 2, std=0.5).requires_grad_() for s in range(3))
    log_k, mean = normal(3, 1, 2).requires_grad_(), normal(4, 1, 2, 2).requires_grad_()

    def function(query: Tensor, key: Tensor, value: Tensor, log_k: Tensor, mean: Tensor) -> Tensor:
        partial = kernel_attention(FeatureMap()(query, 0.7), KernelSums(log_k, mean), positive=True)
        return attention_with_partial(query, key, value, *partial, scale=0.7, causal=True)

    assert torch.autograd.gradcheck(function, (query, key, value, log_k, mean))


def test_no_other_keys_leave_attention_bit_for_bit() -> None:
    query, key, value = (normal(s, 2, 4, 6, 8) for s in range(3))
    none = torch.full((2, 4, 6), float("-inf"), dtype=DOUBLE)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=8**-0.5)
    found = attention_with_partial(query, key, value, torch.zeros_like(query), none, scale=8**-0.5, causal=True)
    assert torch.equal(found, expected)


def test_a_row_that_sees_nothing_takes_the_other_keys() -> None:
    query, key, value, partial = (normal(s, 1, 1, 1, 4) for s in range(4))
    bias = torch.full((1, 1, 1, 1), float("-inf"), dtype=DOUBLE)
    log_sum = torch.zeros(1, 1, 1, dtype=DOUBLE)
    found = attention_with_partial(query, key, value, partial, log_sum, scale=1.0, bias=bias)
    torch.testing.assert_close(found, partial)


@pytest.mark.parametrize(
    "options", [{"name": "relu"}, {"degree": 0}, {"degree": 4}, {"num_features": 0}], ids=lambda o: next(iter(o))
)
def test_bad_maps_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        FeatureMap(**options)

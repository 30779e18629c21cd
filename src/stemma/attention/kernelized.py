"""Attention over many keys by a feature map: kernelised softmax attention, merged with the ordinary kind.

With a map `phi` such that `phi(q) . phi(k)` is about `exp(scale * q . k)`, attention over many keys and values
takes two sums over it, however many there are (arXiv 2406.14036):

    Z = sum_j phi(k_j) v_j^T,  k = sum_j phi(k_j),
    o_P = phi(q) Z / (phi(q) . k),  l_P = log(phi(q) . k).

`(o_P, l_P)` is one more term for the merge by log-sum-exp of `stemma.attention.tree`, exactly the paper's
`(A V + phi(Q) Z) / (A 1 + phi(Q) k)` without its exponentials. Sums are additive: those of a prefix are those of its
parts added up.

A *positive* map is handled by its logarithm. Then the result is ordinary softmax attention to `r` features: feature
`i` has score `log phi_i(q) + log k_i` and value `Z_i / k_i`, and is finite wherever softmax is. Polynomial maps
have signed features; they follow the formula, and a sum that is not positive is an error.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stemma.attention.decode import merge
from stemma.attention.kernels import block_backward, block_forward
from stemma.errors import UnsupportedModelError

__all__ = [
    "FeatureMap",
    "KernelSums",
    "attention_with_partial",
    "kernel_attention",
    "kernel_sums",
    "reference_attention_with_partial",
    "taylor_features",
]


def elu_features(x: Tensor) -> Tensor:
    """Logarithm of `elu(x) + 1`: `log(1 + x)` above 0 and `x` below; same shape."""
    return torch.log1p(x.clamp(min=0)) + x.clamp(max=0)


def taylor_features(x: Tensor, degree: int) -> Tensor:
    """`x (..., D)` as all products of up to `degree` of its entries, `(..., 1 + D + ... + D^degree)`: products of
    two such rows are the exponential series `sum_i (x . y)^i / i!` up to that degree."""
    parts = [torch.ones_like(x[..., :1])]
    for power in range(1, degree + 1):
        parts.append((parts[-1][..., None] * x[..., None, :]).flatten(-2) / math.sqrt(power))
    return torch.cat(parts, dim=-1)


def random_features(x: Tensor, projection: Tensor) -> Tensor:
    """Logarithm of positive random features (Performer, arXiv 2009.14794, lemma 1).

    Args:
        x: `(..., D)`.
        projection: `(r, D)`, standard normal rows.

    Returns:
        `(..., r)`: `w . x - |x|^2 / 2 - log(r) / 2`; over projections, the exponentials' products have the mean
        `exp(x . y)`.
    """
    return x @ projection.to(x).T - x.square().sum(-1, keepdim=True) / 2 - math.log(projection.shape[0]) / 2


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """A feature map of queries and keys."""

    name: Literal["elu", "taylor", "random"] = "elu"
    """`elu(x) + 1` (the paper's code), the exponential series, or positive random features."""
    normalize: bool = True
    """With "elu": divide by `sqrt(D)`, so that a key with score 0 weighs 1 as in softmax, not `D` (the code)."""
    degree: int = 1
    """Degree of "taylor", 1 to 3."""
    num_features: int = 256
    """Number of "random" features, at least 1."""

    def __post_init__(self) -> None:
        if self.name not in ("elu", "taylor", "random"):
            raise ValueError(f"name must be 'elu', 'taylor' or 'random', got {self.name!r}.")
        if not 1 <= self.degree <= 3:
            raise ValueError(f"degree must be 1, 2 or 3, got {self.degree}.")
        if self.num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {self.num_features}.")

    @property
    def positive(self) -> bool:
        """Whether all features are above 0; then `__call__` gives their logarithms."""
        return self.name != "taylor"

    def size(self, head_dim: int) -> int:
        """Number of features `r`."""
        sizes = {"elu": head_dim, "random": self.num_features}
        return sizes.get(self.name) or sum(head_dim**power for power in range(self.degree + 1))

    def projection(self, head_dim: int, seed: int) -> Tensor | None:
        """The `(r, D)` float32 projection of "random", from a seed; None for other maps."""
        if self.name != "random":
            return None
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.num_features, head_dim, generator=generator)

    def __call__(self, x: Tensor, scale: float, projection: Tensor | None = None) -> Tensor:
        """Features of queries or keys.

        Args:
            x: `(..., D)`.
            scale: factor on the scores; each side takes its square root.
            projection: see `projection`.

        Returns:
            `(..., r)` in float32 at least: logarithms for a positive map, else the features.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * math.sqrt(scale)
        if self.name == "taylor":
            return taylor_features(x, self.degree)
        if self.name == "random":
            assert projection is not None
            return random_features(x, projection)
        logs = elu_features(x)
        return logs - math.log(x.shape[-1]) / 2 if self.normalize else logs


class KernelSums(NamedTuple):
    """The two sums over a set of keys; with a positive map `log k` and the features' mean values `Z / k`."""

    key: Tensor
    """`(..., r)`: `log k`, or `k` for a signed map."""
    value: Tensor
    """`(..., r, value_dim)`: `Z / k`, or `Z` for a signed map."""


def kernel_sums(features: Tensor, value: Tensor, *, positive: bool) -> KernelSums:
    """Sums over keys.

    Args:
        features: `(..., m, r)`, of the keys; logarithms for a positive map.
        value: `(..., m, value_dim)`.
        positive: of the map.
    """
    value = value.to(features.dtype)
    if not positive:
        return KernelSums(features.sum(dim=-2), features.transpose(-1, -2) @ value)
    return KernelSums(torch.logsumexp(features, dim=-2), torch.softmax(features, dim=-2).transpose(-1, -2) @ value)


def kernel_attention(features: Tensor, sums: KernelSums, *, positive: bool) -> tuple[Tensor, Tensor]:
    """Attention of queries over the summed keys, differentiable in everything.

    Args:
        features: `(..., queries, r)`, of the queries; logarithms for a positive map.
        sums: see `kernel_sums`; leading dimensions broadcast with those of `features`.
        positive: of the map.

    Returns:
        `o_P (..., queries, value_dim)` and `l_P (..., queries)`.

    Raises:
        UnsupportedModelError: a signed map whose `phi(q) . k` is not positive.
    """
    key, value = sums.key.to(features.dtype), sums.value.to(features.dtype)
    if positive:
        scores = features + key[..., None, :]
        return torch.softmax(scores, dim=-1) @ value, torch.logsumexp(scores, dim=-1)
    mass = (features @ key[..., None])[..., 0]
    if not bool((mass > 0).all()):
        raise UnsupportedModelError(
            "the polynomial feature map gives a prefix a weight that is not positive, as scores are too large for its "
            'degree. Take an even degree, a positive map ("elu", "random"), or train fewer steps at a lower rate.'
        )
    return features @ value / mass[..., None], torch.log(mass)


def attention_with_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partial: Tensor,
    partial_sums: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention over keys, merged with attention over others, with exact gradients through both log-sum-exps.

    Args:
        query: `(rows, heads, queries, D)`.
        key: `(rows, key_value_heads, keys, D)`, at least one key.
        value: like `key`.
        partial: `(rows, heads, queries, D)`, attention over the other keys.
        partial_sums: `(rows, heads, queries)`, its log-sum-exp; -inf for none.
        scale: factor on the scores.
        causal: query `i` sees keys `0..i`.
        bias: `(rows or 1, 1, queries or 1, keys)` added to the scores, -inf hides; rows may be hidden as a whole.
        softcap: `c` of `c * tanh(score / c)`, or None.

    Returns:
        `(rows, heads, queries, D)` in the type of `value`.
    """
    merged: Tensor = _AttentionWithPartial.apply(query, key, value, partial, partial_sums, bias, causal, scale, softcap)
    return merged


def reference_attention_with_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partial: Tensor,
    partial_sums: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """What `attention_with_partial` computes: one softmax in which the other keys are one more key. For tests."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    if bias is not None:
        scores = scores + bias
    weights = torch.softmax(torch.cat([scores, partial_sums[..., None]], dim=-1), dim=-1)
    return weights[..., :-1] @ value + weights[..., -1:] * partial


class _AttentionWithPartial(torch.autograd.Function):
    """The block's backward with the merged output and log-sum-exp is exact, see `stemma.attention.kernels`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        partial: Tensor,
        partial_sums: Tensor,
        bias: Tensor | None,
        causal: bool,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        shown, hidden = bias, None
        if bias is not None:  # no kernel treats a row without a visible key as it should: output 0, log-sum-exp -inf
            hidden = (bias == float("-inf")).all(dim=-1)
            shown = bias.masked_fill(hidden[..., None], 0.0)
        output, sums = block_forward(query, key, value, causal=causal, scale=scale, softcap=softcap, bias=shown)
        if hidden is not None:
            sums = sums.masked_fill(hidden, float("-inf"))
        output, merged = merge(output.to(partial.dtype), sums.to(partial.dtype), partial, partial_sums)
        output = output.to(value.dtype)
        ctx.save_for_backward(query, key, value, partial, partial_sums, bias, output, merged)
        ctx.settings = (causal, scale, softcap)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, partial, partial_sums, bias, output, merged = ctx.saved_tensors
        causal, scale, softcap = ctx.settings
        merged = merged.masked_fill(merged == float("-inf"), 0.0)  # rows that see nothing at all
        wide = torch.promote_types(value.dtype, torch.float32)
        grads = block_backward(
            grad_output,
            query,
            key,
            value,
            output,
            merged.to(wide),
            causal=causal,
            scale=scale,
            softcap=softcap,
            bias=bias,
        )
        weight = torch.exp(partial_sums - merged)[..., None]
        grad = grad_output.to(partial.dtype)
        slope = (grad * (partial - output.to(partial.dtype))).sum(dim=-1)
        return *grads, weight * grad, weight[..., 0] * slope, None, None, None, None

"""The sub-module of an attention module that attends to a prefix by two sums over its features."""

from typing import Any

import torch
from torch import Tensor, nn

from stemma.attention.kernelized import FeatureMap, KernelSums, kernel_attention, kernel_sums
from stemma.attention.kernels import in_own_precision

__all__ = ["KernelPrefix"]

_NO_EFFECT = -40.0
"""Log of the weight of a prefix that is not to be seen: below rounding beside a key, and not so small that a gradient
would be 0 / 0."""


class KernelPrefix(nn.Module):
    """`Z` and `k` of the heads of one layer.

    With a positive map the parameters are `log k` and the mean values `Z / k`, which do not grow with the length of
    the prefix; with a signed one `k` and `Z`. In float32 at least, whatever the model's type, and under autocast.

    Args:
        feature_map: of queries and keys.
        heads: query heads.
        key_heads: key/value heads.
        head_dim: size of queries and keys.
        value_dim: size of values.
        rank: values are a product of `(r, rank)` and `(rank, value_dim)`; None: one matrix.
        per_key_head: one prefix for each key head instead of each query head.
        selected: the heads (of the kind above) that have a prefix; None: all.
        seed: of the projection of random features and of `start`.
        dtype: of the parameters.
        device: of the parameters.
    """

    projection: Tensor | None
    rows: Tensor

    def __init__(
        self,
        feature_map: FeatureMap,
        *,
        heads: int,
        key_heads: int,
        head_dim: int,
        value_dim: int,
        rank: int | None,
        per_key_head: bool,
        selected: tuple[int, ...] | None,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        kind, count = ("key head", key_heads) if per_key_head else ("query head", heads)
        chosen = tuple(range(count)) if selected is None else selected
        if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= head < count for head in chosen):
            raise ValueError(f"heads must be different numbers of {kind}s, 0 to {count - 1}; got {chosen}.")
        self.feature_map, self.key_heads, self.head_dim, self.value_dim = feature_map, key_heads, head_dim, value_dim
        self.per_key_head, self.chosen, self.seed = per_key_head, chosen, seed
        self.everywhere = len(chosen) == count
        self.about: dict[str, Any] = {}
        """Options of the adapter that it belongs to."""
        size, dtype = feature_map.size(head_dim), torch.promote_types(dtype, torch.float32)
        number = torch.tensor([chosen.index(h) if h in chosen else -1 for h in range(count)], device=device)
        rows = number.repeat_interleave(heads // key_heads) if per_key_head else number
        self.register_buffer("rows", rows, persistent=False)
        projection = feature_map.projection(head_dim, seed)
        self.register_buffer("projection", None if projection is None else projection.to(device, dtype))

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(len(chosen), *shape, dtype=dtype, device=device))

        self.key = empty(size)
        if rank is None:
            self.value = empty(size, value_dim)
        else:
            if not 1 <= rank <= min(size, value_dim):
                raise ValueError(f"rank must be 1 to {min(size, value_dim)} here, or None; got {rank}.")
            self.value_left, self.value_right = empty(size, rank), empty(rank, value_dim)
        self.rank = rank

    @property
    def sums(self) -> KernelSums:
        """`(prefixes, r)` and `(prefixes, r, value_dim)`, see `stemma.attention.kernelized.KernelSums`."""
        return KernelSums(self.key, self.value if self.rank is None else self.value_left @ self.value_right)

    def forward(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention over the prefix, `(rows, heads, n, value_dim)` for queries `(rows, heads, n, head_dim)`,
        and its log-sum-exp `(rows, heads, n)`."""
        with in_own_precision(query.device):
            return self._attention(query, scale)

    def _attention(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        sums, positive = self.sums, self.feature_map.positive
        present = self.rows >= 0
        asked = query if self.everywhere else query[:, present]
        row = self.rows if self.everywhere else self.rows[present]
        features = self.feature_map(asked, scale, self.projection)
        partial, log_sum = kernel_attention(features, KernelSums(sums.key[row], sums.value[row]), positive=positive)
        if self.everywhere:
            return partial, log_sum
        heads = present.nonzero()[:, 0]
        none = partial.new_zeros(*query.shape[:3], partial.shape[-1]), log_sum.new_full(query.shape[:3], float("-inf"))
        return none[0].index_copy(1, heads, partial), none[1].index_copy(1, heads, log_sum)

    @torch.no_grad()
    def fill(self, key: Tensor, value: Tensor, scale: float, weight: float = 1.0) -> None:
        """Become the stand-in of keys and values.

        Args:
            key: `(1, key_value_heads, m, head_dim)`, as attention sees them.
            value: `(1, key_value_heads, m, value_dim)`.
            scale: of the scores.
            weight: factor on both sums.
        """
        key, value = key[0], value[0]
        if not self.per_key_head:
            key, value = (x.repeat_interleave(self.rows.numel() // self.key_heads, dim=0) for x in (key, value))
        key, value = (x[list(self.chosen)].to(self.key) for x in (key, value))
        factor = torch.tensor(weight, dtype=self.key.dtype)
        with in_own_precision(key.device):
            features = self.feature_map(key, scale, self.projection)
            sums = kernel_sums(features, value, positive=self.feature_map.positive)
            if self.feature_map.positive:
                self._set(sums.key + factor.log(), sums.value)
            else:
                self._set(sums.key * factor, sums.value * factor)

    @torch.no_grad()
    def start(self, scale: float, mass: float | None) -> None:
        """Start training from the sums over eight small random keys and values, together of weight `mass`; with None,
        of that of one key under the published map, and with 0, from a prefix that nobody sees (its gradients are as
        small)."""
        if mass is None:
            published = self.feature_map.name == "elu" and not self.feature_map.normalize
            mass = 1.0 if published else float(self.head_dim)
        generator = torch.Generator().manual_seed(self.seed)
        if mass == 0:
            self._set(torch.full_like(self.key, _NO_EFFECT), self.sums.value * 0)
            if not self.feature_map.positive:
                self.key.zero_()[:, 0] = torch.tensor(_NO_EFFECT).exp()
            return
        shape = (1, self.key_heads, 8)
        key, value = (
            0.02 * torch.randn(*shape, dim, generator=generator, dtype=torch.float64)
            for dim in (self.head_dim, self.value_dim)
        )
        self.fill(key, value, scale, mass / 8)

    def _set(self, key: Tensor, value: Tensor) -> None:
        self.key.copy_(key)
        if self.rank is None:
            self.value.copy_(value)
            return
        left, singular, right = torch.linalg.svd(value, full_matrices=False)
        self.value_left.copy_(left[..., : self.rank] * singular[..., None, : self.rank])
        self.value_right.copy_(right[..., : self.rank, :])

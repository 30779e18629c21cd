"""How many tokens each layer keeps under a common budget: the waterline of PrefixKV, and the allocators it is compared
with. Pure functions of numpy arrays."""

import heapq
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

__all__ = ["proportional", "pyramid", "reference_waterline", "total_tokens", "waterline"]

_MOST_HALVINGS = 60
"""Of the interval of p; then neighbouring floats are reached. Ties may leave no p that meets the budget."""


def total_tokens(keep: float, layers: int, tokens: int, least: int) -> int:
    """`floor(keep * layers * tokens)`, and at least `least` in every layer. Exact in the decimals of `keep`."""
    return max(math.floor(Fraction(str(keep)) * layers * tokens), layers * least)


def waterline(retained: Sequence[np.ndarray], total: int, least: int) -> np.ndarray:
    """Sizes of all layers such that the lowest retained share of importance is as high as the budget allows.

    The size of a layer at the waterline `p` is the fewest tokens that retain a share `p` (the paper's `O_l(p)`).
    Bisection finds the highest `p` that fits; the tokens that are left over raise the lowest layer, one by one.

    Args:
        retained: for each layer `(N + 1,)` the share that its first `0..N` tokens in order of priority retain, from
            0 to 1, not falling.
        total: tokens of all layers, between `least` and `N` in each.
        least: fewest tokens of a layer.

    Returns:
        `(layers,)` int64 with the sum `total`. Those of a larger total are nowhere smaller.
    """

    def sizes_at(p: float) -> np.ndarray:
        return np.array([max(least, int(np.searchsorted(share, p))) for share in retained], dtype=np.int64)

    low, high = 0.0, 1.0
    if sizes_at(high).sum() <= total:
        low = high
    for _ in range(_MOST_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if sizes_at(middle).sum() <= total else (low, middle)
    return _filled(sizes_at(low), [share.size - 1 for share in retained], total, lambda n, size: retained[n][size])


def reference_waterline(retained: Sequence[np.ndarray], total: int, least: int) -> np.ndarray:
    """What `waterline` computes, token by token: each goes to the layer that retains least so far."""
    sizes = np.full(len(retained), least, dtype=np.int64)
    while sizes.sum() < total:
        open_layers = [n for n, share in enumerate(retained) if sizes[n] < share.size - 1]
        sizes[min(open_layers, key=lambda n: (retained[n][sizes[n]], n))] += 1
    return sizes


def proportional(weights: Sequence[float], tokens: int, total: int, least: int) -> np.ndarray:
    """Sizes in proportion to positive weights, each between `least` and `tokens`, with the sum `total`."""
    share = total * np.asarray(weights, dtype=np.float64) / sum(weights)
    sizes = np.clip(np.floor(share), least, tokens).astype(np.int64)
    if sizes.sum() > total:
        sizes = np.full(len(weights), least, dtype=np.int64)
    return _filled(sizes, [tokens] * len(weights), total, lambda n, size: (size + 1) / weights[n])


def pyramid(layers: int, steepness: float = 20.0) -> list[float]:
    """Weights that fall from the first layer to the last, which gets `1 / steepness` of the mean (PyramidKV, arXiv
    2406.02069, section 4.2)."""
    last = 1 / steepness
    return [1.0] if layers == 1 else np.linspace(2 - last, last, layers).tolist()


def _filled(sizes: np.ndarray, most: Sequence[int], total: int, level: Callable[[int, int], float]) -> np.ndarray:
    """Give one token after the other to the lowest layer (of equal ones the first) until the sum is `total`."""
    heap = [(level(n, int(size)), n) for n, size in enumerate(sizes) if size < most[n]]
    heapq.heapify(heap)
    for _ in range(total - int(sizes.sum())):
        _, n = heapq.heappop(heap)
        sizes[n] += 1
        if sizes[n] < most[n]:
            heapq.heappush(heap, (level(n, int(sizes[n])), n))
    return sizes

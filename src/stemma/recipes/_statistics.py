"""Statistics over seeds: means, exact one-sided tests, and what they say about a claim. Imports no torch.

A claim says that a value is above a threshold. It *holds* when an exact test gives p < 0.05: over seeds the sign-flip
test, which is exact for differences that are symmetric about the threshold under the null hypothesis; for a share of
successes the binomial test. A count (tokens, bytes, operations) repeats exactly and needs no test.
"""

import itertools
import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

__all__ = ["FEWEST", "LEVEL", "area", "binomial", "mean_and_error", "sign_flip", "verdict"]

LEVEL = 0.05
"""A claim holds below this p-value."""
FEWEST = 5
"""Seeds with which a sign-flip test can reach `LEVEL`: its lowest p-value is 2 ** -seeds."""
_MOST_EXACT = 32  # of more values, the signs are drawn


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (unbiased; NaN for one value, and where a value is infinite)."""
    mean = statistics.fmean(values)
    if not math.isfinite(mean):
        return mean, math.nan
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def sign_flip(values: Sequence[float], threshold: float = 0.0) -> float:
    """One-sided p-value of "the mean is above `threshold`": how often a mean as high or higher comes up when the sign
    of every value's distance to the threshold is a coin's.

    Exact up to 32 values; of more, 65,535 draws of signs and what was measured.

    Returns:
        At least `2 ** -len(values)`; NaN where a value is not finite.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("a sign-flip test needs at least one value; got none")
    distances = [value - threshold for value in values]
    measured = math.fsum(distances)
    if not math.isfinite(measured):
        return math.nan
    lowest = measured - 1e-12 * max(1.0, math.fsum(map(abs, distances)))  # sums in another order round differently
    if len(distances) > _MOST_EXACT:
        random = Random(0)
        drawn = [math.fsum(random.choice((d, -d)) for d in distances) for _ in range(2**16 - 1)]
        return (1 + sum(total >= lowest for total in drawn)) / 2**16
    half = len(distances) // 2
    first, second = _sums_of_all_signs(distances[:half]), sorted(_sums_of_all_signs(distances[half:]))
    as_high = sum(len(second) - bisect_left(second, lowest - total) for total in first)
    return as_high / 2 ** len(distances)


def _sums_of_all_signs(values: Sequence[float]) -> list[float]:
    sums = [0.0]
    for value in values:
        sums = [total + signed for total in sums for signed in (value, -value)]
    return sums


def binomial(successes: int, trials: int, probability: float) -> float:
    """P(X >= successes) for X binomial: the exact one-sided test of a success rate above `probability`."""
    if probability in (0.0, 1.0):
        return float(successes == 0 or probability == 1.0)

    def log_chance(k: int) -> float:  # in logarithms, because binomial coefficients soon exceed a float
        ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        return ways + k * math.log(probability) + (trials - k) * math.log1p(-probability)

    return min(1.0, math.fsum(math.exp(log_chance(k)) for k in range(successes, trials + 1)))


def verdict(row: Mapping[str, Any]) -> str:
    """What a stored measurement says about its claim, from `value`, `threshold`, `test`, `p_value` and `repeats`.

    Returns:
        "holds", "in the mean" (the mean is above the threshold, the test does not tell), "does not hold", "too few
        seeds" (no outcome could have given p < 0.05), or "–" where nothing is claimed or the value is not finite.
    """
    if not row["claim"] or row["value"] is None:
        return "–"
    above = row["value"] > row["threshold"]
    if row["test"] == "count":
        return "holds" if above else "does not hold"
    if row["test"] == "sign-flip" and row["repeats"] < FEWEST:
        return "too few seeds"
    if row["p_value"] is not None and row["p_value"] < LEVEL:
        return "holds"
    return "in the mean" if above else "does not hold"


def area(points: Sequence[tuple[float, float]], end: float) -> float:
    """Mean height over [0, end] of the polyline through the points; level before the first and behind the last.

    Args:
        points: (x, y) with ascending x, at least one.
        end: above 0.
    """
    xs, ys = [0.0, *(x for x, _ in points), math.inf], [points[0][1], *(y for _, y in points), points[-1][1]]
    total = 0.0
    for (x0, x1), (y0, y1) in zip(itertools.pairwise(xs), itertools.pairwise(ys), strict=True):
        if x0 < end and x1 > x0:
            stop = min(x1, end)
            height = y1 if math.isinf(x1) else y0 + (y1 - y0) * (stop - x0) / (x1 - x0)
            total += (stop - x0) * (y0 + height) / 2
    return total / end

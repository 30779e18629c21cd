"""Statistics of reproductions against enumeration, and verdicts against the rule that the pages state."""

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stemma.recipes._statistics import FEWEST, LEVEL, area, binomial, mean_and_error, sign_flip, verdict

values = st.floats(-1, 1, allow_nan=False)


def test_mean_and_error_by_hand():
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert math.isnan(mean_and_error([1.0])[1])


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8), st.integers(-5, 5))
def test_sign_flips_against_all_signs(numbers, threshold):
    """In whole numbers, of which sums are exact."""
    distances = [number - threshold for number in numbers]
    flipped = [sum(map(math.prod, zip(s, distances))) for s in itertools.product((-1, 1), repeat=len(distances))]
    expected = sum(total >= sum(distances) for total in flipped) / len(flipped)
    assert sign_flip(numbers, threshold) == expected
    assert sign_flip([number / 7 for number in numbers], threshold / 7) == expected


def test_a_sign_flip_test_of_30_values_is_exact():
    """Against the distribution of the sum of signed tenths, by convolution."""
    gaps = [0.3, -0.2, 0.1, 0.4, -0.1] * 6
    chances = [1.0]
    for gap in gaps:
        step = round(10 * abs(gap))
        wider = [0.0] * (len(chances) + 2 * step)
        for index, chance in enumerate(chances):
            wider[index] += chance / 2
            wider[index + 2 * step] += chance / 2
        chances = wider
    lowest = (len(chances) - 1) // 2 + round(10 * sum(gaps))
    assert sign_flip(gaps) == pytest.approx(sum(chances[lowest:]), rel=1e-9)


def test_of_more_values_signs_are_drawn_and_the_measured_ones_count():
    gaps = [0.3, -0.2, 0.1, 0.4, -0.1] * 8
    normal = 0.5 * math.erfc(sum(gaps) / math.sqrt(2 * sum(gap**2 for gap in gaps)))
    assert sign_flip(gaps) == pytest.approx(normal, abs=0.005)
    assert sign_flip(gaps) == sign_flip(gaps)
    assert sign_flip([1.0] * 40) == 2**-16


def test_the_test_keeps_its_level():
    """Of random data without an effect at most one in twenty holds."""
    rng = random.Random(0)
    false = sum(sign_flip([rng.gauss(0, 1) for _ in range(6)]) < LEVEL for _ in range(2000))
    assert 0.02 < false / 2000 < 0.055


def test_what_cannot_be_tested():
    assert math.isnan(sign_flip([math.inf, 2.4]))
    assert math.isnan(mean_and_error([math.inf, 2.4, 2.4])[1])
    with pytest.raises(ValueError, match="at least one"):
        sign_flip([])


@given(st.integers(0, 12), st.integers(0, 12), st.fractions(0, 1, max_denominator=20))
def test_binomial_tails_against_sums_of_fractions(successes, more, probability):
    trials = successes + more
    expected = sum(
        math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k) for k in range(successes, trials + 1)
    )
    assert binomial(successes, trials, float(probability)) == pytest.approx(float(expected), abs=1e-12)


def test_a_binomial_tail_of_many_trials():
    exact = sum(math.comb(2000, k) for k in range(1050, 2001)) / 2**2000
    assert binomial(1050, 2000, 0.5) == pytest.approx(exact)


def row(value, test, p_value, repeats, threshold=0.0, claim="rises"):
    return {
        "claim": claim,
        "value": value,
        "threshold": threshold,
        "test": test,
        "p_value": p_value,
        "repeats": repeats,
    }


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (row(0.3, "sign-flip", 1 / 32, 5), "holds"),
        (row(0.3, "sign-flip", 0.0625, 8), "in the mean"),
        (row(0.3, "sign-flip", 0.05, 8), "in the mean"),
        (row(0.3, "sign-flip", None, 43), "in the mean"),
        (row(0.0, "sign-flip", 0.625, 8), "does not hold"),
        (row(0.6, "sign-flip", 0.9, 8, threshold=0.7), "does not hold"),
        (row(0.3, "sign-flip", 1 / 16, 4), "too few seeds"),
        (row(-0.3, "sign-flip", 1.0, 3), "too few seeds"),
        (row(None, "sign-flip", None, 8), "–"),
        (row(0.3, None, None, 8, claim=None), "–"),
        (row(0.3, "binomial", 0.001, 400, threshold=0.2), "holds"),
        (row(0.21, "binomial", 0.3, 400, threshold=0.2), "in the mean"),
        (row(504.0, "count", None, 1, threshold=1.0), "holds"),
        (row(1.0, "count", None, 1, threshold=1.0), "does not hold"),
    ],
)
def test_a_verdict_follows_from_the_row(stored, expected):
    assert verdict(stored) == expected


def test_the_fewest_seeds_are_those_that_can_tell():
    assert sign_flip([1.0] * FEWEST) < LEVEL <= sign_flip([1.0] * (FEWEST - 1))


@given(st.lists(st.tuples(st.floats(0, 10), values), min_size=1, max_size=6), st.floats(0.5, 12))
def test_area_against_many_small_steps(points, end):
    points = sorted(points)
    xs = [x for x, _ in points]

    def height(x):
        if x <= xs[0]:
            return points[0][1]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if x0 <= x < x1:
                return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        return points[-1][1]

    count = 2000
    reference = statistics.fmean(height(end * (i + 0.5) / count) for i in range(count))
    assert area(points, end) == pytest.approx(reference, abs=0.01)


def test_area_by_hand():
    assert area([(0, 0.0), (2, 1.0), (4, 1.0)], 4) == pytest.approx(0.75)
    assert area([(0, 0.0), (2, 1.0), (4, 1.0)], 2) == pytest.approx(0.5)
    assert area([(1, 0.5)], 3) == 0.5

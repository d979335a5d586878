"""Intervals, paired tests and spreads against formulas written out by hand."""

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gacd.errors import UserError
from gacd.evaluation.statistics import binomial_interval, mcnemar


def wilson(correct: int, n: int, z: float) -> tuple[float, float]:
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10_000), st.floats(0, 1))
def test_interval_is_wilsons(n: int, share: float) -> None:
    correct = round(share * n)
    z = statistics.NormalDist().inv_cdf(0.975)
    low, high = binomial_interval(correct, n)
    assert (low, high) == pytest.approx(wilson(correct, n, z), abs=1e-7)
    assert 0 <= low <= 100 * correct / n <= high <= 100


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_interval_refuses_impossible_counts(correct: int, n: int) -> None:
    with pytest.raises(UserError, match="correct"):
        binomial_interval(correct, n)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 11), (12, 5), (7, 7)])
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert mcnemar(only_a, only_b) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a)

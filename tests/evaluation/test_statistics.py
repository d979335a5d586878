"""Intervals, paired tests and spreads against formulas written out by hand."""

import math
import statistics

import pytest
import torch
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
    both = [True] * 4 + [False] * 3
    a = torch.tensor(both + [True] * only_a + [False] * only_b)
    b = torch.tensor(both + [False] * only_a + [True] * only_b)
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(a, b) == mcnemar(b, a)


def test_mcnemar_needs_the_same_images() -> None:
    # Shape-checked first where the test suite checks shapes; a user without that gets the line.
    with pytest.raises(Exception, match=r"same images|Type-check"):
        mcnemar(torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool))

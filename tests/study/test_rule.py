"""The rule: how often it decides where there is nothing to decide, and the parts it is made of."""

import math

import numpy as np
import pytest
from scipy import stats

from gacd.study.rule import (
    HELD,
    LEVEL,
    NOT_DECIDED,
    NOT_HELD,
    Variance,
    half_width,
    over_images,
    over_seeds,
    over_unpaired_images,
    slope,
    together,
    verdict,
)

TRIALS = 600
SLACK = 2.6 * math.sqrt(LEVEL * (1 - LEVEL) / TRIALS)  # a correct rule fails once in 200 times


def trainings(
    generator: np.random.Generator, seeds: int, n: int, accuracy: float, spread: float
) -> np.ndarray:
    """Outcomes [seeds, n] of a model whose trainings and whose images differ, as real ones do.

    P(right) = Phi((mean + image + training) / ...): images are easy or hard for all its trainings.
    """
    centre = stats.norm.ppf(accuracy) * math.sqrt(1 + spread**2 + 0.5**2)
    images = generator.normal(scale=1.0, size=n)
    training = generator.normal(scale=spread, size=(seeds, 1))
    noise = generator.normal(scale=0.5, size=(seeds, n))
    return centre + images + training + noise > 0


def verdicts(seeds: int, n: int, accuracy: float, spread: float, parts: int, use=(True, True)):
    """Of claims of `parts` parts, in none of which the models differ in truth."""
    generator = np.random.default_rng(seeds + n)
    found = []
    for _ in range(TRIALS):
        each = []
        for _ in range(parts):
            a = trainings(generator, seeds, n, accuracy, spread)
            b = trainings(generator, seeds, n, accuracy, spread)
            d = a.astype(float) - b
            both = [over_images(d.mean(axis=0), (-1.0, 1.0)), over_seeds(d.mean(axis=1).tolist())]
            used = [v for v, wanted in zip(both, use, strict=True) if wanted]
            each.append(verdict(float(d.mean()), used, parts=parts))
        found.append(together(each))
    return [found.count(word) / TRIALS for word in (HELD, NOT_HELD)]


@pytest.mark.parametrize(
    ("seeds", "n", "accuracy", "spread"),
    [(2, 200, 0.5, 0.1), (3, 100, 0.3, 0.0), (3, 300, 0.5, 0.2), (5, 100, 0.05, 0.1)],
)
def test_no_difference_is_rarely_called_one(seeds, n, accuracy, spread):
    held, not_held = verdicts(seeds, n, accuracy, spread, parts=2)
    assert held <= LEVEL / 2 + SLACK
    assert not_held <= LEVEL / 2 + SLACK
    assert held + not_held <= LEVEL + SLACK


@pytest.mark.parametrize("use", [(True, False), (False, True)])
def test_neither_part_alone_would_do(use):
    """The simulation can fail: images alone ignore the trainings, seeds alone the images."""
    spread = 0.3 if use[0] else 0.0
    assert sum(verdicts(3, 300 if use[0] else 50, 0.5, spread, 1, use)) > LEVEL + SLACK


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_a_trend_that_is_none_is_rarely_called_one(spread):
    """Whatever else a seed's runs share: its teacher may give its line a slope of its own."""
    generator = np.random.default_rng(1)
    x = np.array([4.0, 6.0, 8.0, 10.0, 12.0, 14.0])
    wrong = 0
    for _ in range(TRIALS):
        slopes = generator.normal(0.0, spread, size=(3, 1))
        y = 50.0 + slopes * x + generator.normal(0.0, 2.0, size=(3, 6))
        found = (y @ slope(x.tolist())).tolist()
        variance = over_seeds(found)
        assert variance is not None
        wrong += verdict(float(np.mean(found)), [variance]) != NOT_DECIDED
    assert wrong / TRIALS <= LEVEL + SLACK
    assert wrong / TRIALS >= LEVEL - 2 * SLACK  # here the rule is exact, not cautious


@pytest.mark.parametrize("per_teacher", [(2, 2, 2), (2, 2, 1), (5, 1, 1), (5, 1)])
def test_students_of_one_teacher_count_as_few(per_teacher):
    """Taken for independent, they would decide too often where there is nothing to decide."""
    generator = np.random.default_rng(2)
    teachers = np.repeat(np.arange(len(per_teacher)), per_teacher)
    wrong = np.zeros(2)
    for _ in range(TRIALS):
        of_teacher, own = generator.normal(size=8), generator.normal(scale=0.3, size=len(teachers))
        values = (of_teacher[teachers] + own).tolist()
        for i, groups in enumerate([teachers.tolist(), ()]):
            variance = over_seeds(values, groups)
            assert variance is not None
            wrong[i] += verdict(float(np.mean(values)), [variance]) != NOT_DECIDED
    assert wrong[0] / TRIALS <= LEVEL + SLACK
    assert wrong[1] / TRIALS > LEVEL + 3 * SLACK


def test_seeds_in_groups_are_the_groups_means_where_these_are_further_apart():
    values, groups = [1.0, 1.2, 5.0, 5.2, 3.0, 3.2], "aabbcc"
    means = [1.1, 5.1, 3.1]
    assert over_seeds(values, groups) == pytest.approx((np.var(means, ddof=1) / 3, 2))
    assert over_seeds(values, range(6)) == pytest.approx(over_seeds(values))
    assert over_seeds(values, "aaaaaa") == over_seeds(
        values
    )  # of one teacher nothing else is known
    alike = [1.0, 5.0, 1.1, 5.1, 0.9, 4.9]  # the groups' means by chance
    assert over_seeds(alike, groups) == over_seeds(alike)


def test_a_real_difference_is_found():
    generator = np.random.default_rng(0)
    found = []
    for _ in range(50):
        a = trainings(generator, 3, 1000, 0.55, 0.02)
        b = trainings(generator, 3, 1000, 0.40, 0.02)
        d = a.astype(float) - b
        seeds = over_seeds(d.mean(axis=1).tolist())
        assert seeds is not None
        found.append(verdict(float(d.mean()), [over_images(d.mean(axis=0), (-1.0, 1.0)), seeds]))
    assert found.count(HELD) >= 45


def test_slope_is_that_of_scipy():
    x, y = [1.0, 2.0, 2.0, 5.0, 7.0], [3.0, 2.0, 4.0, 6.0, 5.5]
    assert np.dot(slope(x), y) == pytest.approx(stats.linregress(x, y).slope)
    with pytest.raises(ValueError, match="two different x"):
        slope([1.0, 1.0])


def test_one_part_is_the_interval_of_student():
    values = [1.0, 2.5, 2.0, 4.0]
    variance = over_seeds(values)
    assert variance is not None
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert half_width([variance]) == pytest.approx((high - low) / 2)
    assert over_seeds([1.0]) is None


def test_images_of_two_models_are_bonett_and_prices():
    """Their interval: counts of discordant images, one added to each, two added to all."""
    n, only_a, only_b = 100, 7, 2
    d = np.array([1.0] * only_a + [-1.0] * only_b + [0.0] * (n - only_a - only_b))
    p, q = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    expected = (p + q - (p - q) ** 2) / (n + 2)
    variance = over_images(d, (-1.0, 1.0))
    assert variance.value * (n + 1) / (n + 2) == pytest.approx(expected)  # n - 1, for t


def test_a_handful_of_images_decides_nothing():
    d = np.zeros(100)
    assert verdict(0.0, [over_images(d, (-1.0, 1.0))]) == NOT_DECIDED
    d[:4] = 1.0
    assert verdict(0.04, [over_images(d, (-1.0, 1.0))]) == NOT_DECIDED
    d[:9] = 1.0
    assert verdict(0.09, [over_images(d, (-1.0, 1.0))]) == HELD


def test_unpaired_images_are_agresti_and_coulls():
    assert over_unpaired_images(0.0, 96).value == pytest.approx(0.02 * 0.98 / 100)


def test_verdicts_of_a_bound_and_of_several_parts():
    narrow = [Variance(0.01, 30)]
    assert verdict(4.6, narrow, above=False, bound=10.0) == HELD
    assert verdict(12.0, narrow, above=False, bound=10.0) == NOT_HELD
    assert verdict(10.1, narrow, above=False, bound=10.0) == NOT_DECIDED
    assert verdict(-0.22, narrow, parts=1) == NOT_HELD
    assert verdict(-0.22, narrow, parts=4) == NOT_DECIDED
    assert verdict(0.22, narrow, parts=4) == HELD
    assert together([HELD, HELD]) == HELD
    assert together([HELD, NOT_DECIDED]) == NOT_DECIDED
    assert together([HELD, NOT_DECIDED, NOT_HELD]) == NOT_HELD
    assert together([]) == NOT_DECIDED

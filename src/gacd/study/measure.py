"""What several cells of a study say together: means over seeds and images, with intervals."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from gacd.evaluation.outcomes import OUTCOMES, Evaluation
from gacd.evaluation.statistics import binomial_interval
from gacd.report.tables import image_count
from gacd.study.results import Result
from gacd.study.rule import (
    Variance,
    half_width,
    over_images,
    over_seeds,
    over_unpaired_images,
    slope,
)

ANY = (-math.inf, math.inf)
_OVER = {False: "seeds and images", True: "teachers and images"}


@dataclass(frozen=True)
class Arm:
    """One model of a study, trained with several seeds."""

    name: str
    results: tuple[Result, ...]
    fixed: bool = False
    """One training serves the other models' every seed: a teacher's."""

    def done(self, metric: str) -> dict[int, Result]:
        """The finished cells that measured this, by seed."""
        return {r.seed: r for r in self.results if r.record and r.record.get(metric) is not None}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A mean in percent (or percentage points, or another unit) and how sure it is."""

    mean: float
    variances: tuple[Variance, ...]
    seeds: tuple[int, ...]
    n: int
    """Test images."""
    basis: str
    """What the interval covers."""
    alone: bool
    """One training: nothing is known of another."""
    within: tuple[float, float] = ANY
    """What the mean can be."""
    binomial: tuple[float, float] | None = None
    """Of an accuracy: Wilson's interval over the images, as if they had seen one model."""

    def interval(self) -> tuple[float, float]:
        """Low and high of 95 %, in the unit of the mean.

        An accuracy near 0 or 100 % leaves the symmetric one, which is too short there: where that
        would pass them, Wilson's ends count, too, and of one training alone.
        """
        half, (least, most) = half_width(self.variances), self.within
        low, high = self.mean - half, self.mean + half
        if self.binomial is not None:
            if self.alone:
                return self.binomial
            if low < least or high > most:
                low, high = min(low, self.binomial[0]), max(high, self.binomial[1])
        return max(least, low), min(most, high)

    @property
    def decided(self) -> bool:
        """The whole interval is on one side of 0, with more than one training."""
        low, high = self.interval()
        return not self.alone and (low > 0 or high < 0)


def select(results: Iterable[Result], studies: Sequence[str], name: str, **labels: Any) -> Arm:
    """The cells with these labels, one a seed: a study that comes first goes first.

    A label of None is no condition; a tuple is a choice.
    """
    wanted = {
        key: value if isinstance(value, tuple) else (value,)
        for key, value in labels.items()
        if value is not None
    }
    found: dict[int, Result] = {}
    for study in studies:
        for result in results:
            if result.study == study and all(
                result.labels.get(key) in values for key, values in wanted.items()
            ):
                found.setdefault(result.seed, result)
    return Arm(name, tuple(found[seed] for seed in sorted(found)))


def contrast(terms: Sequence[tuple[float, Arm]], metric: str) -> Measured | None:
    """The weighted sum of arms, such as one minus another, seed by seed on the same images.

    None where no seed is done for all of them.
    """
    every = [arm.done(metric) for _, arm in terms]
    free = [done for (_, arm), done in zip(terms, every, strict=True) if not arm.fixed]
    if not all(every):
        return None
    seeds = sorted(set.intersection(*map(set, free or every[:1])))
    if not seeds:
        return None
    runs = [
        [next(iter(done.values())) if arm.fixed else done[seed] for seed in seeds]
        for (_, arm), done in zip(terms, every, strict=True)
    ]
    weights = [weight for weight, _ in terms]
    found = _images(weights, runs, metric)
    by_seed = np.asarray(weights) @ np.asarray(found.accuracies)
    taught = [each for (_, arm), each in zip(terms, runs, strict=True) if not arm.fixed]
    teachers = [
        frozenset(each[i].teacher for each in taught) - {None} or seed
        for i, seed in enumerate(seeds)
    ]
    shared = 1 < len(set(teachers)) < len(seeds)
    seed_part = over_seeds(by_seed.tolist(), teachers if shared else ())
    return Measured(
        mean=float(by_seed.mean()),
        variances=(found.variance, *([seed_part] if seed_part else [])),
        seeds=tuple(seeds),
        n=found.n,
        basis=(_OVER[shared] if seed_part else "images alone, one seed")
        + found.unpaired
        + ", one teacher" * any(arm.fixed and len(seeds) > 1 for _, arm in terms),
        alone=seed_part is None,
        within=(0.0, 100.0) if weights == [1.0] else ANY,
        binomial=_binomial(float(by_seed.mean()), found.n) if weights == [1.0] else None,
    )


def _binomial(accuracy: float, n: int) -> tuple[float, float]:
    return binomial_interval(round(accuracy * n / 100), n)


def differences(
    arms: Mapping[str, Arm], other: Arm, metrics: Sequence[str]
) -> dict[str, dict[str, Measured]]:
    """What every arm but `other` has more than it, by name and metric, as far as it is measured."""
    return {
        name: {
            metric: found
            for metric in metrics
            if (found := contrast([(1.0, arm), (-1.0, other)], metric))
        }
        for name, arm in arms.items()
        if arm is not other
    }


def trend(arms: Mapping[float, Arm], metric: str) -> Measured | None:
    """The slope of accuracy against x, in percentage points a unit of x, seed by seed.

    Of the seeds that are done at every x that any is; None with fewer than two x, or no such seed.
    """
    done = {x: arm for x, arm in sorted(arms.items()) if arm.done(metric)}
    if len(done) < 2:
        return None
    return contrast(list(zip(slope(list(done)), done.values(), strict=True)), metric)


def scalar(
    values: Mapping[int, float], n: int, within: tuple[float, float] = ANY
) -> Measured | None:
    """The mean of one value a seed, `within` its bounds, of which no image's share is known."""
    if not values:
        return None
    seed_part = over_seeds(list(values.values()))
    return Measured(
        mean=float(np.mean(list(values.values()))),
        variances=(seed_part,) if seed_part else (),
        seeds=tuple(sorted(values)),
        n=n,
        basis="seeds alone, on these test images" if seed_part else "one seed, no interval",
        alone=seed_part is None,
        within=within,
    )


class _Images(NamedTuple):
    accuracies: list[list[float]]
    """In percent, by term and run."""
    variance: Variance
    n: int
    unpaired: str


def _images(weights: Sequence[float], runs: Sequence[Sequence[Result]], metric: str) -> _Images:
    """Of sum_a weights[a] mean_r runs[a][r]: accuracies on the images common to all, variance."""
    outcomes = [[_outcomes(run, metric) for run in each] for each in runs]
    flat = [outcome for each in outcomes for outcome in each]
    if all(flat) and len({outcome.images for outcome in flat if outcome}) == 1:
        rows = reduce(np.intersect1d, [outcome.rows for outcome in flat if outcome])
        if len(rows):
            right = [
                np.stack(
                    [outcome.right[np.isin(outcome.rows, rows)] for outcome in each if outcome]
                )
                for each in outcomes
            ]
            values = sum(w * r.mean(axis=0) for w, r in zip(weights, right, strict=True))
            extremes = sum(min(w, 0.0) for w in weights), sum(max(w, 0.0) for w in weights)
            variance = over_images(np.asarray(values), extremes)
            means = [(100.0 * r.mean(axis=1)).tolist() for r in right]
            return _Images(means, _in_percent(variance), len(rows), "")
    records = [[run.record or {} for run in each] for each in runs]
    means = [[float(record[metric]) for record in each] for each in records]
    n = min(image_count(record, metric) for each in records for record in each)
    parts = [
        w * w * over_unpaired_images(float(np.mean(each)) / 100, n).value
        for w, each in zip(weights, means, strict=True)
    ]
    unpaired = ", the images unpaired" * (len(weights) > 1)
    return _Images(means, _in_percent(Variance(sum(parts), max(n - 1, 1))), n, unpaired)


class _Outcomes(NamedTuple):
    images: str
    rows: np.ndarray
    right: np.ndarray


def _outcomes(result: Result, metric: str) -> _Outcomes | None:
    """Of every image, ascending, where the file and the test set's fingerprint are there."""
    path = result.folder / OUTCOMES
    if not path.is_file():
        return None
    evaluation = Evaluation.load(path)
    images = evaluation.settings.get("test_images")
    if metric not in evaluation.robust or images is None:
        return None
    right, index = evaluation.outcomes(metric)
    return _Outcomes(str(images), index.numpy(), right.numpy())


def _in_percent(variance: Variance) -> Variance:
    return Variance(1e4 * variance.value, variance.df)

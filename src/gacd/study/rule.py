"""When a difference is decided: an interval over trainings and over test images, and a verdict.

A study has few seeds, and every seed of every model meets the same test images. A mean over both
would change with other seeds and with other images, so its variance has two parts, and neither
stands for the other: more images say nothing of the seeds, more seeds nothing of the images.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

LEVEL = 0.05
CONFIDENCE = 1 - LEVEL

Verdict = Literal["held", "not held", "not decided"]
HELD: Verdict = "held"
NOT_HELD: Verdict = "not held"
NOT_DECIDED: Verdict = "not decided"

RULE = (
    "Models are compared on the same test images, seed by seed. The 95 % interval of a mean "
    "difference is d ± √(t²v + t'²v'). v is the variance of the mean over seeds, with one degree "
    "of freedom less than seeds: few seeds, a wide interval. v' is that over images, where one "
    "made-up image at either extreme is added, so that a handful of images decides nothing. An "
    "accuracy of one seed has Wilson's interval, whose ends are also used where another interval "
    "would pass 0 or 100 %.",
    "Held: every part of the claim lies on the claimed side with its whole 95 % interval. Not "
    "held: some part lies on the other side, with an interval of 95 % shared among the parts "
    "(Bonferroni). Not decided: anything else. If there is no difference, either verdict is given "
    "in at most 2.5 % of studies.",
    "One seed alone decides nothing: another training could have turned out otherwise. A trend "
    "over k is the slope of each seed's own line through its runs, which share a teacher.",
)
"""In words, for a report."""


class Variance(NamedTuple):
    """The estimated variance of a mean, and the degrees of freedom of that estimate."""

    value: float
    df: float


def over_seeds(values: Sequence[float], groups: Sequence[Hashable] = ()) -> Variance | None:
    """Of the mean of one value a seed; None for a single seed, which does not vary.

    Seeds of one of G `groups`, such as the students of one teacher, are more alike than others:

        v = f sum_g (sum_{i in g} (x_i - mean))^2 / n^2, of G - 1 degrees of freedom,

    where f makes v unbiased if groups of n_g are all that varies: with s = sum_g n_g^2,

        f = s / sum_g n_g^2 (1 - 2 n_g / n + s / n^2), which is G / (G - 1) for equal groups,

    or that of seeds by themselves where its interval is wider: few groups may be close by chance.
    """
    n = len(values)
    if n < 2:
        return None
    alone = Variance(float(np.var(values, ddof=1)) / n, n - 1)
    sums: dict[Hashable, float] = defaultdict(float)
    for deviation, group in zip(np.asarray(values) - np.mean(values), groups, strict=False):
        sums[group] += float(deviation)
    df = len(sums) - 1
    if df < 1:
        return alone
    sizes = np.array([*Counter(groups).values()], dtype=np.float64)
    s = sizes @ sizes
    factor = float(s / (sizes**2 @ (1 - 2 * sizes / n + s / n**2)))
    grouped = Variance(factor * sum(x * x for x in sums.values()) / n**2, df)
    return max(alone, grouped, key=lambda variance: half_width([variance]))


def over_images(values: Float[np.ndarray, " n"], extremes: tuple[float, float]) -> Variance:
    """Of the mean of one value an image, with an image at either extreme added.

    For two models the extremes are -1 and 1: an image that one alone gets right (Bonett and Price,
    J. Educ. Behav. Stat. 37, 2012). Without them images that never disagree have no variance.
    """
    more = np.concatenate([values, extremes])
    return Variance(float(np.var(more, ddof=1)) / len(more), len(more) - 1)


def over_unpaired_images(accuracy: float, n: int) -> Variance:
    """Of an accuracy (a fraction) on `n` images of which the outcomes are not at hand.

    p (1 - p) / n for p with two successes and two failures added (Agresti and Coull 1998).
    """
    p = (accuracy * n + 2) / (n + 4)
    return Variance(p * (1 - p) / (n + 4), n - 1)


def slope(x: Sequence[float]) -> list[float]:
    """The weights of y that give the slope of its least squares line; ValueError for a single x."""
    centred = np.asarray(x, dtype=np.float64) - np.mean(x)
    spread = float(centred @ centred)
    if spread == 0:
        raise ValueError("a slope needs two different x")
    weights: list[float] = (centred / spread).tolist()
    return weights


def half_width(variances: Sequence[Variance], confidence: float = CONFIDENCE) -> float:
    """sqrt(sum over the parts of t^2 v): covers with at least this confidence for any parts.

    Banerjee, Sankhya 22 (1960): conservative for independent parts, however few their degrees of
    freedom. Scatter of single images and trainings counts in both parts, which errs the same way.
    """
    from scipy.special import stdtrit

    tail = 0.5 * (1 + confidence)
    return math.sqrt(sum(float(stdtrit(v.df, tail)) ** 2 * v.value for v in variances))


def verdict(
    estimate: float,
    variances: Sequence[Variance],
    *,
    above: bool = True,
    bound: float = 0.0,
    parts: int = 1,
) -> Verdict:
    """Of one of the `parts` of a claim: is the estimated quantity above (below) the bound?

    Each of the two wrong verdicts has a probability of at most LEVEL / 2 where it is at the bound.
    """
    distance = estimate - bound if above else bound - estimate
    if distance > half_width(variances):
        return HELD
    if -distance > half_width(variances, 1 - LEVEL / parts):
        return NOT_HELD
    return NOT_DECIDED


def together(parts: Sequence[Verdict]) -> Verdict:
    """A claim holds if all of its parts do, and not if any of them does not."""
    if NOT_HELD in parts:
        return NOT_HELD
    return HELD if parts and all(part == HELD for part in parts) else NOT_DECIDED

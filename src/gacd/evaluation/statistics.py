"""How sure a figure is: binomial intervals, in percent as every accuracy, and paired tests."""

from jaxtyping import Bool
from torch import Tensor

from gacd.errors import UserError


def binomial_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's score interval (95 %) of a proportion, in percent.

    The bounds 100 p solve |correct/n - p| = z sqrt(p (1 - p) / n) (Wilson, JASA 22, 1927).
    Raises `UserError` unless 0 <= correct <= n and n > 0.
    """
    if not 0 <= correct <= n or n == 0:
        raise UserError(f"an interval needs 0 <= correct <= n and n > 0, not {correct} of {n}")
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return 100.0 * float(interval.low), 100.0 * float(interval.high)


def mcnemar(a: Bool[Tensor, " n"], b: Bool[Tensor, " n"]) -> float:
    """p-value of McNemar's exact test that two models are right equally often, on the same images.

    Only images on which the two disagree count; under the null hypothesis each falls to either
    side with probability 1/2 (McNemar, Psychometrika 12, 1947). 1 where they never disagree.
    Raises UserError where the two have different numbers of images.
    """
    if a.shape != b.shape:
        raise UserError(
            f"a paired test needs the same images on both sides, not {len(a)} and {len(b)}"
        )
    from scipy.stats import binomtest

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)

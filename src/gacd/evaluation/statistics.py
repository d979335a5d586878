"""How sure a figure is: binomial intervals, in percent as every accuracy, and paired tests."""

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


def mcnemar(only_a: int, only_b: int) -> float:
    """p-value of McNemar's exact test that two models are right equally often, on the same images.

    Of the images on which one alone is right; under the null hypothesis each falls to either
    side with probability 1/2 (McNemar, Psychometrika 12, 1947). 1 where they never disagree.
    """
    from scipy.stats import binomtest

    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)

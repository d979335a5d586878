"""The parts of a claim: a quantity, what was claimed of it, and the models it is measured on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gacd.report.tables import heading
from gacd.study.measure import Arm, Measured, contrast
from gacd.study.results import Result
from gacd.study.rule import HELD, NOT_DECIDED, Verdict, verdict

METRICS = ("natural", "pgd20", "pgd7", "autoattack")
"""Accuracies, in percent."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the models compared: its mean over the seeds compared, and where it comes from."""

    name: str
    metric: str
    mean: float | None
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    n: int
    cells: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One part of a claim: a quantity with its 95 % interval, and what was claimed of it."""

    what: str
    where: str
    metric: str
    claimed: str
    unit: str
    estimate: float | None
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    n: int
    basis: str
    """What the interval covers; where there is no figure, why."""
    verdict: Verdict
    judged: bool
    """False: reported beside the claim, which does not stand on it."""
    arms: tuple[Side, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Evidence before it is weighed: how many parts the claim has decides how strictly."""

    what: str
    metric: str
    measured: Measured | None
    arms: tuple[Side, ...]
    where: str = ""
    missing: str = ""
    above: bool = True
    bound: float = 0.0
    unit: str = "points"
    judged: bool = True


def weigh(part: Part, parts: int) -> Evidence:
    """The evidence of one of the `parts` of a claim. One seed alone decides nothing."""
    found = part.measured
    low, high = found.interval() if found and found.variances else (None, None)
    decided = NOT_DECIDED
    if found and not found.alone:
        decided = verdict(
            found.mean, found.variances, above=part.above, bound=part.bound, parts=parts
        )
        # Near 0 and 100 % the interval is wider than what the verdict goes by.
        if decided == HELD and low is not None and high is not None:
            held = low > part.bound if part.above else high < part.bound
            decided = HELD if held else NOT_DECIDED
    return Evidence(
        what=part.what,
        where=part.where,
        metric=part.metric,
        claimed=f"{'>' if part.above else '<'} {part.bound:g}",
        unit=part.unit,
        estimate=found.mean if found else None,
        low=low,
        high=high,
        seeds=found.seeds if found else (),
        n=found.n if found else 0,
        basis=found.basis if found else part.missing,
        verdict=decided,
        judged=part.judged,
        arms=part.arms,
    )


def minus(a: Arm, b: Arm, metric: str, where: str = "", *, judged: bool = True) -> Part:
    """One model's accuracy minus another's, claimed to be above 0."""
    found = contrast([(1.0, a), (-1.0, b)], metric)
    return Part(
        what=f"{a.name} − {b.name}",
        where=where,
        metric=metric,
        measured=found,
        arms=sides([a, b], metric, found),
        missing=missing([a, b], metric),
        judged=judged,
    )


def sides(arms: Sequence[Arm], metric: str, found: Measured | None) -> tuple[Side, ...]:
    """Each model by itself, over the seeds that were compared; all of its seeds if none were."""
    return tuple(_side(arm, metric, found.seeds if found else ()) for arm in arms)


def missing(arms: Sequence[Arm], metric: str) -> str:
    """Why there is no figure."""
    said = []
    for arm in arms:
        if not arm.results:
            said.append(f"no cell of {arm.name}")
        elif not any(result.record for result in arm.results):
            said.append(f"{arm.name} not run yet")
        elif not arm.done(metric):
            said.append(f"{arm.name} not measured under {heading(metric)}")
    return "; ".join(said) or "no seed is done for all of them"


def _side(arm: Arm, metric: str, seeds: Sequence[int]) -> Side:
    kept = tuple(r for r in arm.results if arm.fixed or not seeds or r.seed in seeds)
    chosen = Arm(arm.name, kept)
    return side(arm.name, metric, contrast([(1.0, chosen)], metric), chosen.done(metric))


def side(name: str, metric: str, found: Measured | None, done: Mapping[int, Result]) -> Side:
    """One of the models compared, by what its finished cells say."""
    low, high = found.interval() if found and found.variances else (None, None)
    return Side(
        name=name,
        metric=metric,
        mean=found.mean if found else None,
        low=low,
        high=high,
        seeds=tuple(done),
        n=found.n if found else 0,
        cells=tuple(result.key for result in done.values()),
    )

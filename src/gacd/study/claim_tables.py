"""The claims and their evidence as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from gacd.report.page import Check, Checks
from gacd.report.tables import Cell, Column, Table
from gacd.study.claims import Claim
from gacd.study.evidence import METRICS, Evidence, Side
from gacd.study.measure import scalar
from gacd.study.rule import HELD, NOT_DECIDED, NOT_HELD

_PASSED = {HELD: True, NOT_HELD: False, NOT_DECIDED: None}
_SHOWN = 4  # parts whose figures are written out in the summary


def summary(claims: Sequence[Claim]) -> Checks:
    """A line for each claim, which leads to its evidence."""
    lines = [
        Check(
            f"{claim.claim}: {claim.text}",
            _PASSED[claim.verdict],
            f"Paper: {claim.paper}. Here: {_here(claim)}.",
            link=claim.claim,
        )
        for claim in claims
    ]
    return Checks(lines, (HELD, NOT_HELD, NOT_DECIDED))


def evidence_tables(claim: Claim) -> list[Table]:
    """Every part with its interval and verdict; then every model with its cells."""
    if not claim.evidence:
        return []
    parts = Table(
        f"{claim.claim}, by part",
        (
            Column("part"),
            Column("found", numeric=True),
            Column("claimed"),
            Column("verdict"),
            Column("seeds", numeric=True),
            Column("images", numeric=True),
            Column("interval over"),
        ),
        tuple(map(_part, claim.evidence)),
        ("In brackets: 95 % interval.", *_beside(claim)),
    )
    sides = {
        (side.name, side.metric, side.cells, side.seeds): side
        for each in claim.evidence
        for side in each.arms
        if side.mean is not None
    }
    if not sides:
        return [parts]
    models = Table(
        f"{claim.claim}, the models compared",
        (
            Column("model"),
            Column("measured"),
            Column("mean", numeric=True),
            Column("seeds"),
            Column("images", numeric=True),
            Column("cells"),
        ),
        tuple(map(_side, sides.values())),
        ("Cells: the beginnings of their keys; in full in claims.json.",),
    )
    return [parts, models]


def likeness_table(records: Sequence[Mapping[str, Any]], view: str) -> Table:
    """Of every student to its teacher, over seeds."""
    rows = []
    for name in records[0]["correlations"]:
        have = {int(r["seed"]): r for r in records if name in r["correlations"]}
        cells = []
        for values in (
            {seed: float(r["correlations"][name][view]["mean"]) for seed, r in have.items()},
            {seed: float(r["cka"][name][view]) for seed, r in have.items()},
        ):
            found = scalar(values, 0)
            assert found is not None
            interval = found.interval() if found.variances else None
            aside = f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
            cells.append(Cell(f"{found.mean:.3f}", aside))
        rows.append((Cell(name.upper()), *cells, Cell(str(len(have)))))
    columns = (
        Column("student"),
        Column("mean |Δ corr|", numeric=True),
        Column("CKA", numeric=True),
        Column("seeds", numeric=True),
    )
    notes = (
        "Δ corr: differences of class correlations from the teacher's, smaller is closer; CKA: "
        "alignment of features with the teacher's, 1 is the same. [low, high]: 95 % interval over "
        "seeds.",
    )
    return Table(f"Likeness to the teacher, {view} images", columns, tuple(rows), notes)


def _here(claim: Claim) -> str:
    judged = [each for each in claim.evidence if each.judged]
    if not judged:
        return "no cell of it in this study"
    known = [each for each in judged if each.estimate is not None]
    if not known:
        return "not run yet"
    if len(judged) <= _SHOWN:
        return "; ".join(f"{_short(each)} {_found(each)}" for each in known)
    counts = {v: sum(e.verdict == v for e in judged) for v in (HELD, NOT_HELD, NOT_DECIDED)}
    said = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    return f"{len(judged)} parts: {said}"


def _short(each: Evidence) -> str:
    """Which accuracy it is about."""
    named = [name for name in METRICS.values() if f"{name} " in each.what]
    return named[0] if named else each.what.partition(", ")[2] or each.what


def _found(each: Evidence | Side) -> str:
    return str(_value(each))


def _value(each: Evidence | Side) -> Cell:
    value = each.mean if isinstance(each, Side) else each.estimate
    if value is None:
        return Cell("–")
    signed = isinstance(each, Evidence) and each.unit != "%"
    places = 3 if abs(value) < 1 and not getattr(each, "unit", "x") else 1
    if isinstance(each, Side) and each.metric not in METRICS:
        places = 3

    def number(x: float) -> str:
        return f"{x:+.{places}f}".replace("-", "−") if signed else f"{x:.{places}f}"

    if each.low is None or each.high is None:
        return Cell(number(value))
    return Cell(number(value), f"[{number(each.low)}, {number(each.high)}]")


def _part(each: Evidence) -> tuple[Cell, ...]:
    beside = "" if each.judged else "(beside)"
    return (
        Cell(each.what),
        _value(each),
        Cell(f"{each.claimed} {each.unit}".rstrip()),
        Cell(each.verdict, beside),
        Cell(str(len(each.seeds)) if each.seeds else "–"),
        Cell(f"{each.n:,}" if each.n else "–"),
        Cell(each.basis),
    )


def _side(side: Side) -> tuple[Cell, ...]:
    return (
        Cell(side.name),
        Cell(METRICS.get(side.metric, side.metric)),
        _value(side),
        Cell(", ".join(map(str, side.seeds))),
        Cell(f"{side.n:,}"),
        Cell(", ".join(key[:7] for key in side.cells)),
    )


def _beside(claim: Claim) -> tuple[str, ...]:
    if all(each.judged for each in claim.evidence):
        return ()
    return ("Beside: AutoAttack's verdict, on which the claim does not stand.",)

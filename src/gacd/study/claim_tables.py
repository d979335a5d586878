"""The claims and their evidence as tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gacd.commands.rows import TEACHER
from gacd.report.analysis import GEOMETRY, geometry_caption, pair_of
from gacd.report.page import Check, Checks
from gacd.report.tables import Cell, Column, Table, heading, number, signed
from gacd.study.arms import student_name
from gacd.study.claims import Claim
from gacd.study.evidence import METRICS, Evidence, Side
from gacd.study.measure import scalar
from gacd.study.rule import HELD, NOT_DECIDED, NOT_HELD

_PASSED = {HELD: True, NOT_HELD: False, NOT_DECIDED: None}
_GEOMETRY: dict[str, tuple[int, tuple[float, float]]] = {  # decimal places; what can be
    "silhouette": (2, (-1.0, 1.0)),
    "inter_intra": (2, (0.0, math.inf)),
    "nearer_true": (0, (0.0, 100.0)),
}
_SHOWN = 3  # comparisons whose figures are written out in the summary


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
    bases = list(dict.fromkeys(each.basis for each in claim.evidence))
    columns = [
        Column("part"),
        Column("accuracy"),
        Column("found", numeric=True),
        Column("claimed"),
        Column("verdict"),
        Column("seeds", numeric=True),
        Column("images", numeric=True),
    ]
    rows = [_part(each) for each in claim.evidence]
    notes = [
        "In brackets: 95 % intervals."
        if any(e.metric not in METRICS for e in claim.evidence)
        else "Differences in percentage points, in brackets their 95 % intervals."
    ]
    if len(bases) == 1:
        notes.append(f"Intervals: {bases[0]}.")
    else:
        columns.append(Column("interval over"))
        rows = [(*row, Cell(e.basis)) for row, e in zip(rows, claim.evidence, strict=True)]
    if not all(each.judged for each in claim.evidence):
        notes.append("(beside): shown, but no part of the verdict.")
    parts = Table(f"{claim.claim}: parts", tuple(columns), tuple(rows), tuple(notes))
    models = _models(claim)
    return [parts, models] if models else [parts]


def _models(claim: Claim) -> Table | None:
    """Every model compared: a row for the same cells, a column for each accuracy."""
    rows: dict[tuple[str, str, tuple[str, ...]], dict[str, Side]] = {}
    for each in claim.evidence:
        for side in each.arms:
            if side.mean is not None:
                rows.setdefault((side.name, each.where, side.cells), {})[side.metric] = side
    if not rows:
        return None
    metrics = list(dict.fromkeys(metric for found in rows.values() for metric in found))
    columns = (
        Column("model"),
        *(Column(heading(metric), numeric=True) for metric in metrics),
        Column("seeds"),
        Column("cells"),
    )
    lines = []
    for (name, where, cells), found in rows.items():
        side = next(iter(found.values()))
        lines.append(
            (
                Cell(name, f"({where})" * bool(where)),
                *(_value(found[metric]) if metric in found else Cell("–") for metric in metrics),
                Cell(", ".join(map(str, side.seeds))),
                Cell(", ".join(key[:7] for key in cells)),
            )
        )
    note = "Over the seeds compared. Cells: the beginnings of their keys; in full in claims.json."
    return Table(f"{claim.claim}: models", columns, tuple(lines), (note,))


def likeness_table(records: Sequence[Mapping[str, Any]], view: str) -> Table:
    """Of every student to its teacher, over seeds."""
    rows = []
    for name in records[0]["correlations"]:
        means = [record["correlations"][name][view]["mean"] for record in records]
        cells = (  # of what can be: a difference of correlations, CKA
            _over_seeds(records, means, 3, (0.0, 2.0)),
            _over_seeds(records, [r["cka"][name][view] for r in records], 3, (0.0, 1.0)),
        )
        rows.append((Cell(student_name(name)), *cells, Cell(str(len(records)))))
    columns = (
        Column("student"),
        Column("mean |Δ corr|", numeric=True),
        Column("CKA", numeric=True),
        Column("seeds", numeric=True),
    )
    notes = (
        "Δ corr: differences of the correlations between the classes' logits from the teacher's, "
        "smaller is closer; CKA: alignment of features with the teacher's, 1 is the same. [low, "
        "high]: 95 % interval over seeds.",
    )
    return Table(f"Likeness to the teacher, {view} images", columns, tuple(rows), notes)


def network_name(name: str) -> str:
    """What the report calls a network of an analysis."""
    return name if name == TEACHER else student_name(name)


def geometry_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Two classes in every model's features, over seeds."""
    rows = []
    for name in records[0]["geometry"]:
        cells = (
            _over_seeds(records, [r["geometry"][name][key] for r in records], places, within)
            for key, (places, within) in _GEOMETRY.items()
        )
        rows.append((Cell(network_name(name)), *cells, Cell(str(len(records)))))
    columns = (
        Column("model"),
        Column("silhouette", numeric=True),
        Column("inter / intra", numeric=True),
        Column("nearer own class, %", numeric=True),
        Column("seeds", numeric=True),
    )
    notes = (
        f"{pair_of(records[0])}.",
        f"{GEOMETRY}. [low, high]: 95 % interval over seeds.",
    )
    return Table(geometry_caption(records[0]), columns, tuple(rows), notes)


def _over_seeds(
    records: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    places: int,
    within: tuple[float, float],
) -> Cell:
    """The mean of a value of each record, and its interval within what can be."""
    seeds = (int(record["seed"]) for record in records)
    found = scalar(dict(zip(seeds, map(float, values), strict=True)), 0, within)
    assert found is not None
    if not found.variances:
        return Cell(number(found.mean, places))
    low, high = found.interval()
    return Cell(number(found.mean, places), f"[{number(low, places)}, {number(high, places)}]")


def _here(claim: Claim) -> str:
    judged = [each for each in claim.evidence if each.judged]
    known = [each for each in judged if each.estimate is not None]
    if not known:
        return "not run yet"
    seeds = min(len(each.seeds) for each in known)
    counted = f"; {seeds} seed{'s' * (seeds > 1)}"
    groups: dict[str, list[Evidence]] = {}
    for each in judged:
        groups.setdefault(each.where or each.what, []).append(each)
    if len(groups) > _SHOWN or len(judged) > 2 * len(groups):
        counts = {v: sum(e.verdict == v for e in judged) for v in (HELD, NOT_HELD, NOT_DECIDED)}
        said = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
        return f"{len(judged)} parts, {said}{counted}"
    told = []
    for name, group in groups.items():
        of = {(each.what, each.where) for each in group}
        shown = (each for each in claim.evidence if (each.what, each.where) in of)
        values = ", ".join(f"{heading(e.metric)} {_value(e)}" for e in shown)
        told.append(values + f" ({name})" * (len(groups) > 1))
    return "; ".join(told) + counted


def _value(each: Evidence | Side) -> Cell:
    """With its interval; differences and slopes signed."""
    value = each.estimate if isinstance(each, Evidence) else each.mean
    if value is None:
        return Cell("–")
    is_signed = isinstance(each, Evidence) and each.unit != "%"
    places = 1 if each.metric in METRICS else 3

    def written(x: float) -> str:
        return signed(x, places) if is_signed else number(x, places)

    if each.low is None or each.high is None:
        return Cell(written(value))
    return Cell(written(value), f"[{written(each.low)}, {written(each.high)}]")


def _part(each: Evidence) -> tuple[Cell, ...]:
    return (
        Cell(each.what, f"({each.where})" * bool(each.where)),
        Cell(heading(each.metric)),
        _value(each),
        Cell(f"{each.claimed} %" if each.unit == "%" else each.claimed),
        Cell(each.verdict, "" if each.judged else "(beside)"),
        Cell(str(len(each.seeds)) if each.seeds else "–"),
        Cell(f"{each.n:,}" if each.n else "–"),
    )

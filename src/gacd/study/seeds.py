"""`gacd seeds`: runs that differ by their seed alone, read together."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gacd import config as c
from gacd.commands.rows import TEACHER
from gacd.errors import UserError, unknown
from gacd.evaluation.outcomes import WORST
from gacd.report.canvas import file_format
from gacd.report.tables import Table
from gacd.storage import write_bytes
from gacd.study.figures import differences_figure
from gacd.study.measure import Arm, contrast, differences
from gacd.study.repeats import one_model, read_arms, teachers_of
from gacd.study.rows import INTERVALS, Row, attacker, difference_table, on, row_table

_ONE_TEACHER = "One teacher taught them all: nothing is known of another's students."
_SHARED = (
    "{} teachers taught {} runs: of students, the intervals are over teachers and test images."
)


def seeds(cfg: c.Seeds) -> None:
    """Print the means over several runs, and which differences from one row are decided."""
    if not cfg.runs:
        raise UserError("which runs? gacd seeds RUN RUN ..., a finished folder for each seed")
    arms = read_arms(cfg.runs)
    if cfg.minus is not None and cfg.minus not in arms:
        raise unknown("row of these runs", cfg.minus, arms)
    notes = []
    teachers = teachers_of(cfg.runs)
    files = {file for file in teachers if file is not None}
    if len(files) == 1 < len(teachers) and None not in teachers:
        notes.append(_ONE_TEACHER)  # it is one model, whatever each run measured of it
        if taught := arms.get(TEACHER):
            arms[TEACHER] = replace(taught, results=taught.results[:1], fixed=True)
    elif len(files) < len(teachers) - teachers.count(None):
        notes.append(_SHARED.format(len(files) + teachers.count(None), len(teachers)))
    for name, each in arms.items():
        if one_model(each.results):
            notes.append(f"{name}: one model in all runs, whose training tells of no other.")
            arms[name] = replace(each, results=each.results[:1], fixed=True)
    minus = cfg.minus or ("pgd-at" if "pgd-at" in arms else None)
    if cfg.figure is not None:
        _draw(arms, minus, cfg.figure)
    if cfg.json:
        print(json.dumps(_figures(arms, minus), indent=2))
        return
    tables = seed_tables(arms, minus, len(cfg.runs), *notes)
    if cfg.markdown:
        print("\n".join(table.markdown() for table in tables), end="")
        return
    from rich.console import Console

    Console().print(*tables, sep="\n\n")


def seed_tables(arms: Mapping[str, Arm], minus: str | None, runs: int, *notes: str) -> list[Table]:
    """Means with their intervals, and differences from one row, seed by seed and image by image."""
    other, metrics = None if minus is None else arms[minus], _metrics(arms)
    rows: list[Row] = [(name, arm, {}) for name, arm in arms.items()]
    caption = on(f"{runs} runs of one recipe" if runs > 1 else "One run", list(arms.values()))
    means = row_table(caption, rows, other, metrics)
    attacked = attacker(result for arm in arms.values() for result in arm.results)
    means = replace(means, notes=(*means.notes, INTERVALS, *attacked, *notes))
    if other is None or len(arms) == 1:
        return [means]
    return [means, difference_table(f"Minus {minus}", arms, other, metrics)]


def _draw(arms: Mapping[str, Arm], minus: str | None, path: Path) -> None:
    if minus is None:
        raise UserError(f"no difference to draw: say --minus ROW, one of {', '.join(arms)}")
    if len(arms) == 1:
        raise UserError(f"no difference to draw: {minus} is the only row")
    found = differences(arms, arms[minus], _metrics(arms))
    if not any(found.values()):
        raise UserError(f"no difference to draw: no run has both {minus} and another row")
    write_bytes(path, differences_figure({"": found}, minus, file_format(path)).image)


def _metrics(arms: Mapping[str, Arm]) -> list[str]:
    """Every attack that some model met."""
    records = (result.record or {} for arm in arms.values() for result in arm.results)
    names = dict.fromkeys(name for record in records for name in record["evaluation"])
    return [name for name in names if name != WORST]


def _figures(arms: Mapping[str, Arm], minus: str | None) -> list[dict[str, Any]]:
    """The same, for machines: each row's accuracy, then its difference from one row."""
    figures = []
    for other in [None] if minus is None else [None, minus]:
        subtracted = [] if other is None else [(-1.0, arms[other])]
        for name in (name for name in arms if name != other):
            for metric in _metrics(arms):
                found = _figure([(1.0, arms[name]), *subtracted], metric)
                figures.append({"row": name, "minus": other, "attack": metric, **found})
    return figures


def _figure(terms: Sequence[tuple[float, Arm]], metric: str) -> dict[str, Any]:
    found = contrast(terms, metric)
    if found is None:
        return {"mean": None}
    low, high = found.interval()
    return {
        "mean": found.mean,
        "low": low,
        "high": high,
        "seeds": len(found.seeds),
        "n": found.n,
        "interval": found.basis,
    }

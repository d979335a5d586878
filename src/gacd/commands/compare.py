"""`gacd compare`: are two models robust to different degrees, or was it chance?"""

import json
from pathlib import Path
from typing import Any

from gacd import config as c
from gacd.errors import UserError, unknown
from gacd.evaluation.outcomes import OUTCOMES, WORST, Evaluation
from gacd.evaluation.outcomes import compare as compare_outcomes
from gacd.report.tables import Cell, Column, Table, heading

_LEVEL = 0.05


def compare(cfg: c.Compare) -> None:
    """Print the paired comparison of two evaluated models."""
    if cfg.a is None or cfg.b is None:
        raise UserError("which two models? gacd compare A B, each the folder of an evaluated model")
    found = paired(cfg.a, cfg.b, cfg.attack)
    if cfg.json:
        names = {"a": str(cfg.a), "b": str(cfg.b)}
        print(json.dumps({**names, "level": _LEVEL, "attacks": found}, indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(comparison(found, str(cfg.a), str(cfg.b)))
    for attack, row in found.items():
        console.print(sentence(attack, row), highlight=False)


def paired(a: Path, b: Path, attack: str | None = None) -> dict[str, dict[str, Any]]:
    """McNemar's test of the two by attack: that one, or all that both met."""
    ours, theirs = (Evaluation.load(find_outcomes(path)) for path in (a, b))
    common = [name for name in ours.robust if name in theirs.robust]
    if ours.robust.keys() == theirs.robust.keys() and len(common) > 2:
        common.append(WORST)
    if attack is not None and attack not in common:
        raise unknown("attack that both models met", attack, common)
    names = common if attack is None else [attack]
    rows = {name: compare_outcomes(ours, theirs, name) for name in names}
    return {name: {**row, "decided": row["p"] < _LEVEL} for name, row in rows.items()}


def find_outcomes(path: Path) -> Path:
    """The outcomes file that a path means. Raises UserError where there is none, or several."""
    if not path.is_dir():
        return path
    if (path / OUTCOMES).is_file():
        return path / OUTCOMES
    rows = sorted(file.parent for file in path.glob(f"*/{OUTCOMES}"))
    if not rows:
        raise UserError(f"{path}: no evaluated model in this folder (no {OUTCOMES})")
    if len(rows) > 1:
        names = ", ".join(row.name for row in rows)
        raise UserError(f"{path} holds {len(rows)} models ({names}): name one, such as {rows[0]}")
    return rows[0] / OUTCOMES


def comparison(found: dict[str, dict[str, Any]], a: str, b: str) -> Table:
    """One line an attack."""
    numbers = ("n", "A", "B", "only A", "only B", "p")
    columns = Column("attack"), *(Column(name, numeric=True) for name in numbers)
    rows = tuple(
        (
            Cell(heading(attack)),
            Cell(f"{row['n']:,}"),
            *(_accuracy(row[which]) for which in ("a", "b")),
            *(Cell(f"{row[which]:,}") for which in ("only_a", "only_b")),
            Cell(_p(row["p"])),
        )
        for attack, row in found.items()
    )
    notes = (
        "A, B: accuracy in %, [low, high] its 95 % binomial interval; only A, only B: images on "
        "which that model alone was right; p: McNemar's exact test of these two counts.",
    )
    return Table(f"A: {a}\nB: {b}", columns, rows, notes)


def sentence(attack: str, row: dict[str, Any]) -> str:
    """Whether the difference under one attack is decided."""
    name = heading(attack)
    if not row["decided"]:
        return f"{name}: the difference is not decided at 5 % (p = {_p(row['p'])})."
    better = "A" if row["only_a"] > row["only_b"] else "B"
    points = abs(row["a"]["accuracy"] - row["b"]["accuracy"])
    return (
        f"{name}: decided at 5 %, {better} is right more often, by {points:.1f} points "
        f"(p = {_p(row['p'])})."
    )


def _accuracy(found: dict[str, float]) -> Cell:
    return Cell(f"{found['accuracy']:.1f}", f"[{found['low']:.1f}, {found['high']:.1f}]")


def _p(value: float) -> str:
    return f"{value:.2g}"

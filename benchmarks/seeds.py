"""Runs of one recipe that differ by their seed, together: a table of means, and what is decided.

    python benchmarks/seeds.py RUN RUN ... [--minus pgd-at]

Each RUN is a finished folder of `gacd distill`. Intervals of 95 % are over seeds and test images,
differences seed by seed on the same images, by the rule of `gacd study report`.
"""

import argparse
from pathlib import Path

from gacd.storage import read_json
from gacd.study.measure import Arm, Measured, contrast
from gacd.study.results import Result

METRICS = {"natural": "natural", "pgd20": "PGD-20", "autoattack": "AutoAttack"}


def arms(runs: list[Path]) -> dict[str, Arm]:
    """What each row of the runs' tables is called, and its results, one a seed."""
    found: dict[str, list[Path]] = {}
    for run in runs:
        for path in sorted(run.glob("*/record.json")):
            found.setdefault(path.parent.name, []).append(path.parent)
    return {name: arm(name, folders) for name, folders in found.items()}


def arm(name: str, folders: list[Path]) -> Arm:
    """One model by several seeds: the folders of its row."""
    records = [read_json(folder / "record.json") for folder in folders]
    return Arm(
        name,
        tuple(
            Result(study="", labels={}, seed=r["seed"], key=name, folder=folder, record=r)
            for folder, r in zip(folders, records, strict=True)
        ),
    )


def cell(found: Measured | None, *, accuracy: bool) -> str:
    """A mean and its interval; in bold a difference that is decided."""
    if found is None:
        return ""
    low, high = found.accuracy_interval() if accuracy else found.interval()
    text = f"{found.mean:{'' if accuracy else '+'}.1f} [{low:.1f}, {high:.1f}]"
    return f"**{text}**" if not accuracy and not found.alone and low * high > 0 else text


def tables(rows: dict[str, Arm], minus: str) -> str:
    """Means, and differences from one row."""
    head = " | ".join(METRICS.values())
    rule = "|---|---:" + "|---:" * len(METRICS) + "|"
    lines = [f"| method | seeds | {head} |", rule]
    for name, arm in rows.items():
        cells = [cell(contrast([(1, arm)], metric), accuracy=True) for metric in METRICS]
        lines.append(f"| {name} | {len(arm.results)} | {' | '.join(cells)} |")
    lines += ["", f"| minus {minus} | seeds | {head} |", rule]
    for name, arm in rows.items():
        if name != minus:
            terms = [(1.0, arm), (-1.0, rows[minus])]
            cells = [cell(contrast(terms, metric), accuracy=False) for metric in METRICS]
            lines.append(f"| {name} | {len(arm.results)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--minus", default="pgd-at", help="the row that differences are from")
    options = parser.parse_args()
    print(tables(arms(options.runs), options.minus))


if __name__ == "__main__":
    main()

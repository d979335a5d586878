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
    found: dict[str, list[Result]] = {}
    for run in runs:
        for path in sorted(run.glob("*/record.json")):
            record, name = read_json(path), path.parent.name
            result = Result(
                study="", labels={}, seed=record["seed"], key=name, folder=path.parent,
                record=record,
            )  # fmt: skip
            found.setdefault(name, []).append(result)
    return {name: Arm(name, tuple(results)) for name, results in found.items()}


def cell(found: Measured | None, *, accuracy: bool) -> str:
    """A mean and its interval; in bold a difference that is decided."""
    if found is None:
        return ""
    low, high = found.accuracy_interval() if accuracy else found.interval()
    text = f"{found.mean:{'' if accuracy else '+'}.1f} [{low:.1f}, {high:.1f}]"
    return f"**{text}**" if not accuracy and not found.alone and low * high > 0 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--minus", default="pgd-at", help="the row that differences are from")
    options = parser.parse_args()
    rows = arms(options.runs)
    head = " | ".join(METRICS.values())
    rule = "|---|---:" + "|---:" * len(METRICS) + "|"
    print(f"| method | seeds | {head} |\n{rule}")
    for name, arm in rows.items():
        cells = [cell(contrast([(1, arm)], metric), accuracy=True) for metric in METRICS]
        print(f"| {name} | {len(arm.results)} | {' | '.join(cells)} |")
    print(f"\n| minus {options.minus} | seeds | {head} |\n{rule}")
    for name, arm in rows.items():
        if name != options.minus:
            terms = [(1.0, arm), (-1.0, rows[options.minus])]
            cells = [cell(contrast(terms, metric), accuracy=False) for metric in METRICS]
            print(f"| {name} | {len(arm.results)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

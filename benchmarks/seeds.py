"""Runs of one recipe that differ by their seed, together: a table of means, and what is decided.

    python benchmarks/seeds.py RUN RUN ... [--minus pgd-at]

Each RUN is a finished folder of `gacd distill`, or holds a folder of `gacd evaluate` for each of
its rows. Intervals of 95 % are over seeds and test images, differences seed by seed on the same
images, by the rule of `gacd study report`.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from gacd.report.tables import HEADLINES
from gacd.storage import read_json
from gacd.study.evidence import METRICS
from gacd.study.measure import Arm, contrast
from gacd.study.results import Result


def arms(runs: list[Path]) -> dict[str, Arm]:
    """What each row of the runs' tables is called, and its results, one a seed."""
    found: dict[str, dict[int, Path]] = {}
    for number, run in enumerate(runs):
        for path in sorted(run.rglob("record.json")):
            found.setdefault(path.relative_to(run).parts[0], {})[number] = path.parent
    return {name: arm(name, folders) for name, folders in found.items()}


def arm(name: str, folders: Mapping[int, Path]) -> Arm:
    """One model by several seeds, numbered: the folders of its row."""
    return Arm(
        name,
        tuple(
            Result(
                study="",
                labels={},
                seed=number,
                key=name,
                folder=folder,
                record=read_json(folder / "record.json"),
            )
            for number, folder in folders.items()
        ),
    )


def cell(terms: list[tuple[float, Arm]], metric: str) -> str:
    """A mean, or a difference, and its interval; in bold a difference that is decided."""
    found = contrast(terms, metric)
    if found is None:
        return ""
    if len(terms) == 1:
        low, high = found.accuracy_interval()
        return f"{found.mean:.1f} [{low:.1f}, {high:.1f}]"
    low, high = found.interval()
    text = f"{found.mean:+.1f} [{low:.1f}, {high:.1f}]"
    return f"**{text}**" if not found.alone and low * high > 0 else text


def table(heading: str, rows: dict[str, Arm], minus: Arm | None = None) -> list[str]:
    """Of every row, or of its difference from one, which is left out."""
    head = " | ".join(METRICS[metric] for metric in HEADLINES)
    lines = [f"| {heading} | seeds | {head} |", "|---|---:" + "|---:" * len(HEADLINES) + "|"]
    for name, arm in rows.items():
        if arm is not minus:
            terms = [(1.0, arm), *([(-1.0, minus)] if minus else [])]
            cells = " | ".join(cell(terms, metric) for metric in HEADLINES)
            lines.append(f"| {name} | {len(arm.results)} | {cells} |")
    return lines


def tables(rows: dict[str, Arm], minus: str) -> str:
    """Means, and differences from one row."""
    apart = table(f"minus {minus}", rows, rows[minus])
    return "\n".join([*table("method", rows), "", *apart])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--minus", default="pgd-at", help="the row that differences are from")
    options = parser.parse_args()
    print(tables(arms(options.runs), options.minus))


if __name__ == "__main__":
    main()

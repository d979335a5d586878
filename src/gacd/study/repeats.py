"""Runs that repeat one experiment: their rows, and what makes them no repetition."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from gacd.commands.identity import (
    FREE,
    STARTS,
    content,
    differing,
    flat,
    named_by_content,
    read_run,
    used,
)
from gacd.commands.rows import MODEL, TEACHER
from gacd.errors import UserError
from gacd.methods.registry import METHODS, method_order
from gacd.report.records import RECORD, read_record
from gacd.study.measure import Arm
from gacd.study.results import Result

_ATTACKED = {"test_images", "norm", "eps", "step_size", "cascade"}
"""What must be alike for two accuracies to be compared, of a record's settings."""
_EVALUATED = "source_model"
"""A setting of `gacd evaluate` alone."""
_OPTIONAL = ("weights", "extra")
"""Sections that hold nothing but what was said."""


def read_arms(runs: Sequence[Path]) -> dict[str, Arm]:
    """Every row of the runs' tables, by its name: its results, one a run, numbered.

    A run is a folder of `gacd distill`, or one that holds a folder of `gacd evaluate` a row.

    Raises:
        UserError: a run without rows, one given twice, two of one seed, or of different settings;
            rows that did not meet the same attacker on the same images.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("a run is given twice: give one folder for each seed")
    folders: dict[str, dict[int, Path]] = {}
    teachers = teachers_of(runs)
    for number, run in enumerate(runs):
        paths = sorted(run.rglob(RECORD))
        if not paths:
            raise UserError(f"{run}: no evaluated model in this folder (no record.json)")
        if paths[0].parent == run:
            raise UserError(f"{run} is one row of a run: give the folder of the whole run")
        for path in paths:
            row = path.relative_to(run).parts[0]
            if number in folders.setdefault(row, {}):
                raise UserError(f"{run / row} holds several records: give a run's own folder")
            folders[row][number] = path.parent
    order = [TEACHER] * (TEACHER in folders) + method_order(folders.keys() - {TEACHER})
    arms = {name: arm(name, folders[name], teachers) for name in order}
    for each in arms.values():
        _check(each.results)
    _check_attacked([result for each in arms.values() for result in each.results])
    return arms


def arm(name: str, folders: Mapping[int, Path], teachers: Sequence[str | None] = ()) -> Arm:
    """One model by several seeds, numbered: the folders of its row, and what taught each run."""
    results = []
    for number, folder in folders.items():
        record = read_record(folder / RECORD)
        terms = str(record["method"]).split("+")
        taught = name == TEACHER or any(t not in METHODS or METHODS[t].needs_teacher for t in terms)
        teacher = teachers[number] if taught and teachers else None
        results.append(
            Result(
                study="",
                labels={},
                seed=number,
                key=name,
                folder=folder,
                record=record,
                teacher=teacher,
            )
        )
    return Arm(name, tuple(results))


def _check(results: Sequence[Result]) -> None:
    """Refuse what is no repetition of one experiment."""
    known = [(r.folder, flat(r.record["config"])) for r in results if r.record]
    for (a, ours), (b, theirs) in combinations(known, 2):
        lone = ours.keys() ^ theirs.keys()  # settings that one of them did not know, or left out
        newer = {key for key in lone if key.partition(".")[0] not in _OPTIONAL}
        terms = used([results[0].key], ours)
        if key := differing(ours, theirs, {"seed", *FREE, *STARTS, *newer}, terms):
            raise UserError(
                f"{a} and {b} are not of one recipe ({key} is {ours.get(key)} in the one and "
                f"{theirs.get(key)} in the other): only their seeds may differ"
            )
        if _EVALUATED in theirs:  # the seed is the evaluation's
            continue
        began = "checkpoint" not in theirs or _start(a.parent) == _start(b.parent) is not None
        if began and ours["seed"] == theirs["seed"]:
            raise UserError(f"{a} and {b} are both of seed {theirs['seed']}: give one run of each")


def _check_attacked(results: Sequence[Result]) -> None:
    """Refuse models whose figures are not of the same test images and attacker."""
    first: dict[str, tuple[Path, Any]] = {}
    for result in results:
        settings = result.record["settings"] if result.record else {}
        for key in settings.keys() & _ATTACKED:
            folder, value = first.setdefault(key, (result.folder, settings[key]))
            if value != settings[key]:
                raise UserError(
                    f"{folder} and {result.folder} were not attacked alike ({key} is {value} for "
                    f"the one and {settings[key]} for the other): evaluate all models on the same "
                    "test images, by one attacker"
                )


def _start(run: Path, key: str = "checkpoint") -> str | None:
    """The content of the file that a run began with, as far as it says."""
    file = run / "run.json"
    if not file.is_file():
        return None
    return content(flat(read_run(file, "leave that run out")).get(key))


def one_model(results: Sequence[Result]) -> bool:
    """Whether `gacd evaluate` attacked one file in all of several runs, as far as they say.

    Raises:
        UserError: in some of them.
    """
    rows = [r for r in results if r.record and _EVALUATED in r.record["config"]]
    files = [_start(row.folder.parent) for row in rows]
    if len(results) != len(files) or len(files) < 2 or None in files:
        return False
    for (a, ours), (b, theirs) in combinations(zip(rows, files, strict=True), 2):
        if ours == theirs and len(set(files)) > 1:
            raise UserError(f"{a.folder} and {b.folder} are of one model: give it once")
    return len(set(files)) == 1


def teachers_of(runs: Sequence[Path]) -> list[str | None]:
    """The teacher's file that each run began with, where it was given one and says so.

    Where some were given one, others may have trained it.
    """
    given = [_start(run, "teacher.checkpoint") for run in runs]
    if not any(given):
        return given
    return [file or _trained(run) for file, run in zip(given, runs, strict=True)]


def _trained(run: Path) -> str | None:
    file = run / TEACHER / MODEL
    return content(named_by_content(file)) if file.is_file() else None

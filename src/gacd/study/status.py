"""How far a study is: done, running, failed and why, and about how long the rest will take."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple, get_args

from filelock import Timeout

from gacd import config as c
from gacd.errors import UserError
from gacd.report.tables import Cell as TableCell
from gacd.report.tables import Column, Table
from gacd.storage import is_number, read_json
from gacd.study.cells import Cell
from gacd.study.grids import Entry
from gacd.study.work import Folder, Task, chosen, distinct, tasks

State = Literal["done", "running", "failed", "waiting"]
_STATES: tuple[State, ...] = get_args(State)


class Status(NamedTuple):
    """A study's cells by state, why some failed, and the hours that one worker needs for the rest.

    `hours`, also of what the cells start from: by the mean of the finished cells of the same kind,
    or else of all; None while none is finished.
    """

    counts: dict[str, dict[State, int]]
    reasons: dict[str, str]
    hours: float | None


def status(cfg: c.Study) -> Status:
    """What the study's folder says."""
    folder, listed = Folder(cfg.out), chosen(cfg)
    cells = distinct(listed)
    left = tasks(folder, list(cells.values()))
    cells |= {task.cell.key: task.cell for task in left}  # with what the listed ones start from
    states = {key: _state(folder, cell) for key, cell in cells.items()}
    counts: dict[str, dict[State, int]] = {}
    for entry in listed:
        row = counts.setdefault(entry.study, dict.fromkeys(_STATES, 0))
        row[states[entry.cell.key]] += 1
    # Also of cells that are done: a model that others start from may be wanted again.
    open_cells = [task.cell for task in left if states[task.cell.key] != "running"]
    paths = {cell.key: folder.failure(cell) for cell in open_cells}
    reasons = {key: _reason(path) for key, path in paths.items() if path.is_file()}
    return Status(counts, reasons, _hours(folder, listed, left))


def _reason(path: Path) -> str:
    try:
        return str(read_json(path, {"reason": str})["reason"])
    except UserError:  # cut short: the next try writes it anew
        return "unknown"


def _state(folder: Folder, cell: Cell) -> State:
    if folder.has(Task(cell, "record")):
        return "done"
    idle: State = "failed" if folder.failure(cell).is_file() else "waiting"
    lock = folder.lock(cell)
    if not Path(lock.lock_file).is_file():
        return idle
    try:
        with lock.acquire(timeout=0):
            return idle
    except Timeout:
        return "running"
    except OSError:  # somebody else's folder, or one to read alone: it cannot be told
        return idle


def _hours(folder: Folder, listed: Sequence[Entry], left: Sequence[Task]) -> float | None:
    spent: dict[str, list[float]] = {}
    for cell in distinct(listed).values():
        if folder.about(cell).is_file() and folder.has(Task(cell, "record")):
            spent.setdefault(_kind(cell), []).append(
                read_json(folder.about(cell), {"seconds": is_number})["seconds"]
            )
    if not spent:
        return None
    overall = fmean(seconds for row in spent.values() for seconds in row)
    return sum(fmean(spent.get(_kind(task.cell), [overall])) for task in left) / 3600


def _kind(cell: Cell) -> str:
    start = cell
    while "student" in start.parents:  # the network is that which is tuned, or frozen
        start = start.parents["student"]
    net = getattr(start.config, "student", None) or getattr(start.config, "model", None)
    return f"{cell.command} {cell.method} {net}"


def table(found: Status, title: str) -> Table:
    """One line a study; a cell that stands in several is counted in each."""
    columns = (Column("study"), *(Column(state, numeric=True) for state in _STATES))
    rows = tuple(
        (TableCell(study), *(TableCell(f"{row[state]}") for state in _STATES))
        for study, row in found.counts.items()
    )
    return Table(title, columns, rows, ())

"""Doing the cells of a study: each once, whoever and however many are at it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from filelock import FileLock, Timeout

from gacd import config as c
from gacd.commands.analyze import analyze
from gacd.commands.distill import distill
from gacd.commands.identity import flat
from gacd.commands.train import finetune, train
from gacd.commands.transfer import transfer
from gacd.data.load import NAMES
from gacd.errors import UserError, unknown
from gacd.evaluation.names import parse_attack
from gacd.methods.registry import parse_method
from gacd.models import check_model
from gacd.ranks import GOAL, REFUSAL
from gacd.report.analysis import read_analysis
from gacd.report.records import read_record
from gacd.storage import WITHOUT_LOCKS, is_number, read_json, write_bytes, write_json
from gacd.study.cells import Cell, Config
from gacd.study.grids import AWP, STUDIES, Entry, entries
from gacd.study.results import Result

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

_COMMANDS = {
    "train": train,
    "distill": distill,
    "finetune": finetune,
    "transfer": transfer,
    "analyze": analyze,
}
_POLL = 2.0  # seconds between looks at cells that others are working on
_KEPT_OUT_OF_GIT = """\
# What another machine needs is the records, and the networks trained by PGD-AT: every teacher.
*.lock
*.safetensors
!outcomes.safetensors
!cells/*/pgd-at/model.safetensors
*.tmp
events.out.tfevents.*
evaluation/
"""


@dataclass(frozen=True)
class Task:
    """A cell, and what is wanted of it: its record, or just the model that others start from."""

    cell: Cell
    goal: Literal["record", "model"]


class Folder:
    """A study's folder: `cells/KEY/` is a cell's run, with `KEY.json`, `.failed.json`, `.lock`."""

    def __init__(self, root: Path) -> None:
        self.root = root / "cells"

    def of(self, cell: Cell) -> Path:
        """The cell's run folder."""
        return self.root / cell.key

    def lock(self, cell: Cell) -> FileLock:
        """Held by the process that is at the cell; the system frees it when that process dies."""
        return FileLock(self.root / f"{cell.key}.lock", fallback_to_soft=False)

    def about(self, cell: Cell) -> Path:
        """The file that says what a cell is whose model is finished, and how long it took."""
        return self.root / f"{cell.key}.json"

    def failure(self, cell: Cell) -> Path:
        """The file that says why it failed."""
        return self.root / f"{cell.key}.failed.json"

    def has(self, task: Task) -> bool:
        """Whether a task is done."""
        wanted = task.cell.record if task.goal == "record" else task.cell.model
        return (self.of(task.cell) / wanted).is_file()


def chosen(cfg: c.Study) -> list[Entry]:
    """The entries of the configured studies and seeds, seed by seed."""
    for name in cfg.studies:
        if name not in STUDIES:
            raise unknown("study", name, STUDIES)
    for row in cfg.epochs:
        parse_method(row.removesuffix(AWP))
    names = cfg.studies or list(STUDIES)
    try:
        return [entry for seed in cfg.seeds for name in names for entry in entries(cfg, name, seed)]
    except ValueError as error:  # a cell's own configuration refuses what the study's took
        raise UserError(str(error)) from None


def distinct(listed: Iterable[Entry]) -> dict[str, Cell]:
    """The cells by their keys, each once: one may stand in several studies.

    Raises UserError where two are one but for where their data lie: keys do not know that.
    """
    found: dict[str, Cell] = {}
    for entry in listed:
        cell = found.setdefault(entry.cell.key, entry.cell)
        roots = {each.config.data.root for each in (cell, entry.cell)}
        if len(roots) > 1:
            raise UserError(
                f"{' and '.join(sorted(map(str, roots)))} would be one data set, as only their "
                "roots differ: give each a title (data.title, second_data, transfer_to)"
            )
    return found


def results(cfg: c.Study) -> list[Result]:
    """What has been found so far, for every entry. Raises UserError for a damaged record."""
    folder, found = Folder(cfg.out), []
    for entry in chosen(cfg):
        path = folder.of(entry.cell) / entry.cell.record
        read = read_analysis if entry.cell.command == "analyze" else read_record
        record = read(path) if path.is_file() else None
        found.append(
            Result(
                study=entry.study, labels=entry.labels, seed=entry.seed, key=entry.cell.key,
                folder=path.parent, record=record,
            )
        )  # fmt: skip
    return found


def tasks(folder: Folder, wanted: Sequence[Cell]) -> list[Task]:
    """What is left to do: unfinished cells, after the models that they start from."""
    left: dict[tuple[str, str], Task] = {}
    listed = {cell.key for cell in wanted}

    def add(cell: Cell, goal: Literal["record", "model"]) -> None:
        task = Task(cell, goal)
        if folder.has(task) or (cell.key, goal) in left:
            return
        if goal == "model" and cell.key in listed and not folder.has(Task(cell, "record")):
            add(cell, "record")  # which leaves the model as well
            return
        for parent in cell.parents.values():
            add(parent, "model")
        left[cell.key, goal] = task

    for cell in wanted:
        add(cell, "record")
    return list(left.values())


def run(cfg: c.Study) -> None:
    """Do every cell that is not done, with `workers` processes.

    Raises:
        UserError: some cells failed; the others are done.
    """
    folder, cells = Folder(cfg.out), list(distinct(chosen(cfg)).values())
    every = _with_parents(cells).values()
    _check_possible(every)
    _check_unchanged(folder, every)
    for data in (task.cell.config.data for task in tasks(folder, cells)):
        if data.name != "digits" and not (data.root and data.root.is_dir()):
            raise UserError(
                f"the study's images ({data.name}) are read from files: say in which folder "
                "(--data.root)" + f"; {data.root} is none" * (data.root is not None)
            )
    if cells:
        _check_locks(folder.lock(cells[0]))
    if not (cfg.out / ".gitignore").is_file():
        write_bytes(cfg.out / ".gitignore", _KEPT_OUT_OF_GIT.encode())
    started = time.time()
    with _workers(cfg, started):
        _work(cfg, started)
    if left := tasks(folder, cells):
        failed = {task.cell.key for task in left if folder.failure(task.cell).is_file()}
        waiting = {task.cell.key for task in left} - failed
        raise UserError(
            f"cells that failed: {len(failed)}, that could not begin: {len(waiting)}; "
            "'gacd study status' says why, and running the study again tries them again"
        )


def _check_locks(lock: FileLock) -> None:
    """Refuse a file system without locks."""
    try:
        with contextlib.suppress(Timeout), lock.acquire(timeout=0):
            pass
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        raise UserError(
            f"{lock.lock_file} cannot be locked: this file system has no locks, by which the "
            "processes of a study share its cells; choose an --out on another"
        ) from None


def _work(cfg: c.Study, started: float) -> None:
    """One worker: the next cell that nobody is at, until all are done or failed since `started`.

    It also ends, after the cell that it is at, where the process that started it has died.
    """
    parent, listed = parent_process(), chosen(cfg)
    names = {entry.cell.key: _name(entry) for entry in reversed(listed)}
    cells = list(distinct(listed).values())
    folder, failed = Folder(cfg.out), set[str]()  # here: a file server's clock may be another
    while left := tasks(folder, cells):
        if parent is not None and not parent.is_alive():
            return
        open_tasks = [task for task in left if not _hopeless(folder, task.cell, started, failed)]
        if not open_tasks:
            return
        done = len(cells) - sum(task.goal == "record" for task in left)
        for task in _ready(folder, open_tasks):
            cell = task.cell
            # Where somebody else is at it, the next one.
            with contextlib.suppress(Timeout), folder.lock(cell).acquire(timeout=0):
                if not folder.has(task):
                    to_start = f"{cell.command} {cell.method}, for others to start from"
                    name = names.get(cell.key, to_start)
                    print(f"[{done + 1}/{len(cells)}] {name}  ({cell.key})", flush=True)
                    if not _do(folder, task, cfg.fabric):
                        failed.add(cell.key)
                break
        else:
            time.sleep(_POLL)


@contextlib.contextmanager
def _workers(cfg: c.Study, started: float) -> Iterator[None]:
    """The other workers, who are waited for; every interrupt of this process reaches them, once."""
    if cfg.workers == 1:
        yield
        return
    spawn = get_context("spawn")
    ready = [spawn.Event() for _ in range(cfg.workers - 1)]
    others = [spawn.Process(target=_work_too, args=(cfg, started, event)) for event in ready]
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # while they import, they inherit this
    for other in others:
        other.start()
    signal.signal(signal.SIGINT, handler)

    def pass_on() -> None:
        for other, event in zip(others, ready, strict=True):
            while other.is_alive() and not event.wait(0.1):
                pass
            if other.is_alive() and other.pid is not None:
                os.kill(other.pid, signal.SIGINT)

    try:
        yield
    except KeyboardInterrupt:
        pass_on()
        raise
    finally:
        for other in others:
            while other.is_alive():
                try:
                    other.join()
                except KeyboardInterrupt:  # a second one: they stop at once
                    pass_on()


def _work_too(cfg: c.Study, started: float, ready: "Event") -> None:
    """Work beside the process that the user started; that one tells of an interrupt."""
    with contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, lambda *_: None)  # which reaches a whole job: as above
        if os.name == "posix":  # a terminal interrupts a whole group, and twice stops at once
            os.setpgrp()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ready.set()
        _work(cfg, started)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough


def _ready(folder: Folder, left: Sequence[Task]) -> Iterator[Task]:
    for task in left:
        if all(folder.has(Task(parent, "model")) for parent in task.cell.parents.values()):
            yield task


def _hopeless(folder: Folder, cell: Cell, since: float, failed: Set[str]) -> bool:
    """Whether the cell, or one that it starts from, has failed in this sitting."""
    if cell.key in failed:
        return True
    with contextlib.suppress(FileNotFoundError):  # another worker may have just done it
        if folder.failure(cell).stat().st_mtime >= since:
            return True
    missing = (p for p in cell.parents.values() if not folder.has(Task(p, "model")))
    return any(_hopeless(folder, parent, since, failed) for parent in missing)


def _do(folder: Folder, task: Task, fabric: c.Fabric) -> bool:
    """Whether it went well; if not, a file says why."""
    cell, about, started = task.cell, folder.about(task.cell), time.monotonic()
    parents = {name: folder.of(parent) for name, parent in cell.parents.items()}
    try:
        config = cell.resolved(folder.of(cell), parents, fabric)
        if fabric.devices * fabric.num_nodes > 1 and cell.command != "analyze":
            _run_on_ranks(cell.command, config, folder.root / f"{cell.key}.yaml", task.goal)
        else:
            _COMMANDS[cell.command](config, goal=task.goal)  # type: ignore[operator]
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else repr(error)
        print(f"failed: {reason}", flush=True)
        why = {**cell.identity, "reason": reason, "traceback": traceback.format_exc()}
        with contextlib.suppress(UserError):  # a full disk: it has been said above
            write_json(folder.failure(cell), why)
        return False
    folder.failure(cell).unlink(missing_ok=True)
    before = read_json(about, {"seconds": is_number})["seconds"] if about.is_file() else 0.0
    if task.goal == "record" or not before:  # a model made again adds nothing to what it took
        seconds = round(before + time.monotonic() - started, 1)
        write_json(about, {**cell.identity, "seconds": seconds})
    return True


def _run_on_ranks(command: str, config: Config, file: Path, goal: str) -> None:
    """Run the cell as a command of its own: to start its ranks, Fabric runs the program again."""
    plain = json.loads(json.dumps(asdict(config), default=str))  # paths as text
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    said = file.with_suffix(".refusal")
    said.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "gacd.cli", command, "--config", str(file)],
        env={**os.environ, GOAL: goal, REFUSAL: str(said)},
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:  # it writes its checkpoint first; one interrupt more does no harm
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        reason = f": {said.read_text(encoding='utf-8')}" if said.is_file() else ""
        said.unlink(missing_ok=True)
        raise UserError(f"gacd {command} --config {file} ended with exit code {code}{reason}")
    file.unlink()


def _check_possible(cells: Collection[Cell]) -> None:
    """Refuse, before any cell begins, networks, data and attacks that no cell could have."""
    for cell in cells:
        if cell.config.data.name not in NAMES:
            raise unknown("data set", cell.config.data.name, NAMES)
        if not isinstance(cell.config, c.Analyze):
            for name in cell.config.evaluation.attacks:
                parse_attack(name)
    nets = {getattr(cell.config, key, None) for cell in cells for key in ("model", "student")}
    for net in sorted(map(str, nets - {None})):
        check_model(net)


def _check_unchanged(folder: Folder, cells: Iterable[Cell]) -> None:
    """Refuse cells that were run under other defaults, which no address has."""
    for cell in cells:
        if not (path := folder.about(cell)).is_file():
            continue
        then, now = (
            flat(about["settings"])
            for about in (read_json(path, {"settings": dict}), cell.identity)
        )
        changed = next((key for key in then if key in now and then[key] != now[key]), None)
        if changed is not None:
            raise UserError(
                f"{path} was run when {changed} was {then[changed]} by default, now it is "
                f"{now[changed]}: choose another --out, or set it"
            )


def _with_parents(cells: Iterable[Cell]) -> dict[str, Cell]:
    """The cells and all that they start from, by their keys."""
    known: dict[str, Cell] = {}
    for cell in cells:
        known |= {cell.key: cell} | _with_parents(cell.parents.values())
    return known


def _name(entry: Entry) -> str:
    labels = entry.labels
    nets = " to ".join(str(labels[key]) for key in ("teacher", "student") if key in labels)
    what = labels.get("method") or labels.get("source") or labels["role"]
    more = (f"{k} {labels[k]}" for k in ("reweight", "negatives", "temperature") if k in labels)
    return f"{entry.study}: {', '.join([f'{what} ({nets})', *more])}, seed {entry.seed}"

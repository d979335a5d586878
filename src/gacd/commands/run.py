"""A run: its folder, its data, and the rows of its table."""

from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing import active_children, get_context
from multiprocessing.pool import AsyncResult, Pool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning_fabric import Fabric

from gacd import build
from gacd import config as c
from gacd.commands.identity import STARTS, Goal, begun_in, claim, flat, refuse_missing
from gacd.commands.rows import (
    EARLIER,
    MODEL,
    SOURCE,
    Row,
    Spent,
    begin_worker,
    measure_row,
    measure_row_elsewhere,
    row_order,
    rows_set_aside,
    summary,
)
from gacd.data.dataset import ArrayDataset
from gacd.errors import UserError
from gacd.evaluation.autoattack import check_autoattack
from gacd.evaluation.names import parse_attack
from gacd.evaluation.record import revision
from gacd.models.base import Backbone
from gacd.models.checkpoints import method_of, save_model
from gacd.progress import progress
from gacd.ranks import Ranks
from gacd.report.records import RECORD, read_record
from gacd.report.run import sorted_paths, write_run_report
from gacd.report.tables import comparison_table
from gacd.storage import WITHOUT_LOCKS, sweep, write_json


class Run:
    """One run folder: its test images, its threat model, its models and their rows."""

    def __init__(self, cfg: c.Run, goal: Goal = "report") -> None:
        revision()  # before the tree can change
        if cfg.fabric.precision == "auto":  # a run goes on as it began, on another machine too
            precision = begun_in(cfg.out) or build.precision(cfg.fabric)
            cfg = replace(cfg, fabric=replace(cfg.fabric, precision=precision))
        self.cfg, self.goal = cfg, goal
        for name in cfg.evaluation.attacks:
            parse_attack(name)
        if goal == "report":  # a study's cell has made what it starts from
            refuse_missing(map(flat(asdict(cfg)).get, STARTS))
        self.options = build.method_options(cfg)
        self.threat = build.threat(cfg.threat)
        self.fabric: Fabric = build.fabric(cfg.fabric)
        self.notes: set[str] = set()
        if self.threat.norm == "l2" and self.threat.eps < 0.1:
            self.note(f"an l2 eps of {self.threat.eps:.3g} is next to nothing; 0.5 is usual")
        if cfg.evaluation.step_size is not None:
            self.threat.check_step(c.fraction(cfg.evaluation.step_size))
        for eps in cfg.evaluation.eps_curve:
            replace(self.threat, eps=c.fraction(eps))  # refused now, not after training
        self.test, images = self.read()
        if "autoattack" in cfg.evaluation.attacks:
            check_autoattack(self.test.images, self.threat)
        self.lock: FileLock | None = None
        self.once(lambda: self._claim(images))
        self.pool: Pool | None = None
        self.workers: list[BaseProcess] = []
        self.pending: dict[str, AsyncResult[None]] = {}

    def read(self) -> tuple[ArrayDataset, dict[str, str]]:
        """The test images, and fingerprints of all images that this run is of, by what they are."""
        assert isinstance(self.cfg, c.Evaluate)  # other commands train, and read more
        test = build.test_part(self.cfg.data, self.cfg.checkpoint)
        return test, {"images": test.fingerprint()}

    def _claim(self, images: dict[str, str]) -> None:
        """Make the folder this process's until it ends, however it ends, and this run's."""
        path = self.cfg.out / ".lock"
        new = not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.cfg.out} cannot be a folder ({error.strerror}): choose another --out"
            ) from None
        self.lock = FileLock(path, is_singleton=True, fallback_to_soft=False)
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"{self.cfg.out}: another process is at work there; wait for it, or choose "
                "another --out"
            ) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            self.lock = None
        try:
            again = claim(self.cfg.out, self.cfg, images=images, goal=self.goal)
        except UserError:
            if self.lock is not None:
                self.lock.release()
                if new:  # somebody else's folder stays as it was
                    path.unlink(missing_ok=True)
            raise
        if again:
            self.note(
                f"measured again, as the evaluation settings are others than before: "
                f"{', '.join(again)} (what was found then stays in {EARLIER})"
            )
        if self.lock is not None:
            sweep(self.cfg.out)

    def once(self, do: Callable[[], object]) -> None:
        """What the first rank does and the others wait for; what it refuses, all refuse."""
        refused = None
        if self.fabric.is_global_zero:
            try:
                do()
            except UserError as error:
                refused = str(error)
        refused = self.fabric.broadcast(refused)
        if refused is not None:
            raise UserError(refused)

    def note(self, text: str) -> None:
        """Say what may not be meant, once."""
        if self.fabric.is_global_zero and text not in self.notes:
            print(f"note: {text}", flush=True)
        self.notes.add(text)

    def keep(
        self,
        out: Path,
        model: Backbone,
        architecture: str,
        method: str,
        spent: Spent | None = None,
        *,
        features: bool = False,
    ) -> None:
        """Write `model.safetensors`, which evaluates and fine-tunes anywhere.

        What was `spent` on it goes along, for whoever trains it further; whether it has `features`
        alone and a classifier that nobody trained, too.
        """
        if self.fabric.is_global_zero and not (out / MODEL).is_file():
            meta: dict[str, Any] = {
                "architecture": architecture,
                "method": method,
                "seed": self.cfg.seed,
                "classes": list(self.test.classes),
                "size": self.test.size,
            }
            if spent is not None:
                meta["spent"] = asdict(spent)
            if features:
                meta["features"] = True
            save_model(out / MODEL, model, meta)

    def load(
        self, path: Path | None, given: build.Given, flag: str = "--model"
    ) -> tuple[Backbone, str]:
        """A saved network for this run's data, and its architecture's name.

        Of a file from elsewhere, its model must be `given`, by `flag` on the command line.
        """
        if path is None:
            raise UserError(
                "which model? give --checkpoint FILE, a .safetensors of gacd or a public .pt"
            )
        size = self.cfg.data.size
        return build.from_checkpoint(path, given, self.test, size=size, flag=flag)

    def keep_source(self, path: Path, given: build.Given) -> None:
        """Keep the network that `transfer`, and the diagnosis, make their images on."""
        model, name = self.load(path, given, "--source_model")
        self.keep(self.cfg.out / SOURCE, model, name, method_of(path))

    def measure(self, row: Row) -> None:
        """Attack a finished model and write its record; done once per row.

        With `evaluation.workers` this happens in another process, while the next model trains.
        """
        done = (self.cfg.out / row.name / RECORD).is_file()
        if self.fabric.broadcast(done or self.goal == "model"):
            return
        if self.cfg.evaluation.workers == 0:
            ranks = Ranks(self.fabric.global_rank, self.fabric.world_size, self.fabric.barrier)
            measure_row(self.cfg, row, self.test, self.fabric.device, ranks=ranks)
        elif self.fabric.is_global_zero:
            self._measure_elsewhere(row)

    def _measure_elsewhere(self, row: Row) -> None:
        if self.pool is None:
            before, workers = active_children(), self.cfg.evaluation.workers
            self.pool = get_context("spawn").Pool(workers, initializer=begin_worker)
            self.workers = [child for child in active_children() if child not in before]
        self.pending[row.name] = self.pool.apply_async(measure_row_elsewhere, (self.cfg, row))

    def _wait(self) -> None:
        """For the evaluations that other processes are at."""
        waiting = len(self.pending)
        try:
            with progress(waiting, "evaluation", unit="models", enabled=waiting > 0) as bar:
                for result in self.pending.values():
                    while not result.ready():
                        result.wait(1)
                        if any(worker.exitcode is not None for worker in self.workers):
                            raise UserError(  # a pool goes on waiting for what it was at
                                "a process that evaluates was killed (is memory short?): run the "
                                "same command again, with evaluation.workers 0 if need be"
                            )
                    result.get()
                    bar.advance()
        finally:
            if self.pool is not None:
                self.pool.terminate()

    def finish(self, title: str) -> None:
        """Write `results.json` and `report.html`, and print the table.

        Of other commands' rows, too: no table has figures by two evaluations.
        """
        others: list[Row] = []
        self.once(lambda: others.extend(rows_set_aside(self.cfg.out, self.pending)))
        for row in self.fabric.broadcast(others):
            self.measure(row)
        if not self.fabric.is_global_zero:
            return
        self._wait()
        if self.goal == "report":
            self._report(title)
        if self.lock is not None:
            self.lock.release()

    def _report(self, title: str) -> None:
        from rich.console import Console

        order = row_order(self.cfg.out)
        paths = sorted_paths(self.cfg.out, f"*/{RECORD}", order)
        results = [summary(read_record(path)) for path in paths]
        write_json(self.cfg.out / "results.json", results)
        write_run_report(self.cfg.out, title, order=order)
        console = Console()
        console.print(comparison_table(results, caption=title))
        print(f"results: {self.cfg.out / 'results.json'}")
        print(f"report:  {self.cfg.out / 'report.html'}")

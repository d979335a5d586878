"""What each command does: stages, each in a folder of its own, each resumable, none done twice."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing import active_children, get_context
from multiprocessing.pool import AsyncResult, Pool
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from lightning_fabric import Fabric

from gacd import build
from gacd import config as c
from gacd.anchors import AnchorBank, Fingerprint
from gacd.data.batches import iterate
from gacd.data.dataset import Splits
from gacd.errors import UserError
from gacd.evaluation.batches import model_fingerprint
from gacd.evaluation.names import parse_attack
from gacd.identity import Goal, claim
from gacd.linear import fit_head
from gacd.methods import Teacher, create_method
from gacd.methods.base import check_objective, check_same_classes
from gacd.methods.cost import measure
from gacd.methods.registry import Named, method_order, parse_method
from gacd.models.base import Backbone
from gacd.models.checkpoints import load_weights, save_model
from gacd.progress import progress
from gacd.report.run import write_run_report
from gacd.report.tables import comparison_table
from gacd.rows import (
    MODEL,
    SOURCE,
    TEACHER,
    Row,
    Spent,
    find_records,
    ignore_interrupts,
    measure_row,
    measure_row_elsewhere,
    summary,
)
from gacd.storage import fingerprint, read_json, write_json
from gacd.training.loop import fit


class Run:
    """One run folder: its data, its threat model, and the stages that every command is made of."""

    def __init__(self, cfg: c.Run, goal: Goal = "report") -> None:
        self.cfg, self.goal = cfg, goal
        for name in cfg.evaluation.attacks:
            parse_attack(name)
        self.options = build.method_options(cfg)
        self.threat = build.threat(cfg.threat)
        self.fabric: Fabric = build.fabric(cfg.fabric)
        self.splits: Splits = build.splits(cfg.data, cfg.seed)
        images = fingerprint(part.fingerprint() for part in (self.splits.train, self.splits.test))
        self.once(lambda: claim(cfg.out, cfg, images=images, goal=goal))
        self.pool: Pool | None = None
        self.workers: list[BaseProcess] = []
        self.pending: dict[str, AsyncResult[None]] = {}

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

    def train(
        self,
        name: str,
        method: str,
        model: Backbone,
        architecture: str,
        training: c.Training,
        *,
        teacher: Teacher | None = None,
        bank: AnchorBank | None = None,
        weights: dict[str, float] | None = None,
        before: Spent | None = None,
    ) -> Spent:
        """Train `model` in the stage folder `name` and keep it there.

        Returns what it took, with what earlier stages took `before`.
        """
        out = self.cfg.out / name
        built = create_method(
            method,
            model,
            build.attack(training.attack, self.threat),
            teacher=teacher,
            bank=bank,
            seed=self.cfg.seed,
            options=self.options,
            weights=weights,
            awp=build.awp(training),
        ).to(self.fabric.device)
        cost = measure(built, self.splits.train, batch_size=training.batch_size)
        plan = build.plan(training, self.cfg.data, self.cfg.fabric, self.cfg.seed)
        summary = fit(self.fabric, built, self.splits, plan, out=out, name=name)
        model.requires_grad_(True)  # a head that had no part in this has one in what follows
        here = Spent(summary.seconds, summary.images, cost * summary.images)
        spent = here if before is None else before + here
        self.keep(out, model, architecture, method, spent)
        return spent

    def keep(
        self,
        out: Path,
        model: Backbone,
        architecture: str,
        method: str,
        spent: Spent | None = None,
    ) -> None:
        """Write `model.safetensors`, which evaluates and fine-tunes anywhere.

        What was `spent` on it goes along, for whoever trains it further.
        """
        if self.fabric.is_global_zero and not (out / MODEL).is_file():
            meta = {"architecture": architecture, "method": method, "seed": self.cfg.seed}
            known = {} if spent is None else {"spent": asdict(spent)}
            save_model(out / MODEL, model, meta | known)

    def measure(self, row: Row) -> None:
        """Attack a finished model and write its record; done once per row.

        With `evaluation.workers` this happens in another process, while the next model trains.
        """
        done = (self.cfg.out / row.name / "record.json").is_file()
        if self.fabric.broadcast(done or self.goal == "model"):
            return
        workers = self.cfg.evaluation.workers
        if workers == 0:
            ranks = build.ranks(self.fabric)
            measure_row(self.cfg, row, self.splits.test, self.fabric.device, ranks=ranks)
        if workers == 0 or not self.fabric.is_global_zero:
            return
        if self.pool is None:
            before = active_children()
            self.pool = get_context("spawn").Pool(workers, initializer=ignore_interrupts)
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
        """Write `results.json` and `report.html`, and print the table."""
        if not self.fabric.is_global_zero:
            return
        self._wait()
        if self.goal != "report":
            return
        from rich.console import Console

        order = _order(self.cfg.out)
        records = find_records(self.cfg.out, order)
        results = [summary(record) for record in records]
        write_json(self.cfg.out / "results.json", results)
        write_run_report(self.cfg.out, title, order=order)
        console = Console()
        console.print(comparison_table(results, caption=title))
        console.print(f"results: {self.cfg.out / 'results.json'}")
        console.print(f"report:  {self.cfg.out / 'report.html'}")


def train(cfg: c.Train, *, goal: Goal = "report") -> None:
    """Train one network and evaluate it."""
    _without_teacher(cfg.method, cfg.training)
    run = Run(cfg, goal)
    model = build.model(cfg.model, run.splits.train, seed=cfg.seed)
    spent = run.train(cfg.method, cfg.method, model, cfg.model, cfg.training)
    run.measure(Row(cfg.method, cfg.model, cfg.method, "student", spent))
    run.finish(f"{cfg.method} on {run.splits.test.name}")


def finetune(cfg: c.Finetune, *, goal: Goal = "report") -> None:
    """Fine-tune a saved network adversarially and evaluate it."""
    _without_teacher(cfg.method, cfg.training)
    model, name = _checkpoint(cfg.checkpoint, cfg.model, run := Run(cfg, goal))
    if cfg.source is not None:
        source, source_name = _checkpoint(cfg.source, None, run)
        run.keep(cfg.out / SOURCE, source, source_name, cfg.source.stem)
    method = "finetuned"
    assert cfg.checkpoint is not None
    before = Spent.read(cfg.checkpoint)
    spent = run.train(method, cfg.method, model, name, cfg.training, before=before)
    run.measure(Row(method, name, cfg.method + " fine-tuned", "student", spent))
    run.finish(f"{name}, fine-tuned on {run.splits.test.name}")


def evaluate_checkpoint(cfg: c.Evaluate) -> None:
    """Attack a saved network."""
    model, name = _checkpoint(cfg.checkpoint, cfg.model, run := Run(cfg))
    assert cfg.checkpoint is not None
    if cfg.source is not None:
        source, source_name = _checkpoint(cfg.source, cfg.source_model, run, "--source_model")
        run.keep(cfg.out / SOURCE, source, source_name, cfg.source.stem)
    run.keep(cfg.out / "model", model, name, cfg.checkpoint.stem)
    run.measure(Row("model", name, cfg.checkpoint.stem, "student"))
    run.finish(f"{cfg.checkpoint.name} on {run.splits.test.name}")


def distill(cfg: c.Distill, title: str = "", *, goal: Goal = "report") -> None:
    """From a teacher to evaluated students: every row of the table, each from its own stages."""
    for method in cfg.methods:
        named = parse_method(method, cfg.weights)
        _check(named, _first_stage(cfg, named))
        if cfg.data.stream and named.needs_bank and cfg.gacd.estimator != "sampled":
            raise UserError(
                "the anchor bank of streamed data stays on disk, too: say --gacd.estimator sampled"
            )
    _without_teacher(cfg.teacher.method, cfg.teacher.training)
    run = Run(cfg, goal)
    build.model(cfg.student, run.splits.train, seed=cfg.seed)  # impossible ones: refused now
    teacher, teacher_name, spent = _teacher(run, cfg)
    if cfg.teacher.evaluate:
        run.measure(Row(TEACHER, teacher_name, cfg.teacher.method, "teacher", spent))
    for method in cfg.methods:
        spent = _student(run, cfg, method, Teacher(teacher))
        role = "undefended" if method == "natural" else "student"
        run.measure(Row(method, cfg.student, method, role, spent))
    run.finish(title or f"{teacher_name} to {cfg.student} on {run.splits.test.name}")


def report(cfg: c.Report) -> None:
    """Draw the report of a run folder anew from its records."""
    write_run_report(cfg.out, order=_order(cfg.out))
    print(f"report: {cfg.out / 'report.html'}")


def _without_teacher(method: str, training: c.Training) -> None:
    """Refuse a method that `train`, `finetune` or a teacher cannot use."""
    named = parse_method(method)
    if named.needs_teacher:
        raise UserError(f"{method} needs a teacher: use gacd distill --methods {method}")
    _check(named, training)


def _check(named: Named, training: c.Training) -> None:
    """Refuse, before anything trains, an attack on what the method does not have."""
    if named.attacks:
        check_objective(
            training.attack.objective,
            name=named.name,
            trains_head=named.trains_head,
            has_teacher=named.needs_teacher,
        )


def _order(out: Path) -> list[str]:
    """The rows of a run folder in the order of its table: the teacher, then method by method."""
    names = (path.parent.name for path in out.glob("*/record.json"))
    return [TEACHER, *method_order(name for name in names if name != TEACHER)]


def _checkpoint(
    path: Path | None, name: str | None, run: Run, flag: str = "--model"
) -> tuple[Backbone, str]:
    if path is None:
        raise UserError(
            "which model? give --checkpoint FILE, a .safetensors of gacd or a public .pt"
        )
    data = run.splits.train
    return build.from_checkpoint(
        path, name, num_classes=data.num_classes, channels=data.channels, flag=flag
    )


def _teacher(run: Run, cfg: c.Distill) -> tuple[Backbone, str, Spent]:
    data = run.splits.train
    if cfg.teacher.checkpoint is not None:
        teacher, name = build.from_checkpoint(
            cfg.teacher.checkpoint,
            None if cfg.teacher.checkpoint.suffix == ".safetensors" else cfg.teacher.model,
            num_classes=data.num_classes,
            channels=data.channels,
        )
        run.keep(cfg.out / TEACHER, teacher, name, cfg.teacher.checkpoint.stem)
        teacher.to(run.fabric.device).to(memory_format=torch.channels_last)
        return teacher, name, Spent()
    teacher = build.model(cfg.teacher.model, data, seed=cfg.seed)
    spent = run.train(TEACHER, cfg.teacher.method, teacher, cfg.teacher.model, cfg.teacher.training)
    return teacher, cfg.teacher.model, spent


def _first_stage(cfg: c.Distill, named: Named) -> c.Training:
    """How a student begins: all of its training, or what comes before the head or +aft."""
    whole = named.trains_head and not named.aft
    training = cfg.training if whole else cfg.distillation
    if not named.attacks:  # without robustness there, validation under attack is noise
        training = replace(training, select="natural")
    return training


def _student(run: Run, cfg: c.Distill, method: str, teacher: Teacher) -> Spent:
    """Make the student of one row; returns what its training took."""
    named = parse_method(method, cfg.weights)
    student = build.model(cfg.student, run.splits.train, seed=cfg.seed + 1)
    check_same_classes(student, teacher.module)
    if not named.trains_head:
        folder = f"{named.name}/features"
    else:
        folder = f"{method}/distillation" if named.aft else method
    spent = run.train(
        folder,
        named.name,
        student,
        cfg.student,
        _first_stage(cfg, named),
        teacher=teacher,
        bank=_bank(run, teacher, cfg.gacd.anchors, cfg.bank) if named.needs_bank else None,
        weights=cfg.weights,
    )
    if not named.trains_head:
        spent = _head(run, cfg, named.name, student, spent)
    if named.aft:
        spent = run.train(method, "pgd-at", student, cfg.student, cfg.finetune, before=spent)
    return spent


def _head(run: Run, cfg: c.Distill, name: str, student: Backbone, spent: Spent) -> Spent:
    """Fit the linear layer of distilled features, once for a method with and without +aft."""
    folder = run.cfg.out / name
    path, done = folder / MODEL, folder / "linear.json"
    if run.fabric.is_global_zero and not path.is_file():
        started = time.monotonic()
        print(f"{name}: fitting the linear layer on frozen features", flush=True)
        threat = run.threat if cfg.linear_select == "both" else None
        fitted = asdict(fit_head(student, run.splits, threat))
        write_json(done, {**fitted, "seconds": time.monotonic() - started})
        spent += Spent(read_json(done)["seconds"])
        run.keep(folder, student, cfg.student, name, spent)
    run.fabric.barrier()
    load_weights(student, path)
    return Spent.read(path)


def _bank(run: Run, teacher: Teacher, dtype: str, folder: Path | None) -> AnchorBank:
    train = run.splits.train.to(run.fabric.device)
    made_of = Fingerprint(
        teacher=model_fingerprint(teacher.module),
        data=train.fingerprint(),
        preprocessing=f"none, {dtype}",
    )
    path = (folder or run.cfg.out) / "anchors.safetensors"
    if not path.is_file() and run.fabric.is_global_zero:
        batches = iterate(train, 512, shuffle=False, seed=0, epoch=0, drop_last=False)
        AnchorBank.build(
            teacher.module, batches, size=len(train), fingerprint=made_of, dtype=dtype
        ).save(path)
    run.fabric.barrier()
    # Mapped, where it may not fit: a draw reads the rows it draws.
    device = None if run.cfg.data.stream else run.fabric.device
    return AnchorBank.load(path, expected=made_of, device=device)

"""`gacd distill`: from a robust teacher to evaluated students."""

import shutil
from dataclasses import asdict

import torch

from gacd import build
from gacd import config as c
from gacd.anchors import AnchorBank, Fingerprint, check_width
from gacd.commands.identity import Goal
from gacd.commands.rows import MODEL, TEACHER, Row, Spent
from gacd.commands.training import TrainingRun, check_attack, refuse_teacher
from gacd.commands.unlabelled import answered, read_unlabelled
from gacd.data.batches import iterate
from gacd.data.dataset import Splits
from gacd.errors import UserError
from gacd.linear import fit_head
from gacd.methods import Teacher
from gacd.methods.registry import Named, parse_method
from gacd.models.base import Backbone, model_fingerprint
from gacd.models.checkpoints import load_weights, method_of, names_itself
from gacd.storage import write_json
from gacd.training.ranks import refuse_memory


def distill(cfg: c.Distill, title: str = "", *, goal: Goal = "report") -> None:
    """From a teacher to evaluated students: every row of the table, each from its own stages."""
    for method in cfg.methods:
        named = parse_method(method, cfg.weights)
        check_attack(named, _first_stage(cfg, named))
        if named.aft:
            check_attack(_finetuning(cfg), cfg.finetune)
        if cfg.data.stream and "gacd" in named.terms and cfg.gacd.estimator != "sampled":
            raise UserError(
                "the anchor bank of streamed data stays on disk, too: say --gacd.estimator sampled"
            )
    refuse_teacher(cfg.teacher.method, cfg.teacher.training)
    run = TrainingRun(cfg, goal)
    pixels = None if cfg.unlabelled is None else read_unlabelled(run, cfg.unlabelled)
    _refuse_early(run, cfg, 0 if pixels is None else len(pixels))
    teacher, row = _teacher(run, cfg)
    taught = run.splits if pixels is None else answered(run, pixels, teacher)
    if pixels is not None and not any(parse_method(m).needs_teacher for m in cfg.methods):
        run.note("the unlabelled images train none of these methods: they have no teacher")
    if cfg.teacher.evaluate:
        run.measure(row)
    for method in cfg.methods:
        run.measure(_student(run, cfg, method, Teacher(teacher), taught))
    run.finish(title or f"{row.architecture} to {cfg.student} on {run.test.name}")


def _finetuning(cfg: c.Distill) -> Named:
    named = parse_method(cfg.finetune_method, cfg.weights)
    if named.aft or named.needs_bank or not (named.trains_head and named.attacks):
        raise UserError(
            f"finetune_method {cfg.finetune_method} does not train the whole student adversarially "
            "by itself: use pgd-at, trades, mart, or a method with soft labels, such as rslad"
        )
    return named


def _refuse_early(run: TrainingRun, cfg: c.Distill, unlabelled: int) -> None:
    """Refuse, before the teacher trains, what would fail only after it.

    Students with a teacher train on so many `unlabelled` images, too.
    """
    if cfg.bank is not None and cfg.bank.exists() and not cfg.bank.is_dir():
        raise UserError(f"{cfg.bank}: bank is a folder, in which anchors.safetensors is or will be")
    build.model(cfg.student, run.splits.train, seed=cfg.seed)
    named = [parse_method(method, cfg.weights) for method in cfg.methods]
    if cfg.teacher.checkpoint is None:
        taught = parse_method(cfg.teacher.method)
        run.check_stage(cfg.teacher.training, "teacher.training", taught)
    for method in named:
        first = "training" if _in_one_stage(method) else "distillation"
        more = unlabelled if method.needs_teacher else 0
        run.check_stage(_first_stage(cfg, method), first, method, more)
        if method.aft:
            run.check_stage(cfg.finetune, "finetune", _finetuning(cfg), more)
    terms = {term for method in named for term in method.terms}
    if run.fabric.world_size > 1:
        refuse_memory("crd" in terms or ("gacd" in terms and cfg.gacd.estimator == "memory"))
    if "gacd" in terms and cfg.gacd.teacher_projection == "pca" and cfg.teacher.checkpoint is None:
        teacher = build.model(cfg.teacher.model, run.splits.train, seed=cfg.seed)
        check_width(cfg.gacd.dim, teacher.num_features)


def _teacher(run: TrainingRun, cfg: c.Distill) -> tuple[Backbone, Row]:
    told = cfg.teacher
    if told.checkpoint is None:
        teacher = build.model(told.model, run.splits.train, seed=cfg.seed)
        spent = run.train(TEACHER, told.method, teacher, told.model, told.training)
        return teacher, Row(TEACHER, told.model, told.method, "teacher", spent)
    given = build.Given(told.model, told.mean, told.std)
    if names_itself(told.checkpoint):
        given = given._replace(model=None)  # what the teacher would be if it were trained
    teacher, name = run.load(told.checkpoint, given, "--teacher.model")
    method, spent = method_of(told.checkpoint), Spent.read(told.checkpoint)
    run.note_seed(told.checkpoint)
    run.keep(cfg.out / TEACHER, teacher, name, method, spent)
    teacher.to(run.fabric.device).to(memory_format=torch.channels_last)
    return teacher, Row(TEACHER, name, method, "teacher", spent)


def _first_stage(cfg: c.Distill, named: Named) -> c.Training:
    """How a student begins: all of its training, or what comes before the head or +aft."""
    return cfg.training if _in_one_stage(named) else cfg.distillation


def _in_one_stage(named: Named) -> bool:
    return named.trains_head and not named.aft


def _student(
    run: TrainingRun, cfg: c.Distill, method: str, teacher: Teacher, taught: Splits
) -> Row:
    """Make the student of one row, on `taught` data where it has the teacher."""
    named = parse_method(method, cfg.weights)
    splits = taught if named.needs_teacher else run.splits
    student = build.model(cfg.student, run.splits.train, seed=cfg.seed + 1)
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
        splits=splits,
        teacher=teacher,
        bank=_bank(run, teacher, splits, cfg) if named.needs_bank else None,
        weights=cfg.weights,
    )
    if not named.trains_head:
        spent = _head(run, cfg, named.name, student, splits, spent)
    if named.aft:
        spent = run.train(
            method,
            cfg.finetune_method,
            student,
            cfg.student,
            cfg.finetune,
            splits=splits,
            teacher=teacher if _finetuning(cfg).needs_teacher else None,
            weights=cfg.weights,
            before=spent,
            label=method,
        )
    role = "undefended" if method == "natural" else "student"
    more = len(splits.train) - len(run.splits.train)
    return Row(method, cfg.student, method, role, spent, more)


def _head(
    run: TrainingRun, cfg: c.Distill, name: str, student: Backbone, splits: Splits, spent: Spent
) -> Spent:
    """Fit the linear layer of distilled features, once for a method with and without +aft."""
    folder = run.cfg.out / name
    path, cache = folder / MODEL, folder / "linear"
    if run.fabric.is_global_zero and not path.is_file():
        print(f"{name}: fitting the linear layer on frozen features", flush=True)
        fit = fit_head(student, splits, build.linear_threat(cfg), cache=cache)
        write_json(folder / "linear.json", asdict(fit))
        run.keep(folder, student, cfg.student, name, spent + Spent(fit.seconds))
    run.fabric.barrier()
    shutil.rmtree(cache, ignore_errors=True)  # also what a kill left just here
    load_weights(student, path)
    return Spent.read(path)


def _bank(run: TrainingRun, teacher: Teacher, splits: Splits, cfg: c.Distill) -> AnchorBank:
    train, dtype = splits.train.to(run.fabric.device), cfg.gacd.anchors
    made_of = Fingerprint(
        teacher=model_fingerprint(teacher.module),
        data=train.fingerprint(),
        preprocessing=f"none, {dtype}",
    )
    other = "" if dtype == c.GACD.anchors else f"-{dtype}"
    path = (cfg.bank or cfg.out) / f"anchors{other}.safetensors"
    if run.fabric.is_global_zero and not path.is_file():
        batches = iterate(train, 512)
        AnchorBank.build(
            teacher.module, batches, size=len(train), fingerprint=made_of, dtype=dtype
        ).save(path)
    run.fabric.barrier()
    bank = AnchorBank.load(path, expected=made_of)
    # Mapped, where it may not fit: a draw reads the rows it draws.
    return bank if cfg.data.stream else bank.to(run.fabric.device)

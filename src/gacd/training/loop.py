"""The one training loop. It knows no method: it steps, averages, validates, guards and resumes."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.optim import SGD

from gacd.attacks.validation import one_answer
from gacd.data.batches import iterate, steps_per_epoch
from gacd.data.dataset import Splits
from gacd.errors import UserError, unknown
from gacd.methods.method import Method
from gacd.models.checkpoints import statistics
from gacd.progress import progress
from gacd.randomness import global_randomness_kept, keyed_generator
from gacd.storage import (
    append_json_line,
    check_json,
    is_number,
    is_whole,
    load_meta,
    load_tensors,
    read_json,
    read_json_lines,
    save_tensors,
    write_json,
    write_json_lines,
)
from gacd.training.average import averaged, update
from gacd.training.contexts import compiled, fastest_convolutions, interruptible, tensorboard
from gacd.training.ranks import (
    any_rank,
    check_states,
    mean_over_ranks,
    per_rank,
    same_buffers,
    synchronised,
)
from gacd.training.schedules import Schedule, learning_rate
from gacd.training.state import load_networks, load_state, refuse_other, save_state, stage_of
from gacd.training.validation import validate

DONE, BEST = "done.json", "best.safetensors"
"""A stage's files once it is finished: its summary, and the weights that validation chose."""
_GUARD_EVERY = 25  # steps between looks at the guard: each look waits for the device
Select = Literal["robust", "natural", "last"]
_BEST = dict.fromkeys(("score", "epoch", "val_natural", "val_robust"), is_number)
_ATTACK = 1  # keeps the attacks' random numbers apart from the augmentation's


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a stage trains: SGD with Nesterov momentum, one learning rate for everything.

    `batch_size` counts the images of a step on all ranks together, so that a run takes the same
    steps on any number of them; `sync_batch_norm` normalises over all of these (GPUs only).
    `ema` is the decay of the weight average that is validated and kept (0: none); `select` says
    which checkpoint is kept, one that is no better than always giving one answer only if all are
    so, and "robust" means "natural" for a method without an attack; `pad` and `flip` are the
    augmentation, `schedule` and `warmup` the `learning_rate`'s; `clip_norm` is the longest
    gradient. Raises UserError for settings out of range.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.0
    ema: float = 0.0
    clip_norm: float = 5.0
    select: Select = "robust"
    pad: int = 0
    flip: bool = False
    seed: int = 0
    compile: bool = False
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise UserError(
                f"epochs and batch_size must be at least 1, not {self.epochs} and {self.batch_size}"
            )
        if not self.lr > 0 or not 0 <= self.ema < 1:
            raise UserError(f"lr must be above 0 and ema in [0, 1), not {self.lr} and {self.ema}")
        if not (0 <= self.momentum < 1 and 0 <= self.warmup < 1 and self.clip_norm > 0):
            raise UserError(
                "momentum and warmup must be in [0, 1) and clip_norm above 0 (math.inf: no limit), "
                f"not {self.momentum}, {self.warmup} and {self.clip_norm}"
            )
        if self.weight_decay < 0 or self.pad < 0:
            raise UserError(
                f"weight_decay and pad must be 0 or more, not {self.weight_decay} and {self.pad}"
            )
        if self.schedule not in get_args(Schedule):
            raise unknown("schedule", self.schedule, get_args(Schedule))
        if self.select not in get_args(Select):
            raise unknown("select", self.select, get_args(Select))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a finished stage was: the checkpoint kept, its validation accuracies in %, the cost."""

    selected_epoch: int
    val_natural: float
    val_robust: float
    seconds: float
    images: int


def fit(
    fabric: Fabric, method: Method, splits: Splits, plan: Plan, *, out: Path | str, name: str
) -> Summary:
    """Train `method` on `splits.train`; leave in it the weights that validation chose.

    The student trains in training mode, all of it: a network that keeps parts in evaluation says so
    in its own `train`. Its head, where the method held it still, can train again afterwards.

    Writes into `out`: `log.jsonl` and TensorBoard events (a row an epoch), `checkpoint.safetensors`
    (the whole state, each epoch and on Ctrl-C), `best.safetensors` and, at the end, `done.json`.
    Called again, it continues from the last checkpoint to the same bits (on a GPU, to rounding:
    cuDNN adds in no fixed order), or, if done, only loads; where the weights are gone (a folder may
    travel without them), it trains again.
    On several ranks all of them stop at the same step, at most 25 after the Ctrl-C.

    Raises:
        UserError: the data are not the networks' or the anchor bank's, `fabric` casts images to a
            smaller type (`gacd.training.precision.Bf16Autocast` does not), `out` holds a training
            by another method, other settings of it or another plan, or the loss or the gradient is
            no longer finite; the message names the remedy.
        KeyboardInterrupt: after Ctrl-C, once the checkpoint is written.
    """
    method.hold()
    try:
        return _fit(fabric, method, splits, plan, Path(out), name)
    finally:
        method.release()


def _fit(
    fabric: Fabric, method: Method, splits: Splits, plan: Plan, out: Path, name: str
) -> Summary:
    method.check(splits.train)
    if plan.select == "robust" and method.objective is None:
        plan = replace(plan, select="natural")  # under attack there is only noise
    if fabric.strategy.precision.convert_input(torch.zeros(1)).dtype != torch.float32:
        raise UserError(
            "this Fabric rounds images before they are attacked: give it "
            "plugins=[gacd.training.precision.Bf16Autocast('cuda')] (or 'cpu') for its precision"
        )
    if method.teacher is not None:
        method.teacher.module.to(fabric.device)
    method.to(fabric.device).to(memory_format=torch.channels_last)
    finished, best = out / DONE, out / BEST
    stage = stage_of(method, asdict(plan))
    state = out / "checkpoint.safetensors"
    if finished.is_file() and best.is_file():
        if fabric.is_global_zero:
            state.unlink(missing_ok=True)
        summary = _read_summary(finished, stage)
        _take(best, method)
        return summary
    if fabric.is_global_zero:
        finished.unlink(missing_ok=True)  # of weights that are gone: not of those to come

    optimizer = _optimizer(method, plan)
    average = averaged(method) if plan.ema else None
    normalised = statistics(method.student)
    kept = method if average is None else average
    train, val = splits.train.to(fabric.device), splits.val.to(fabric.device)
    alone = fabric.world_size == 1
    share = per_rank(plan.batch_size, fabric.world_size)
    if not alone:
        check_states(method)
    steps = steps_per_epoch(len(train), share, drop_last=True, world_size=fabric.world_size)

    meta: dict[str, Any] = {"epoch": 0, "step": 0, "best": None, "seconds": 0.0, "sums": {}}
    if state.is_file():
        # A kill may have come between the two files: what counts is whose weights are there.
        meta = load_state(state, method, average, optimizer, stage) | {"best": _read_best(best)}
    if fabric.is_global_zero:
        _forget_after(out / "log.jsonl", meta["epoch"])
    sums = {k: (torch.tensor(v, device=fabric.device), n) for k, (v, n) in meta["sums"].items()}

    started = time.monotonic() - meta["seconds"]
    trivial = -1.0 if plan.select == "last" else one_answer(val.labels)

    def rank(of: Mapping[str, Any]) -> tuple[bool, float | int]:
        return of["val_natural"] > trivial, of["score"]

    def save(epoch: int, step: int) -> None:
        meta.update(epoch=epoch, step=step, seconds=time.monotonic() - started, stage=stage)
        totals = mean_over_ranks(fabric, {k: float(v) for k, (v, _) in sums.items()})
        meta["sums"] = {k: (v, sums[k][1]) for k, v in totals.items()}
        if fabric.is_global_zero:
            save_state(state, method, average, optimizer, meta)
        fabric.barrier()

    total = plan.epochs * steps * plan.batch_size
    before = (meta["epoch"] * steps + meta["step"]) * plan.batch_size
    shown = fabric.is_global_zero
    with (
        progress(total, name, done=before, enabled=shown) as bar,
        tensorboard(out, first=meta["epoch"] + 1, enabled=shown) as board,
        interruptible(alone) as interrupted,
        compiled(method, enabled=plan.compile),
        fastest_convolutions(fabric.device),
        global_randomness_kept(fabric.device),
        synchronised(method.student, enabled=plan.sync_batch_norm, device=fabric.device),
    ):
        step_module, step_optimizer = fabric.setup(method, optimizer)
        finite = torch.ones((), dtype=torch.bool, device=fabric.device)
        for epoch in range(meta["epoch"], plan.epochs):
            first = meta["step"] if epoch == meta["epoch"] else 0
            method.train()
            batches = iterate(
                train,
                share,
                shuffle=True,
                seed=plan.seed,
                epoch=epoch,
                start=first,
                drop_last=True,
                pad=plan.pad,
                flip=plan.flip,
                rank=fabric.global_rank,
                world_size=fabric.world_size,
            )
            for step, batch in enumerate(batches, start=first):
                for group in optimizer.param_groups:
                    group["lr"] = _rate(plan, epoch, step, steps)
                generator = keyed_generator(
                    fabric.device, _ATTACK, plan.seed, epoch, step, fabric.global_rank
                )
                _seed_dropout(generator)
                behind = (epoch * steps + step) / (plan.epochs * steps)
                loss = step_module(batch, generator, behind)
                fabric.backward(loss.total)
                norm = fabric.clip_gradients(
                    step_module, step_optimizer, max_norm=plan.clip_norm, error_if_nonfinite=False
                )
                step_optimizer.step()
                optimizer.zero_grad()
                if average is not None:
                    # The first step is taken over whole: the average forgets the random start.
                    update(average, method, decay=plan.ema if epoch or step else 0.0)

                seen = loss.total.detach()
                assert isinstance(norm, Tensor)
                finite &= seen.isfinite() & norm.isfinite()
                _add(sums, {"loss": seen, "grad_norm": norm.detach(), **loss.parts})
                bar.advance(plan.batch_size, epoch=epoch + 1, loss=seen)
                look = (step + 1) % _GUARD_EVERY == 0 or step + 1 == steps
                if look or (alone and interrupted.is_set()):
                    stop, broken = any_rank(fabric, interrupted.is_set(), ~finite)
                    _guard(broken, name, method, epoch, state)
                    if stop:
                        save(epoch, step + 1)
                        raise KeyboardInterrupt

            same_buffers(fabric, kept)
            scores = validate(fabric, kept, val, method.attack.threat, seed=plan.seed)
            means = mean_over_ranks(fabric, {k: float(v) / n for k, (v, n) in sums.items()})
            sums.clear()
            row = {
                "epoch": epoch + 1,
                "lr": _rate(plan, epoch, steps - 1, steps),
                **means,
                **scores,
                "seconds": time.monotonic() - started,
            }
            score = epoch if plan.select == "last" else scores[f"val_{plan.select}"]
            this = {"score": score, "epoch": epoch + 1, **scores, **normalised}
            if meta["best"] is None or rank(this) >= rank(meta["best"]):
                meta["best"] = this
                if shown:
                    save_tensors(best, kept.state_dict(), meta["best"])
            if shown:
                append_json_line(out / "log.jsonl", row)
                for key, value in row.items():
                    board.add_scalar(key, value, epoch + 1)
                bar.advance(0, **scores)
            save(epoch + 1, 0)
            if any_rank(fabric, interrupted.is_set())[0]:
                raise KeyboardInterrupt

    chosen = meta["best"]
    summary = Summary(
        selected_epoch=chosen["epoch"],
        val_natural=chosen["val_natural"],
        val_robust=chosen["val_robust"],
        seconds=time.monotonic() - started,
        images=total,
    )
    if shown:
        write_json(finished, asdict(summary) | {"stage": stage})
        state.unlink()
    fabric.barrier()
    _take(best, method)
    return summary


def _read_summary(path: Path, stage: Mapping[str, Any]) -> Summary:
    """Of a finished stage, unless it was another one."""
    names = [field.name for field in fields(Summary)]
    done = read_json(path, {**dict.fromkeys(names, is_number), "stage?": dict | None})
    refuse_other(path.parent, done.get("stage"), stage)
    return Summary(**{name: done[name] for name in names})


def _read_best(path: Path) -> dict[str, Any] | None:
    """What the file of the best weights says of them, if there are any yet."""
    if not path.is_file():
        return None
    meta = load_meta(path)
    check_json(path, meta, _BEST)
    return meta


def _take(best: Path, method: Method) -> None:
    """Leave in the method what validation chose."""
    load_networks(best, method, load_tensors(best, kept=False)[0])


def _optimizer(method: Method, plan: Plan) -> SGD:
    parameters = [p for p in method.parameters() if p.requires_grad]
    if not parameters:
        raise UserError(
            "no parameter of the student takes a gradient: is it the teacher's own module, or a "
            "copy made after Teacher froze it?"
        )
    return SGD(
        parameters,
        plan.lr,
        plan.momentum,
        weight_decay=plan.weight_decay,
        nesterov=plan.momentum > 0,
    )


def _rate(plan: Plan, epoch: int, step: int, steps: int) -> float:
    """The learning rate in the middle of a step."""
    progress = (epoch * steps + step + 0.5) / (plan.epochs * steps)
    return learning_rate(progress, peak=plan.lr, schedule=plan.schedule, warmup=plan.warmup)


def _forget_after(log: Path, epoch: int) -> None:
    """Drop rows that a killed run logged after its last checkpoint: they will come again."""
    if not log.is_file():
        return
    write_json_lines(
        log, [row for row in read_json_lines(log, {"epoch": is_whole}) if row["epoch"] <= epoch]
    )


def _add(sums: dict[str, tuple[Tensor, int]], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        before, n = sums.get(name, (torch.zeros((), device=value.device), 0))
        sums[name] = (before + value, n + 1)


def _guard(broken: bool, name: str, method: Method, epoch: int, state: Path) -> None:
    if broken:
        own = [
            k for k, term in method.terms.items() if not type(term).__module__.startswith("gacd.")
        ]
        mend = f", or mend the losses of {' and '.join(own)}" if own else ""
        back = f"; {state} holds the end of epoch {epoch}" if state.is_file() else ""
        raise UserError(
            f"{name}: the loss or its gradient became infinite or NaN in epoch {epoch + 1}: "
            f"lower this stage's lr, or set fabric.precision to 32-true{mend}{back}"
        )


def _seed_dropout(generator: torch.Generator) -> None:
    """Networks from elsewhere may have dropout, which draws from the global generators."""
    torch.default_generator.manual_seed(generator.initial_seed())
    if generator.device.type == "cuda":
        torch.cuda.manual_seed(generator.initial_seed())

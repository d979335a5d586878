"""A row of the table: a finished model, measured once, with every figure that stands for it."""

import os
import signal
import threading
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gacd import build
from gacd import config as c
from gacd.data.dataset import ArrayDataset
from gacd.evaluation.diagnosis import Check, diagnose
from gacd.evaluation.examples import attacked_examples
from gacd.evaluation.names import parse_attack
from gacd.evaluation.outcomes import OUTCOMES, Evaluation
from gacd.evaluation.record import make_record
from gacd.evaluation.robust import answered_alike, epsilon_curve, evaluate
from gacd.methods.cost import Cost
from gacd.methods.registry import method_order
from gacd.models.base import Backbone
from gacd.models.checkpoints import check_said, load_model, said_of
from gacd.ranks import ALONE, Ranks
from gacd.report.records import RECORD, read_record
from gacd.storage import is_number, is_whole, write_json

MODEL = "model.safetensors"
EARLIER = "earlier.json"
"""The record that a row had by other evaluation settings, before it was measured again."""
TEACHER = "teacher"
SOURCE = "source"
_LAYOUT = {"cuda": torch.channels_last}
_ONE_ANSWER = 99.0  # percent of the images, from which on a record says so
_DIAGNOSED = 100  # test images of the masking diagnosis: seconds, where AutoAttack takes minutes
_SPENT = {
    "spent?": {
        "seconds": is_number,
        "images": is_whole,
        "cost": lambda value: (
            isinstance(value, dict)
            and value.keys() <= {each.name for each in fields(Cost)}
            and all(map(is_number, value.values()))
        ),
    }
}


@dataclass(frozen=True)
class Spent:
    """What training took: seconds, images seen, and the cost of all of them together."""

    seconds: float = 0.0
    images: int = 0
    cost: Cost = field(default_factory=Cost)

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.seconds + other.seconds, self.images + other.images, self.cost + other.cost
        )

    @classmethod
    def read(cls, path: Path) -> "Spent":
        """What went into the network of a file, as far as the file says."""
        spent = check_said(path, said_of(path), _SPENT).get("spent")
        if spent is None:
            return cls()
        return cls(spent["seconds"], spent["images"], Cost(**spent["cost"]))

    def record(self) -> dict[str, Any]:
        """For a record, as far as known: seconds, cost of an image (a mean), FLOPs in all."""
        figures: dict[str, Any] = {}
        if self.seconds:
            figures["train_seconds"] = round(self.seconds, 3)
        if self.images:
            each = asdict(self.cost * (1 / self.images))
            figures |= {
                "train_images": self.images,
                "train_flops": self.cost.flops,
                "cost": {name: round(value, 3) for name, value in each.items()},
            }
        return figures


class Row(NamedTuple):
    """A finished model, one row of the table: the folder of its `model.safetensors`, its names."""

    name: str
    architecture: str
    method: str
    role: str = ""
    """What it is to its run, in the table: undefended, teacher, student, ..."""
    spent: Spent = Spent()
    """On training."""
    unlabelled: int = 0
    """Images without labels that it was trained on, too."""


def _loaded(path: Path, device: torch.device) -> Backbone:
    model, _ = load_model(path)
    # Convolutions on a GPU are faster so; the CPU's round otherwise, and its records are kept.
    return model.to(device).to(memory_format=_LAYOUT.get(device.type, torch.preserve_format))


def measure_row(
    cfg: c.Run,
    row: Row,
    test: ArrayDataset,
    device: torch.device,
    *,
    show_progress: bool = True,
    ranks: Ranks = ALONE,
) -> None:
    """Every attack of the configuration on one row's model; the first rank writes the row's files.

    A full evaluation, one with AutoAttack, is diagnosed for masked gradients as well. Images for
    `transfer`, and for the diagnosis, are made on the run's source model, or else on its teacher,
    which meets none of them itself.
    """
    out, settings, threat = cfg.out / row.name, cfg.evaluation, build.threat(cfg.threat)
    model = _loaded(out / MODEL, device)
    names = () if row.name == TEACHER else (SOURCE, TEACHER)
    others = [path for name in names if (path := cfg.out / name / MODEL).is_file()]
    source = _loaded(others[0], device) if others else None
    attacks = [name for name in settings.attacks if name != "transfer" or row.name != TEACHER]
    test = test.to(device)
    step_size = None if settings.step_size is None else c.fraction(settings.step_size)
    shared: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "seed": cfg.seed,
        "cache": out / "evaluation",
        "show_progress": show_progress and ranks.rank == 0,
        "ranks": ranks,
    }
    if ranks.rank == 0:
        print(f"{row.name}: evaluation on {len(test)} test images", flush=True)
    found = evaluate(
        model,
        test,
        attacks=attacks,
        threat=threat,
        step_size=step_size,
        autoattack_limit=settings.autoattack_limit,
        cascade=settings.cascade,
        source=source if "transfer" in attacks else None,
        **shared,
    )
    eps_values = [c.fraction(e) for e in settings.eps_curve]
    curve = epsilon_curve(model, test, eps_values=eps_values, threat=threat, **shared)
    checks = []
    if "autoattack" in settings.attacks:
        checks = diagnose(
            model,
            test,
            threat=threat,
            source=source,
            evaluation=found,
            limit=_DIAGNOSED,
            autoattack_limit=min(64, settings.autoattack_limit or 64),
            **shared,
        )
    if ranks.rank > 0:
        return
    examples = attacked_examples(model, test, threat=threat, step_size=step_size, seed=cfg.seed)
    write_json(out / "examples.json", examples)
    if checks:
        write_json(out / "diagnosis.json", [asdict(check) for check in checks])
    else:  # an earlier evaluation's
        (out / "diagnosis.json").unlink(missing_ok=True)
    found.save(out / OUTCOMES)
    for doubt in _doubts(found, checks):
        print(f"note: {row.name}: {doubt}", flush=True)
    table = found.to_record()
    alike = answered_alike(model, test, batch_size=settings.batch_size)
    record = make_record(
        model=row.architecture,
        method=row.method,
        dataset=test.name,
        seed=cfg.seed,
        config=asdict(cfg),
        evaluation=found,
        extra={
            **({"role": row.role} if row.role else {}),
            "parameters": sum(p.numel() for p in model.parameters()),
            **row.spent.record(),
            **({"unlabelled": row.unlabelled} if row.unlabelled else {}),
            **({"cascade": True} if settings.cascade else {}),
            **({"answered_alike": round(alike, 1)} if alike >= _ONE_ANSWER else {}),
            "intervals": {k: [v["low"], v["high"]] for k, v in table.items()},
            **{f"{k}_n": v["n"] for k, v in table.items() if v["n"] != found.n},
            "eps_curve": [list(point) for point in curve],
        },
    )
    write_json(out / RECORD, record)


def _doubts(found: Evaluation, checks: Sequence[Check]) -> list[str]:
    """Signs of masked gradients: such a robust accuracy may not be real."""
    doubts = [f"{check.name}: no ({check.text})" for check in checks if not check.passed]
    doubts += found.settings.get("autoattack", {}).get("notes", [])
    names = [name for name in found.robust if parse_attack(name).kind in ("fgsm", "pgd", "cw")]
    blind = len({found.accuracy(name) for name in ("natural", *names)}) == 1 and bool(names)
    if blind and not checks and found.settings["eps"] > 0 and found.accuracy("natural") > 0:
        doubts.append(f"{', '.join(names)} broke no image; autoattack tells masked gradients")
    return doubts


def measure_row_elsewhere(cfg: c.Run, row: Row) -> None:
    """`measure_row` in a process of its own, which loads for itself what it needs."""
    if cfg.fabric.threads is not None:
        torch.set_num_threads(cfg.fabric.threads)
    if isinstance(cfg, c.Evaluate):
        test = build.test_part(cfg.data, cfg.checkpoint)
    else:  # what was read with them decides on the size
        alone = replace(cfg.data, workers=0)  # a worker of ours may not start others
        test = build.splits(alone, cfg.seed).test
    measure_row(cfg, row, test, torch.device("cpu"), show_progress=False)


def begin_worker() -> None:
    """Ctrl-C is the main process's to handle; it ends this one, and so does its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed process leaves its workers behind, at what nobody waits for."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def rows_set_aside(out: Path, pending: Container[str]) -> list[Row]:
    """The rows that had a record by other evaluation settings, and have none by this run's."""
    rows = []
    for path in sorted(out.glob(f"*/{EARLIER}")):
        folder = path.parent
        if folder.name not in pending and not (folder / RECORD).is_file():
            said, spent = read_record(path), Spent.read(folder / MODEL)
            role, unlabelled = said.get("role") or "", said.get("unlabelled", 0)
            rows.append(Row(folder.name, said["model"], said["method"], role, spent, unlabelled))
    return rows


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """The line of `results.json` that stands for a whole record."""
    skipped = ("evaluation", "config", "environment", "settings", "seconds", "eps_curve")
    budget = {k: record["settings"][k] for k in ("norm", "eps") if k in record["settings"]}
    return {k: v for k, v in record.items() if k not in skipped} | budget


def row_order(out: Path) -> list[str]:
    """The rows of a run folder in the order of its table: the teacher, then method by method."""
    names = (path.parent.name for path in out.glob(f"*/{RECORD}"))
    return [TEACHER, *method_order(name for name in names if name != TEACHER)]

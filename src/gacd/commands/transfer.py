"""`gacd transfer`: do frozen features serve other data?"""

import time
from dataclasses import asdict
from pathlib import Path

from gacd import build
from gacd import config as c
from gacd.commands.identity import Goal
from gacd.commands.rows import (
    MODEL,
    Row,
    Spent,
)
from gacd.commands.run import Run
from gacd.errors import UserError
from gacd.evaluation.transfer import transfer as transferred
from gacd.models import create_model
from gacd.models.base import Backbone
from gacd.models.checkpoints import load_model, load_weights
from gacd.storage import read_json, write_json

_NAME = "transfer"


def transfer(cfg: c.Transfer, *, goal: Goal = "report") -> None:
    """A linear classifier on a frozen model's features, attacked through the whole network."""
    if cfg.checkpoint is None:
        raise UserError("whose features? give --checkpoint FILE")
    run = Run(cfg, goal)
    channels = run.splits.train.channels
    model, name, method = _frozen(cfg.checkpoint, cfg.model, cfg.num_classes, channels)
    out = cfg.out / _NAME
    if run.fabric.is_global_zero and not (out / MODEL).is_file():
        started = time.monotonic()
        print("transfer: fitting a linear layer on frozen features", flush=True)
        model.to(run.fabric.device)
        fitted, fit = transferred(model, run.splits, build.linear_threat(cfg))
        seconds = time.monotonic() - started
        write_json(out / "linear.json", {**asdict(fit), "seconds": seconds})
        run.keep(out, fitted, name, method)
    run.fabric.barrier()
    seconds = read_json(out / "linear.json")["seconds"]
    run.measure(Row(_NAME, name, method, "frozen, new linear layer", Spent(seconds)))
    run.finish(f"Features of {cfg.checkpoint.name} on {run.splits.test.name}")


def _frozen(
    path: Path, name: str | None, num_classes: int | None, channels: int
) -> tuple[Backbone, str, str]:
    """A saved network of any classes, its architecture and its method."""
    if path.suffix == ".safetensors":
        model, meta = load_model(path)
        return model, str(meta["architecture"]), str(meta.get("method", path.stem))
    if name is None or num_classes is None:
        raise UserError(
            f"{path}: say which network it is and how many classes it was trained on, such as "
            "--model resnet18 --num_classes 10"
        )
    model = create_model(name, num_classes=num_classes, channels=channels, seed=0)
    load_weights(model, path)
    return model, name, path.stem

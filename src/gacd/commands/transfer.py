"""`gacd transfer`: do frozen features serve other data?"""

import shutil
from dataclasses import asdict

from gacd import build
from gacd import config as c
from gacd.commands.identity import Goal
from gacd.commands.rows import MODEL, Row, Spent
from gacd.commands.training import TrainingRun
from gacd.errors import UserError
from gacd.evaluation.transfer import transfer as transferred
from gacd.storage import is_number, read_json, write_json

_NAME = "transfer"


def transfer(cfg: c.Transfer, *, goal: Goal = "report") -> None:
    """A linear classifier on a frozen model's features, attacked through the whole network."""
    if cfg.checkpoint is None:
        raise UserError("whose features? give --checkpoint FILE")
    run = TrainingRun(cfg, goal)
    channels = run.splits.train.channels
    given = build.Given(cfg.model, cfg.mean, cfg.std, cfg.num_classes)
    model, about = build.network(cfg.checkpoint, given, channels=channels)
    build.check_size(cfg.checkpoint, about, run.splits.train, cfg.data.size)
    name, method = str(about["architecture"]), str(about.get("method", cfg.checkpoint.stem))
    out = cfg.out / _NAME
    cache = out / "linear"
    if run.fabric.is_global_zero and not (out / MODEL).is_file():
        print("transfer: fitting a linear layer on frozen features", flush=True)
        model.to(run.fabric.device)
        fitted, fit = transferred(model, run.splits, build.linear_threat(cfg), cache=cache)
        write_json(out / "linear.json", asdict(fit))
        run.keep(out, fitted, name, method)
    run.fabric.barrier()
    shutil.rmtree(cache, ignore_errors=True)  # also what a kill left just here
    remedy = f"delete it and the {MODEL} beside it, and run again"
    seconds = read_json(out / "linear.json", {"seconds": is_number}, remedy=remedy)["seconds"]
    run.measure(Row(_NAME, name, method, "frozen, new linear layer", Spent(seconds)))
    run.finish(f"Features of {method} ({name}) on {run.test.name}")

"""`gacd analyze`: students compared with their teacher."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gacd import build
from gacd import config as c
from gacd.commands.identity import Goal, refuse_foreign, refuse_missing
from gacd.commands.rows import TEACHER
from gacd.data.dataset import ArrayDataset
from gacd.errors import UserError, unknown
from gacd.evaluation.record import environment, without_paths
from gacd.evaluation.structure import (
    Outputs,
    Rows,
    correlation_difference,
    embed,
    geometry,
    linear_cka,
    outputs,
    perturbed,
    usable_perplexity,
)
from gacd.models.base import Backbone
from gacd.models.checkpoints import method_of, names_itself
from gacd.report.analysis import RECORD, geometry_table, likeness_table, write_analysis_report
from gacd.shapes import Images
from gacd.storage import from_home, write_json


def analyze(cfg: c.Analyze, *, goal: Goal = "report") -> None:
    """Compare students' features and logits with their teacher's: record, figures, report."""
    if cfg.teacher is None:
        raise UserError("which teacher? give --teacher FILE, and --students NAME=FILE ...")
    refuse_foreign(cfg.out, RECORD)
    files = {TEACHER: cfg.teacher} | dict(_named(text) for text in cfg.students)
    if len(files) != 1 + len(cfg.students):
        raise UserError(f"students need different names, and none may be '{TEACHER}'")
    refuse_missing(files.values())
    alone = replace(cfg.fabric, devices=1, num_nodes=1, strategy="auto")
    device = build.fabric(alone).device
    test = build.test_part(cfg.data, cfg.teacher).to(device)
    models, metas = {}, {}
    for name, path in files.items():
        models[name], metas[name] = _finished(path, test, cfg.data.size)
        models[name].to(device)
    record = _structure(cfg, models, test)
    record["teacher"] = metas[TEACHER]
    record["models"] = metas
    write_json(cfg.out / RECORD, {key: without_paths(value) for key, value in record.items()})
    if goal != "report":
        return
    write_analysis_report(cfg.out)
    from rich.console import Console

    console = Console()
    if record["correlations"]:
        console.print(likeness_table(record))
    console.print(geometry_table(record))
    print(f"record: {cfg.out / RECORD}")
    print(f"report: {cfg.out / 'report.html'}")


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UserError(f"students are given as NAME=FILE, not '{text}'")
    return name, from_home(Path(path))


def _finished(path: Path, data: ArrayDataset, size: int | None) -> tuple[Backbone, dict[str, str]]:
    build.refuse_folder(path)
    if not names_itself(path):
        raise UserError(
            f"{path}: only a .safetensors of this package says which network it holds; "
            "'gacd evaluate' makes one of a public .pt"
        )
    model, name = build.from_checkpoint(path, build.Given(), data, size=size)
    return model, {"architecture": name, "method": method_of(path)}


def _structure(
    cfg: c.Analyze, models: Mapping[str, Backbone], test: ArrayDataset
) -> dict[str, Any]:
    """The record, but for the models' names."""
    threat = build.threat(cfg.threat)
    attack: dict[str, Any] = {
        "threat": threat,
        "steps": cfg.steps,
        "step_size": threat.step(None if cfg.step_size is None else c.fraction(cfg.step_size)),
        "batch_size": cfg.batch_size,
        "seed": cfg.seed,
    }
    target, source = _pair(cfg, test)
    features = {}
    shapes = {}
    for name, model in models.items():
        print(f"{name}: features of {target} and {source}", flush=True)
        groups = _groups(model, test, (target, source), cfg.images, attack)
        shapes[name] = geometry(*groups.values())
        features[name] = groups
    joint = cfg.embedding == "joint"
    rows = {name: np.concatenate(list(groups.values())) for name, groups in features.items()}
    together = sum(map(len, rows.values())) if joint else len(rows[TEACHER])
    points = embed(rows, joint=joint, perplexity=cfg.perplexity, seed=cfg.seed)
    sizes = {key: len(rows) for key, rows in features[TEACHER].items()}
    natural, attacked = _views(models, test, attack, cfg)
    students = [name for name in models if name != TEACHER]
    views = {"natural": natural, "attacked": attacked}
    return {
        "dataset": test.name,
        "n": len(test),
        "classes": list(test.classes),
        "seed": cfg.seed,
        "attack": {
            "name": f"PGD-{cfg.steps}",
            "norm": threat.norm,
            "eps": threat.eps,
            "steps": cfg.steps,
            "step_size": attack["step_size"],
            "made_on": cfg.attacked,
        },
        "correlations": {
            name: {view: _difference(found[TEACHER], found[name]) for view, found in views.items()}
            for name in students
        },
        "cka": {
            name: {
                view: linear_cka(found[TEACHER].features, found[name].features)
                for view, found in views.items()
            }
            for name in students
        },
        "pair": {
            "target": target,
            "source": source,
            "n_target": sizes[target],
            "n_source": sizes[source],
        },
        "geometry": {name: asdict(shape) for name, shape in shapes.items()},
        "embedding": {
            "kind": cfg.embedding,
            "perplexity": usable_perplexity(cfg.perplexity, together),
            "points": {name: _by_group(rows, sizes) for name, rows in points.items()},
        },
        "config": asdict(cfg),
        "environment": environment(),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _views(
    models: Mapping[str, Backbone], test: ArrayDataset, attack: Mapping[str, Any], cfg: c.Analyze
) -> tuple[dict[str, Outputs], dict[str, Outputs]]:
    """Every model's outputs on the test images, and on attacked ones."""
    images = test.float_images()
    natural, attacked = {}, {}
    x_adv = images
    for name, model in models.items():  # the teacher is the first
        natural[name] = outputs(model, images, batch_size=cfg.batch_size)
        if name == TEACHER or cfg.attacked == "own":
            print(f"{name}: attacked images", flush=True)
            x_adv = perturbed(model, images, test.labels, **attack)
        attacked[name] = outputs(model, x_adv, batch_size=cfg.batch_size)
    return natural, attacked


def _groups(
    model: Backbone,
    test: ArrayDataset,
    pair: tuple[str, str],
    count: int,
    attack: Mapping[str, Any],
) -> dict[str, Rows]:
    """Features of images of two classes, and of the second ones perturbed into the first."""
    target, source = (_images_of(test, name, count, attack["seed"]) for name in pair)
    aim = torch.full((len(source),), test.classes.index(pair[0]), device=source.device)
    pushed = perturbed(model, source, aim, targeted=True, **attack)
    named = zip((*pair, f"{pair[1]}, attacked"), (target, source, pushed), strict=True)
    size = attack["batch_size"]
    return {name: outputs(model, images, batch_size=size).features for name, images in named}


def _images_of(test: ArrayDataset, name: str, count: int, seed: int) -> Images:
    """At most `count` images of a class, drawn by the seed: the same for every model."""
    rows = (test.labels == test.classes.index(name)).nonzero().flatten().cpu()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return test.float_images(rows[order[:count]].to(test.images.device))


def _pair(cfg: c.Analyze, test: ArrayDataset) -> tuple[str, str]:
    names = [str(name) for name in cfg.classes] or list(test.classes[:2])
    for name in names:
        if name not in test.classes:
            raise unknown(f"class of {test.name}", name, test.classes)
    return names[0], names[1]


def _difference(teacher: Outputs, student: Outputs) -> dict[str, Any]:
    matrix = correlation_difference(teacher.logits, student.logits)
    return {"mean": float(matrix.mean()), "matrix": matrix.round(6).tolist()}


def _by_group(rows: Rows, sizes: Mapping[str, int]) -> dict[str, list[list[float]]]:
    parts = np.split(rows.round(3), np.cumsum(list(sizes.values()))[:-1])
    return {group: part.tolist() for group, part in zip(sizes, parts, strict=True)}

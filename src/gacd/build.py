"""From configuration to objects: the only place, with the commands, that knows both."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException

from gacd import config as c
from gacd.attacks.threat import ThreatModel
from gacd.data.dataset import ArrayDataset, ImageDataset, Splits, one_spelling
from gacd.data.load import load_splits, load_test
from gacd.errors import UserError
from gacd.methods import METHODS, TrainingAttack
from gacd.methods.registry import check_settings
from gacd.models import create_model
from gacd.models.base import Backbone
from gacd.models.checkpoints import load_model, load_weights, said_of
from gacd.processor import fast_bf16
from gacd.training.loop import Plan
from gacd.training.precision import Bf16Autocast

_THREADS_A_PROCESSOR = 8  # more are no use; a recipe of a larger machine may say more than one


def fabric(cfg: c.Fabric) -> Fabric:
    """Lightning Fabric, launched. Raises UserError for a device that is not there."""
    if cfg.threads is not None:
        _check_threads(cfg.threads)
        torch.set_num_threads(cfg.threads)
    wanted = "cuda" if cfg.accelerator == "gpu" else cfg.accelerator
    processes = cfg.devices * cfg.num_nodes
    started = os.environ.get("WORLD_SIZE", "") if "TORCHELASTIC_RUN_ID" in os.environ else ""
    if started.isdigit() and int(started) != processes:
        raise UserError(
            f"torchrun started {started} processes, but fabric.devices times fabric.num_nodes are "
            f"{processes}: say --fabric.devices (those of a node) as well"
        )
    found = _device(cfg)
    try:
        built = Fabric(
            accelerator=found if wanted == "auto" else wanted,
            devices=cfg.devices,
            num_nodes=cfg.num_nodes,
            strategy=cfg.strategy,
            plugins=[Bf16Autocast(found)] if precision(cfg) == "bf16-mixed" else None,
        )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise UserError(f"fabric: {' '.join(str(error).split())}") from None
    if hasattr(built.strategy, "_timeout"):  # the first rank may be at work alone for hours
        built.strategy._timeout = timedelta(days=7)
    built.launch()
    return built


def _check_threads(threads: int) -> None:
    """Refuse so many that they wait for one another until nothing moves."""
    there = os.cpu_count() or 1
    if threads > _THREADS_A_PROCESSOR * there:
        raise UserError(
            f"fabric.threads is {threads}, but this machine has {there} processors: "
            f"say at most {_THREADS_A_PROCESSOR} for each, best no more than one"
        )


def precision(cfg: c.Fabric) -> c.Precision:
    """What training computes in: what was asked for, or the faster of both."""
    if cfg.precision != "auto":
        return cfg.precision
    return "bf16-mixed" if fast_bf16(_device(cfg)) else "32-true"


def _device(cfg: c.Fabric) -> str:
    """Apple's GPUs are none: they lack float64, which evaluation needs."""
    return "cuda" if cfg.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def splits(cfg: c.Data, seed: int) -> Splits:
    """The data, as train, validation and test."""
    parts = load_splits(
        cfg.name,
        **_images(cfg),
        val_fraction=cfg.val_fraction,
        train_limit=cfg.train_limit,
        stream=cfg.stream,
        workers=cfg.workers,
        seed=seed,
    )
    _check_side(parts.test)
    return parts


def test_part(cfg: c.Data, network: Path | None = None) -> ArrayDataset:
    """The test images alone, for a command that does not train.

    A folder's may lack some of the classes that the `network` knows, and colour, where its file
    tells of them.
    """
    said = {} if network is None else said_of(network)
    known, few = said.get("classes") or (), said.get("channels") == 1
    test = load_test(cfg.name, **_images(cfg), known=known, few=few)
    test = test.in_colour(said.get("channels") or test.channels)
    _check_side(test)
    return test


def _images(cfg: c.Data) -> dict[str, Any]:
    """What decides which images the test part has."""
    classes = None if cfg.classes is None else [str(name) for name in cfg.classes]
    return {
        "root": cfg.root, "title": cfg.title, "size": cfg.size, "classes": classes,
        "test_limit": cfg.test_limit,
    }  # fmt: skip


def _check_side(test: ArrayDataset) -> None:
    side = min(test.images.shape[-2:])
    if side < c.SMALLEST:
        raise UserError(
            f"images are {side} pixels wide, but networks need at least {c.SMALLEST}: "
            "say --data.size"
        )


def threat(cfg: c.Threat) -> ThreatModel:
    """The threat model."""
    return ThreatModel(norm=cfg.norm, eps=c.fraction(cfg.eps))


def linear_threat(cfg: c.Distill | c.Transfer) -> ThreatModel | None:
    """The one that has a say in a linear layer's strength, if any."""
    return threat(cfg.threat) if cfg.linear_select == "both" else None


def attack(cfg: c.Attack, threat: ThreatModel) -> TrainingAttack:
    """The attack in the training loop."""
    return TrainingAttack(
        threat=threat,
        steps=cfg.steps,
        step_size=c.fraction(cfg.step_size),
        objective=cfg.objective,
    )


def plan(cfg: c.Training, data: c.Data, fabric: c.Fabric, seed: int) -> Plan:
    """How a stage trains."""
    flat = asdict(cfg)
    for key in ("attack", "awp", "awp_warmup"):  # the method's
        del flat[key]
    return Plan(
        **flat,
        pad=data.pad,
        flip=data.flip,
        seed=seed,
        compile=fabric.compile,
        sync_batch_norm=fabric.batch_norm == "synchronised",
    )


def model(name: str, data: ImageDataset, *, seed: int) -> Backbone:
    """A fresh network for this data set, normalising by its statistics."""
    mean, std = data.mean_std()
    built = create_model(
        name,
        num_classes=data.num_classes,
        channels=data.channels,
        mean=mean,
        std=std,
        seed=seed,
    )
    built.check(data.size)
    return built


class Given(NamedTuple):
    """What the command line says of a file that does not say it itself."""

    model: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    num_classes: int | None = None


def refuse_folder(path: Path) -> None:
    """Refuse a folder in the place of a network's file, and name the file that is meant."""
    if path.is_dir():
        found = sorted(path.glob("model.safetensors")) + sorted(path.glob("*/model.safetensors"))
        such = f"such as {found[0]}" if found else "a .safetensors of gacd or a public .pt"
        raise UserError(f"{path} is a folder: name a file, {such}")


def network(
    path: Path, given: Given, *, channels: int, flag: str = "--model"
) -> tuple[Backbone, dict[str, Any]]:
    """A saved network and what its file says of it; the rest is `given`.

    `flag` is how the command line is told the model.
    """
    refuse_folder(path)
    about = said_of(path)
    if given.mean is not None and "mean" in about:
        raise UserError(f"{path} holds its own mean and std: leave them out")
    if "architecture" in about:
        if given.model not in (None, about["architecture"]):
            raise UserError(f"{path} holds a {about['architecture']}: leave {flag} out")
        return load_model(path)
    if given.model is None:
        if "mean" in about and (finished := path.with_name("model.safetensors")).is_file():
            raise UserError(f"{path}: a state of training; the finished network is {finished}")
        raise UserError(f"{path}: say which network it is with {flag}, such as {flag} resnet18")
    if given.num_classes is None:
        raise UserError(f"{path}: say with --num_classes how many classes it was trained on")
    told = flag.replace("model", "mean"), flag.replace("model", "std")
    loaded = create_model(
        given.model,
        num_classes=given.num_classes,
        channels=channels,
        mean=about.get("mean", given.mean),
        std=about.get("std", given.std),
        seed=0,
    )
    load_weights(loaded, path, told=told)
    if given.mean is None and "mean" not in about:
        print(f"note: {path} gets images in [0, 1]; give {' and '.join(told)} if it wants others")
    return loaded, {"architecture": given.model}


def from_checkpoint(
    path: Path, given: Given, data: ImageDataset, *, size: int | None = None, flag: str = "--model"
) -> tuple[Backbone, str]:
    """A saved network for this data set, and its architecture's name; `size` as `check_size`.

    Refuses one whose classifier was never trained.
    """
    num_classes, channels = data.num_classes, data.channels
    given = given._replace(num_classes=num_classes)
    loaded, meta = network(path, given, channels=channels, flag=flag)
    if meta.get("features"):
        whole = path.parent.parent / path.name
        there = whole != path and whole.is_file()
        finished = f"the finished network is {whole}" if there else "finish its run"
        raise UserError(
            f"{path}: features alone, its classifier was never trained; {finished}, "
            "or fit one with gacd transfer"
        )
    theirs = one_spelling(meta.get("classes") or data.classes)  # as far as is known
    ours = one_spelling(data.classes)
    known = set(theirs)
    if known > set(ours):
        lacking = sorted(known - set(ours))
        raise UserError(
            f"{path}: knows {len(known)} classes, and the data lack {len(lacking)} of them (such "
            f"as {lacking[0]}): choose data of all its classes, or a checkpoint of these alone"
        )
    strange = sorted(set(ours) - known)
    if strange and known & set(ours) and len(ours) != len(theirs):
        raise UserError(
            f"{path}: does not know the class {strange[0]} of the data: choose a checkpoint of "
            f"these classes, or leave images of others out by --data.classes {shlex.join(theirs)}"
        )
    if (loaded.num_classes, loaded.channels) != (num_classes, channels):
        unnamed = loaded.num_classes > num_classes and not meta.get("classes")
        also = " (or name the classes that it does not, by folders in train/, empty ones too)"
        raise UserError(
            f"{path}: a model of {loaded.num_classes} classes and {loaded.channels} channels, but "
            f"the data has {num_classes} and {channels}: choose a checkpoint of this data set"
            f"{also * unnamed}"
        )
    check_size(path, meta, data, size)
    loaded.check(data.size, trains=False)
    if theirs != ours:
        _check_classes(path, theirs, ours)
    return loaded, str(meta["architecture"])


def check_size(path: Path, meta: dict[str, Any], data: ImageDataset, size: int | None) -> None:
    """Refuse images of another size than a network saw, unless that `size` was asked for."""
    seen = meta.get("size") or data.size
    if size is None and seen != data.size:
        raise UserError(
            f"{path}: trained on images of {seen} pixels a side, and these have {data.size}: say "
            f"--data.size {seen} (or {data.size}, if that is meant)"
        )


def _check_classes(path: Path, theirs: Sequence[str], ours: Sequence[str]) -> None:
    """Refuse classes that differ, unless none has the same name: then other words may be meant."""
    if set(theirs) & set(ours):
        raise UserError(
            f"{path}: its classes are {', '.join(theirs)}, the data's {', '.join(ours)}: choose "
            "a checkpoint of these classes in this order (or --data.classes in the checkpoint's)"
        )
    print(f"note: {path} calls its classes {', '.join(theirs)}, the data {', '.join(ours)}")


def method_options(cfg: c.Run) -> dict[str, dict[str, Any]]:
    """The settings of every method that this command knows, by the method's name."""
    sections = asdict(cfg)
    extra: dict[str, dict[str, Any]] = sections.pop("extra", {})
    for name, settings in extra.items():
        if name in sections:
            raise UserError(f"--extra is of methods from outside: say --{name}.SETTING instead")
        check_settings(name, settings)
    options = {name: dict(sections[name]) for name in METHODS if name in sections}
    options.get("gacd", {}).pop("anchors", None)  # the bank's
    return options | extra

"""A stage of training that takes a second: tiny data, a tiny network, a tiny plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric

from gacd.anchors import AnchorBank, Fingerprint
from gacd.attacks.threat import ThreatModel
from gacd.data.batches import iterate
from gacd.data.dataset import ArrayDataset, Splits
from gacd.methods import Method, Teacher, TrainingAttack, create_method
from gacd.models import create_model
from gacd.training.loop import Plan, Summary, fit
from gacd.training.precision import Bf16Autocast

CLASSES = ("a", "b", "c")
PLAN = Plan(epochs=3, batch_size=16, lr=0.05, ema=0.8, warmup=0.2, pad=1, flip=True, seed=4)
ATTACK = TrainingAttack(threat=ThreatModel(eps=0.05), steps=1, step_size=0.05)


def noise(n: int, seed: int) -> ArrayDataset:
    """Random images, brighter the higher their class, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(CLASSES)
    pixels = torch.randint(150, (n, 1, 8, 8), generator=generator) + 50 * labels.view(-1, 1, 1, 1)
    return ArrayDataset(pixels.to(torch.uint8), labels, CLASSES, "noise")


class Stage:
    """Everything that `fit` takes, made anew for every run."""

    plan = PLAN

    def __init__(self) -> None:
        self.splits = Splits(train=noise(70, 0), val=noise(20, 1), test=noise(10, 2))
        teacher = create_model("digits-cnn-3", num_classes=3, channels=1, seed=9)
        self.teacher = Teacher(teacher)
        self.bank = AnchorBank.build(
            teacher,
            iterate(self.splits.train, 70, shuffle=False, seed=0, epoch=0, drop_last=False),
            size=70,
            fingerprint=Fingerprint("teacher", "data", "none"),
            show_progress=False,
        )

    def method(self, name: str = "pgd-at", seed: int = 3, **settings: Any) -> Method:
        student = create_model("digits-cnn-2", num_classes=3, channels=1, seed=seed)
        return create_method(
            name,
            student,
            ATTACK,
            teacher=self.teacher,
            bank=self.bank,
            options={"gacd": {"negatives": 8, "dim": 5}, "crd": {"negatives": 8, "dim": 5}},
            **settings,
        )

    def fabric(self, precision: str = "32-true") -> Fabric:
        plugins = [Bf16Autocast("cpu")] if precision == "bf16-mixed" else None
        return Fabric(accelerator="cpu", devices=1, plugins=plugins)

    def fit(
        self,
        out: Path,
        method: Method | str = "pgd-at",
        *,
        splits: Splits | None = None,
        precision: str = "32-true",
        **changes: Any,
    ) -> tuple[Method, Summary]:
        if isinstance(method, str):
            method = self.method(method)
        plan = replace(PLAN, **changes)
        fabric = self.fabric(precision)
        return method, fit(fabric, method, splits or self.splits, plan, out=out, name="stage")


@pytest.fixture(scope="session")
def stage() -> Stage:
    return Stage()

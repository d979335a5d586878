"""What the tests of methods share: a table of settings, a small data set, a teacher, an attack."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gacd.anchors import AnchorBank, Fingerprint
from gacd.attacks.threat import ThreatModel
from gacd.data.batches import iterate
from gacd.data.dataset import ArrayDataset
from gacd.methods import Method, Step, Teacher, TrainingAttack, create_method
from gacd.models import create_model
from gacd.models.base import Backbone
from gacd.shapes import Batch

CLASSES, TEMPERATURE, NEGATIVES = 3, 0.5, 7
THREAT = ThreatModel(eps=0.1)
ATTACK = TrainingAttack(threat=THREAT, steps=2, step_size=0.05)


class Row(NamedTuple):
    """What is true of a method: its options (not the defaults), its attack, its training passes."""

    options: dict[str, dict[str, Any]]
    objective: str | None
    passes: int
    trains_head: bool = True
    projections: int = 0


SETTINGS: dict[str, Row] = {
    "natural": Row({}, None, 1),
    "pgd-at": Row({}, "ce", 1),
    "trades": Row({"trades": {"beta": 3.0}}, "kl", 2),
    "mart": Row({"mart": {"beta": 4.0}}, "ce", 2),
    "rst": Row({}, "ce", 1),
    "kd": Row({"kd": {"temperature": 3.0, "alpha": 0.6}}, None, 1),
    "ard": Row({"ard": {"temperature": 5.0, "alpha": 0.7}}, "ce", 2),
    "rslad": Row({"rslad": {"alpha": 0.7}}, "teacher-kl", 2),
    "iad": Row({"iad": {"temperature": 2.0, "beta": 0.4}}, "ce", 2),
    "adaad": Row({"adaad": {"alpha": 0.8}}, "adaptive-kl", 2),
    "rslad+igdm": Row({"rslad": {"alpha": 0.7}, "igdm": {"alpha": 3.0}}, "teacher-kl", 3),
    "regression": Row(
        {"regression": {"beta": 3.0}}, "transport", 1, trains_head=False, projections=1
    ),
    "crd": Row({"crd": {"negatives": NEGATIVES, "dim": 6, "beta": 0.7}}, None, 1, projections=2),
    "gacd": Row(
        {"gacd": {"temperature": TEMPERATURE, "negatives": NEGATIVES, "dim": 6}},
        "transport",
        1,
        trains_head=False,
        projections=2,
    ),
    "gacd+rslad": Row(
        {
            "gacd": {"temperature": TEMPERATURE, "negatives": NEGATIVES, "dim": 6},
            "rslad": {"alpha": 0.7},
        },
        "transport",
        2,
        projections=2,
    ),
    "crd+kd": Row(
        {"crd": {"negatives": NEGATIVES, "dim": 6}, "kd": {"alpha": 0.6}}, None, 1, projections=2
    ),
}


class World(NamedTuple):
    """A data set of random images, and a frozen teacher with the bank of its features."""

    data: ArrayDataset
    teacher: Teacher
    bank: AnchorBank

    def batch(self, rows: tuple[int, ...] = (3, 0, 11, 7, 5)) -> Batch:
        index = torch.tensor(rows)
        return Batch(self.data.float_images(index), self.data.labels[index], index)

    def method(
        self,
        name: str,
        attack: TrainingAttack = ATTACK,
        *,
        weights: dict[str, float] | None = None,
        student: Backbone | None = None,
        awp: Any = None,
        **changes: Any,
    ) -> Method:
        """The method with its settings of the table; `changes` are options of its first term."""
        row = SETTINGS.get(name)
        options = {} if row is None else {term: dict(known) for term, known in row.options.items()}
        for term in name.split("+") if row is None else ():
            options |= SETTINGS[term].options if term in SETTINGS else {}
        first = name.split("+")[0]
        options[first] = {**options.get(first, {}), **changes}
        more = {} if awp is None else {"awp": awp}
        return create_method(
            name,
            network("digits-cnn-2", seed=1) if student is None else student,
            attack,
            teacher=self.teacher,
            bank=self.bank,
            options=options,
            weights=weights,
            **more,
        ).train()


def network(name: str, *, seed: int, classes: int = CLASSES) -> Backbone:
    return create_model(name, num_classes=classes, channels=1, seed=seed)


def make_world(generator: torch.Generator) -> World:
    images = torch.randint(256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = ArrayDataset(images, torch.arange(12) % CLASSES, ("a", "b", "c"), "noise")
    teacher = Teacher(network("digits-cnn-3", seed=2))
    with torch.no_grad():  # BatchNorm statistics that differ from those of any batch
        teacher.module.train()
        teacher.module(data.float_images())
        teacher.module.get_classifier().weight.mul_(40)
        teacher.module.eval()
    bank = AnchorBank.build(
        teacher.module,
        iterate(data, 12, shuffle=False, seed=0, epoch=0, drop_last=False),
        size=12,
        fingerprint=Fingerprint("teacher", "data", "none"),
        dtype="float32",
        show_progress=False,
    )
    return World(data, teacher, bank)


def attacked(batch: Batch) -> Tensor:
    """Images whose 'attack' is known: brighter or darker by 0.1, by their index."""
    return (batch.images + 0.1 * (-1) ** batch.index[:, None, None, None]).clamp(0, 1)


def known_attack(method: Method) -> None:
    """Replace the attack by one whose result is known."""
    method.adversarial = lambda step: attacked(step.batch)  # type: ignore[method-assign]


def step_of(method: Method, batch: Batch, seed: int = 0) -> Step:
    """The step that `method` would take, with its attacked images."""
    generator = torch.Generator().manual_seed(seed)
    step = Step(batch, method.student, method.teacher, generator, 1.0)
    if method.objective is not None:
        step.adv_images = method.adversarial(step)
    return step


def total(method: Method, batch: Batch, seed: int = 0, progress: float = 1.0) -> Tensor:
    return method(batch, torch.Generator().manual_seed(seed), progress).total


def embed(linear: nn.Linear, features: Tensor) -> Tensor:
    rows = features.double() @ linear.weight.double().T + linear.bias.double()
    return rows / rows.norm(dim=1, keepdim=True)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)

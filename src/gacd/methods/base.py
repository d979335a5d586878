"""What a training method is: an attack, a loss, and the parts that train."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from gacd.attacks import objectives
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel
from gacd.errors import UserError, unknown
from gacd.models.base import Backbone
from gacd.models.modes import evaluating
from gacd.shapes import Batch, Features, Images, Logits, PerSample, Scalar

Reweight = Literal["none", "teacher"]

OBJECTIVES = ("default", "ce", "margin", "kl", "cosine", "transport")


class Loss(NamedTuple):
    """A step's loss, and what it is made of, for the logs (0-d tensors, detached)."""

    total: Scalar
    parts: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainingAttack:
    """The attack in the training loop: a budget, and `steps` steps of PGD from a random start."""

    threat: ThreatModel
    steps: int
    step_size: float
    objective: str = "default"

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise unknown("attack objective", self.objective, OBJECTIVES)


class Teacher:
    """The frozen teacher. It is shared, not copied, by copies of the methods that hold it."""

    def __init__(self, module: Backbone) -> None:
        self.module = module.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self

    @torch.no_grad()
    def __call__(self, x: Images) -> Logits:
        """Logits, in float32."""
        logits: Logits = self.module(x)
        return logits.float()

    @torch.no_grad()
    def features(self, x: Images) -> Features:
        """Penultimate features, in float32."""
        return self.module.forward_features(x).float()


class Method(nn.Module, ABC):
    """One way of training `student`; whatever else it registers (projections) trains along.

    `forward(batch, generator)` attacks and gives the loss: the loop knows no method. Parameters
    that a method leaves untouched must have `requires_grad` off.
    """

    def __init__(self, student: Backbone, attack: TrainingAttack) -> None:
        super().__init__()
        self.student = student
        self.attack = attack

    @abstractmethod
    def forward(self, batch: Batch, generator: Generator) -> Loss:
        """The loss of one step."""

    @property
    def predictor(self) -> Callable[[Images], Logits]:
        """What validation attacks: the student, unless its head is not trained here."""
        return self.student

    def adversarial(
        self,
        batch: Batch,
        generator: Generator,
        *,
        default: str,
        target_probs: Tensor | None = None,
    ) -> Images:
        """The batch's adversarial examples for the student as it stands, in evaluation mode."""
        name = default if self.attack.objective == "default" else self.attack.objective
        with evaluating(self.student):
            return pgd(
                self._objective(name, batch, target_probs),
                batch.images,
                self.attack.threat,
                steps=self.attack.steps,
                step_size=self.attack.step_size,
                generator=generator,
            )

    def _objective(
        self, name: str, batch: Batch, target_probs: Tensor | None
    ) -> objectives.Objective:
        student = self.student
        if name == "ce":
            return objectives.cross_entropy(student, batch.labels)
        if name == "margin":
            return objectives.margin(student, batch.labels)
        with torch.no_grad():
            if name == "kl":
                if target_probs is None:
                    target_probs = student(batch.images).float().softmax(1)
                return objectives.kl(student, target_probs)
            features = student.forward_features(batch.images).float()
        if name == "cosine":
            return objectives.feature_cosine(student.forward_features, features)
        return objectives.feature_transport(student.forward_features, features)


def teacher_weights(logits: Logits, labels: Tensor, reweight: Reweight) -> PerSample | None:
    """w: the teacher's softmax probability of the true class (Algorithm 1); None: no weights."""
    if reweight == "none":
        return None
    return logits.float().softmax(1).gather(1, labels[:, None]).squeeze(1)


def reduce(loss: PerSample, weights: PerSample | None = None) -> Scalar:
    """The mean over the batch of w_i times the loss of image i."""
    return loss.mean() if weights is None else (loss * weights).mean()


def check_same_classes(student: Backbone, teacher: Backbone) -> None:
    """A teacher must speak of the same classes and see the same channels."""
    if teacher.num_classes != student.num_classes or teacher.channels != student.channels:
        raise UserError(
            f"the teacher has {teacher.num_classes} classes and {teacher.channels} channels, the "
            f"data {student.num_classes} and {student.channels}: choose a teacher of this data set"
        )

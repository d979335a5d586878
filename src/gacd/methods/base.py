"""What a method is made of: terms, each a loss per image over the passes of one step."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor, nn

from gacd.anchors import AnchorBank, true_class_probability
from gacd.attacks.threat import ThreatModel
from gacd.errors import UserError, unknown
from gacd.models.base import Backbone, check_backbone
from gacd.shapes import Batch, Features, Images, Logits, PerSample, Scalar

Reweight = Literal["none", "teacher", "normalised"]

OF_THE_HEAD = ("ce", "margin", "kl", "teacher-kl", "adaptive-kl")
OF_THE_FEATURES = ("cosine", "transport")
OBJECTIVES = ("default", *OF_THE_HEAD, *OF_THE_FEATURES)


class Loss(NamedTuple):
    """A step's loss, and what it is made of, for the logs (0-d tensors, detached)."""

    total: Scalar
    parts: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TrainingAttack:
    """The attack in the training loop: a budget, and `steps` steps of PGD from a random start.

    `step_size` is in the units of `threat.eps`. Raises UserError for an unknown objective.
    """

    threat: ThreatModel
    steps: int
    step_size: float
    objective: str = "default"

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise unknown("attack objective", self.objective, OBJECTIVES)


class Teacher:
    """The frozen teacher. It is shared, not copied, by copies of the methods that hold it.

    `module` itself is frozen: put in evaluation mode, its parameters without gradients. To begin a
    student as its copy, copy it first. Raises UserError for a network that is no `Backbone`.
    """

    def __init__(self, module: Backbone) -> None:
        check_backbone(module)
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

    @torch.no_grad()
    def head(self, features: Features) -> Logits:
        """Logits of features, in float32."""
        return self.module.forward_head(features).float()


class Step:
    """A training step: the batch, its attacked images, and the passes of both networks over them.

    A pass is made when it is first asked for and never twice, so the terms of a combination share
    it. `progress` is the share of the training that is behind; `logs` takes what a term wants to
    see in the logs (0-d tensors, detached).
    """

    def __init__(
        self,
        batch: Batch,
        student: Backbone,
        teacher: Teacher | None,
        generator: Generator,
        progress: float,
    ) -> None:
        self.batch, self.generator, self.progress = batch, generator, progress
        self.adv_images = batch.images  # until the method attacks them
        self.logs: dict[str, Tensor] = {}
        self._student, self._teacher = student, teacher

    def again(self) -> "Step":
        """The same step for a student of other weights: its passes are made anew."""
        twin = copy(self)
        twin.logs = {}
        for name in [name for name in vars(twin) if name.startswith("student_")]:
            delattr(twin, name)
        return twin

    @property
    def teacher(self) -> Teacher:
        """The teacher; a UserError where there is none."""
        if self._teacher is None:
            raise UserError("this needs a teacher, and there is none: use gacd distill")
        return self._teacher

    @cached_property
    def student_features(self) -> Features:
        """Of the clean images."""
        return self._student.forward_features(self.batch.images)

    @cached_property
    def student_logits(self) -> Logits:
        """S(x)."""
        return self._student.forward_head(self.student_features)

    @cached_property
    def student_adv_features(self) -> Features:
        """Of the attacked images."""
        return self._student.forward_features(self.adv_images)

    @cached_property
    def student_adv_logits(self) -> Logits:
        """S(x')."""
        return self._student.forward_head(self.student_adv_features)

    def student_at(self, x: Images) -> Logits:
        """S at other images; a pass each time."""
        logits: Logits = self._student(x)
        return logits

    @cached_property
    def teacher_features(self) -> Features:
        """Of the clean images, in float32."""
        return self.teacher.features(self.batch.images)

    @cached_property
    def teacher_logits(self) -> Logits:
        """T(x), in float32."""
        return self.teacher.head(self.teacher_features)

    @cached_property
    def teacher_adv_logits(self) -> Logits:
        """T(x'), in float32."""
        return self.teacher(self.adv_images)

    @cached_property
    def teacher_weights(self) -> PerSample:
        """w: the teacher's softmax probability of the true class (Algorithm 1)."""
        return true_class_probability(self.teacher_logits, self.batch.labels)


class Given(NamedTuple):
    """What a term is built around; None for what is not at hand."""

    student: Backbone
    teacher: Teacher | None = None
    bank: AnchorBank | None = None
    seed: int = 0


class Term(nn.Module, ABC):
    """A loss of each image: a method by itself, or a part of a combination.

    What a term registers (projections, memories) trains, and is saved, along with the student.
    """

    objective: ClassVar[str | None] = "ce"
    """What its attack maximises, one of `OBJECTIVES`; None: it looks at clean images alone."""
    needs_teacher: ClassVar[bool] = False
    needs_bank: ClassVar[bool] = False
    trains_head: ClassVar[bool] = True
    """False: the student's last layer is fitted afterwards, unless another term trains it."""
    is_addition: ClassVar[bool] = False
    """True: it is no method by itself."""
    cycle: int = 1
    """The steps after which what a step costs repeats itself."""

    def __init__(self, given: Given, *, reweight: Reweight = "none") -> None:
        super().__init__()
        if reweight not in get_args(Reweight):
            raise unknown("reweight", reweight, get_args(Reweight))
        self.reweight = reweight

    def begin(self) -> None:
        """Once a step, before its losses are asked for (twice under AWP): what moves by itself."""

    @abstractmethod
    def losses(self, step: Step) -> PerSample:
        """The loss of each image, unweighted."""

    def forward(self, step: Step) -> PerSample:
        """The loss of each image, times the teacher's trust in it where `reweight` says so.

        `normalised` divides the trust by its mean over the batch, so that the loss keeps its scale.
        """
        losses = self.losses(step)
        if not (isinstance(losses, Tensor) and losses.is_floating_point()):
            kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
            raise UserError(
                f"the losses of {type(self).__name__} are of type {kind}, but must be a tensor of "
                "floats, one number an image"
            )
        if losses.shape != step.batch.labels.shape:
            raise UserError(
                f"the losses of {type(self).__name__} have the shape {tuple(losses.shape)}, but "
                f"must be one number for each of {len(step.batch.labels)} images"
            )
        if self.reweight == "none":
            return losses
        weights = step.teacher_weights
        return losses * (weights / weights.mean() if self.reweight == "normalised" else weights)

    def predictor(self, student: Backbone) -> Callable[[Images], Logits]:
        """What validation attacks where no head trains."""
        return student


def check_objective(objective: str, *, name: str, trains_head: bool, has_teacher: bool) -> None:
    """Refuse an attack on what a method does not have: a trained head, a teacher."""
    if objective in OF_THE_HEAD and not trains_head:
        raise UserError(
            f"attack.objective '{objective}' needs the student's head, which {name} does not "
            "train: use transport or cosine"
        )
    if objective in ("teacher-kl", "adaptive-kl") and not has_teacher:
        raise UserError(
            f"attack.objective '{objective}' needs a teacher, and {name} has none: use ce or kl"
        )

"""A way of training a student: one attack, one or more terms on its images, one weighted sum."""

from collections.abc import Callable, Mapping

import torch
from torch import Generator, nn
from torch.func import functional_call

from gacd.anchors import AnchorBank
from gacd.attacks import objectives
from gacd.attacks.pgd import pgd
from gacd.data.dataset import ImageDataset
from gacd.errors import UserError
from gacd.methods.awp import AWP, NO_AWP, perturbed_weights
from gacd.methods.base import Loss, Step, Teacher, Term, TrainingAttack, check_objective
from gacd.models.base import Backbone, check_fits
from gacd.models.frozen import frozen
from gacd.shapes import Batch, Images, Logits

COLUMNS = {"epoch", "lr", "loss", "grad_norm", "val_natural", "val_robust", "seconds"}
"""What the loop logs of every stage."""


class Method(nn.Module):
    """mean_i sum_m lambda_m l_m(x_i, x'_i): terms m that share one attacked batch, reduced last.

    `forward(batch, generator, progress)` attacks and gives the loss: the loop knows no method. The
    attack is the first term's that has one, unless `attack.objective` names another; it sees the
    student in evaluation mode. Each term's mean is logged where there are several. `settings` are
    what the terms were made with, for the record.
    """

    def __init__(
        self,
        student: Backbone,
        attack: TrainingAttack,
        terms: Mapping[str, Term],
        *,
        weights: Mapping[str, float] | None = None,
        teacher: Teacher | None = None,
        bank: AnchorBank | None = None,
        awp: AWP = NO_AWP,
        settings: Mapping[str, int | float | str] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings or {}
        self.bank = bank
        self.student, self.attack, self.teacher, self.awp = student, attack, teacher, awp
        self.terms = nn.ModuleDict(terms)
        self.weights = {name: (weights or {}).get(name, 1.0) for name in terms}
        defaults = [term.objective for term in terms.values() if term.objective is not None]
        chosen = defaults[0] if attack.objective == "default" and defaults else attack.objective
        self.objective = chosen if defaults else None
        self.trains_head = any(term.trains_head for term in terms.values())
        if self.objective is not None:
            check_objective(
                self.objective,
                name="+".join(terms),
                trains_head=self.trains_head,
                has_teacher=teacher is not None,
            )
        self._held: list[nn.Parameter] = []

    def check(self, train: ImageDataset) -> None:
        """Refuse data that the student, its teacher or its anchor bank are not of."""
        networks = {"student": self.student}
        if self.teacher is not None:
            networks["teacher"] = self.teacher.module
        for name, network in networks.items():
            check_fits(network, train.name, train.num_classes, train.channels, called=name)
            network.check(train.size, trains=name == "student")
        if self.bank is not None:
            self.bank.check(train.labels, networks["teacher"].num_features)

    def train(self, mode: bool = True) -> "Method":
        """Training or evaluation mode of all but the teacher, which a term may hold."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.module.eval()
        return self

    def hold(self) -> None:
        """Let the student's head take no gradients, where no term trains it, until `release`."""
        head = [] if self.trains_head else list(self.student.get_classifier().parameters())
        self._held += [parameter for parameter in head if parameter.requires_grad]
        for parameter in self._held:
            parameter.requires_grad_(False)

    def release(self) -> None:
        """Let the student's head take gradients again, where it did before `hold`."""
        while self._held:
            self._held.pop().requires_grad_(True)

    def forward(
        self,
        batch: Batch,
        generator: Generator,
        progress: float = 1.0,
        *,
        attacked: Step | None = None,
    ) -> Loss:
        """The loss of one step; of a step `attacked` already, by the weights as they stand."""
        if attacked is None:
            step = Step(batch, self.student, self.teacher, generator, progress)
            for term in self.terms.values():
                term.begin()  # type: ignore[operator]
            if self.objective is not None:
                step.adv_images = self.adversarial(step)
            if self.awp.gamma and progress >= self.awp.warmup and torch.is_grad_enabled():
                arguments = (batch, generator, progress)
                weights = perturbed_weights(self, arguments, step, gamma=self.awp.gamma)
                found: Loss = functional_call(self, weights, arguments, {"attacked": step.again()})
                return found
        else:
            step = attacked
        losses = {name: self.weights[name] * term(step) for name, term in self.terms.items()}
        if taken := COLUMNS & step.logs.keys():
            raise UserError(f"'{min(taken)}' is a column of every log: log yours by another name")
        if len(losses) > 1:
            step.logs |= {f"loss_{name}": loss.detach().mean() for name, loss in losses.items()}
        idle = [name for name, loss in losses.items() if not loss.requires_grad]
        if torch.is_grad_enabled() and idle:
            raise UserError(
                f"the losses of {' and '.join(idle)} have no gradient: compute them of the "
                "student's outputs, without detach, no_grad or argmax"
            )
        return Loss(torch.stack(list(losses.values())).sum(0).mean(), step.logs)

    def adversarial(self, step: Step) -> Images:
        """The batch's adversarial examples for the student as it stands, in evaluation mode."""
        with frozen(self.student, step.batch.images):
            return pgd(
                self._objective(step),
                step.batch.images,
                self.attack.threat,
                steps=self.attack.steps,
                step_size=self.attack.step_size,
                generator=step.generator,
            )

    def _objective(self, step: Step) -> objectives.Objective:
        student, (images, labels, _) = self.student, step.batch
        match self.objective:
            case "ce":
                return objectives.cross_entropy(student, labels)
            case "margin":
                return objectives.margin(student, labels)
            case "teacher-kl":
                return objectives.kl(student, step.teacher_logits.softmax(1))
            case "adaptive-kl":
                return objectives.adaptive_kl(student, step.teacher.module)
        with torch.no_grad():
            if self.objective == "kl":
                return objectives.kl(student, student(images).float().softmax(1))
            features = student.forward_features(images).float()
        if self.objective == "cosine":
            return objectives.feature_cosine(student.forward_features, features)
        if self.objective == "transport":
            return objectives.feature_transport(student.forward_features, features)
        raise UserError(f"no attack maximises '{self.objective}'")

    @property
    def predictor(self) -> Callable[[Images], Logits]:
        """What validation attacks: the student, unless its head is not trained here."""
        if self.trains_head:
            return self.student
        first: Term = next(iter(self.terms.values()))  # type: ignore[assignment]
        return first.predictor(self.student)

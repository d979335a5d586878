"""Adversarially robust distillation (Goldblum et al. 2020, Eq. 4)."""

from torch import Generator

from gacd.losses.soft_labels import ard
from gacd.methods.base import (
    Loss,
    Method,
    Reweight,
    Teacher,
    TrainingAttack,
    reduce,
    teacher_weights,
)
from gacd.models.base import Backbone
from gacd.shapes import Batch


class ARD(Method):
    """E[ w (alpha T^2 KL(T_T(x) || S_T(x')) + (1 - alpha) CE(S(x), y)) ], x' by PGD on CE."""

    def __init__(
        self,
        student: Backbone,
        attack: TrainingAttack,
        teacher: Teacher,
        *,
        temperature: float = 30.0,
        alpha: float = 1.0,
        reweight: Reweight = "none",
    ) -> None:
        super().__init__(student, attack)
        self.teacher, self.reweight = teacher, reweight
        self.temperature, self.alpha = temperature, alpha

    def forward(self, batch: Batch, generator: Generator) -> Loss:
        """Distillation of the teacher's clean answer into the attacked student."""
        attacked = self.adversarial(batch, generator, default="ce")
        target = self.teacher(batch.images)
        adversarial = self.student(attacked)
        # With alpha = 1, as published, the clean pass would be multiplied by zero.
        natural = adversarial if self.alpha == 1 else self.student(batch.images)
        loss = ard(
            adversarial,
            target,
            natural,
            batch.labels,
            temperature=self.temperature,
            alpha=self.alpha,
        )
        return Loss(reduce(loss, teacher_weights(target, batch.labels, self.reweight)), {})

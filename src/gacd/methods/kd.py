"""Knowledge distillation on clean images (Hinton, Vinyals and Dean 2015)."""

from torch import Generator

from gacd.losses.soft_labels import kd
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


class KD(Method):
    """E[ w ((1 - alpha) CE(S(x), y) + alpha T^2 KL(teacher_T(x) || student_T(x))) ]."""

    def __init__(
        self,
        student: Backbone,
        attack: TrainingAttack,
        teacher: Teacher,
        *,
        temperature: float = 4.0,
        alpha: float = 0.9,
        reweight: Reweight = "none",
    ) -> None:
        super().__init__(student, attack)
        self.teacher, self.reweight = teacher, reweight
        self.temperature, self.alpha = temperature, alpha

    def forward(self, batch: Batch, generator: Generator) -> Loss:
        """Distillation on the clean batch."""
        target = self.teacher(batch.images)
        loss = kd(
            self.student(batch.images),
            target,
            batch.labels,
            temperature=self.temperature,
            alpha=self.alpha,
        )
        return Loss(reduce(loss, teacher_weights(target, batch.labels, self.reweight)), {})

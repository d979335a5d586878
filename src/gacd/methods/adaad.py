"""Adaptive adversarial distillation (Huang et al. 2023)."""

from gacd.losses.soft_labels import adaad
from gacd.methods.base import Given, Reweight, Step, Term
from gacd.shapes import PerSample


class AdaAD(Term):
    """alpha KL(T(x') || S(x')) + (1 - alpha) KL(T(x) || S(x)), x' by PGD on KL(T(x') || S(x')).

    The attack goes through the teacher too, whose gradient is taken with respect to the image only.
    """

    objective = "adaptive-kl"
    needs_teacher = True

    def __init__(self, given: Given, *, alpha: float = 1.0, reweight: Reweight = "none") -> None:
        super().__init__(given, reweight=reweight)
        self.alpha = alpha

    def losses(self, step: Step) -> PerSample:
        """At each image the student says what the teacher says of that image."""
        student, teacher = step.student_adv_logits, step.teacher_adv_logits
        only = self.alpha == 1  # as published: the clean passes would be multiplied by zero
        return adaad(
            student_adv_logits=student,
            teacher_adv_logits=teacher,
            student_logits=student if only else step.student_logits,
            teacher_logits=teacher if only else step.teacher_logits,
            adv_weight=self.alpha,
        )

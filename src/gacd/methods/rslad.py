"""Robust soft label adversarial distillation (Zi et al. 2021)."""

from gacd.losses.soft_labels import rslad
from gacd.methods.base import Given, Reweight, Step, Term
from gacd.shapes import PerSample


class RSLAD(Term):
    """alpha KL(T(x) || S(x')) + (1 - alpha) KL(T(x) || S(x)), x' by PGD on KL(T(x) || S(x'))."""

    objective = "teacher-kl"
    needs_teacher = True

    def __init__(self, given: Given, *, alpha: float = 5 / 6, reweight: Reweight = "none") -> None:
        super().__init__(given, reweight=reweight)
        self.alpha = alpha

    def losses(self, step: Step) -> PerSample:
        """The teacher's clean answer, the only label of the clean and of the attacked batch."""
        return rslad(
            step.student_adv_logits,
            step.student_logits,
            step.teacher_logits,
            adv_weight=self.alpha,
        )

"""Knowledge distillation on clean images (Hinton, Vinyals and Dean 2015)."""

from gacd.losses.soft_labels import kd
from gacd.methods.base import Given, Reweight, Step, Term
from gacd.shapes import PerSample


class KD(Term):
    """(1 - alpha) CE(S(x), y) + alpha T^2 KL(T_T(x) || S_T(x))."""

    objective = None
    needs_teacher = True

    def __init__(
        self,
        given: Given,
        *,
        temperature: float = 4.0,
        alpha: float = 0.9,
        reweight: Reweight = "none",
    ) -> None:
        super().__init__(given, reweight=reweight)
        self.temperature, self.alpha = temperature, alpha

    def losses(self, step: Step) -> PerSample:
        """Distillation on the clean batch."""
        return kd(
            step.student_logits,
            step.teacher_logits,
            step.batch.labels,
            temperature=self.temperature,
            alpha=self.alpha,
        )

"""Adversarially robust distillation (Goldblum et al. 2020, Eq. 4)."""

from gacd.losses.soft_labels import ard
from gacd.methods.base import Given, Reweight, Step, Term
from gacd.shapes import PerSample


class ARD(Term):
    """alpha T^2 KL(T_T(x) || S_T(x')) + (1 - alpha) CE(S(x), y), x' by PGD on CE."""

    needs_teacher = True

    def __init__(
        self,
        given: Given,
        *,
        temperature: float = 30.0,
        alpha: float = 1.0,
        reweight: Reweight = "none",
    ) -> None:
        super().__init__(given, reweight=reweight)
        self.temperature, self.alpha = temperature, alpha

    def losses(self, step: Step) -> PerSample:
        """Distillation of the teacher's clean answer into the attacked student."""
        adversarial = step.student_adv_logits
        return ard(
            adversarial,
            step.teacher_logits,
            # With alpha = 1, as published, the clean pass would be multiplied by zero.
            adversarial if self.alpha == 1 else step.student_logits,
            step.batch.labels,
            temperature=self.temperature,
            alpha=self.alpha,
        )

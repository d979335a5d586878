"""Introspective adversarial distillation, IAD-I (Zhu et al. 2022)."""

from gacd.losses.soft_labels import iad
from gacd.methods.base import Given, Reweight, Step, Term
from gacd.shapes import PerSample


class IAD(Term):
    """a T^2 KL(T_T(x) || S_T(x')) + (1 - a) KL(S(x) || S(x')), a = T(x')_y ^ beta, x' by PGD on CE.

    Over the first `warmup` of the training a = 1: 60 of 200 epochs, as published.
    """

    needs_teacher = True

    def __init__(
        self,
        given: Given,
        *,
        temperature: float = 1.0,
        beta: float = 0.1,
        warmup: float = 0.3,
        reweight: Reweight = "none",
    ) -> None:
        super().__init__(given, reweight=reweight)
        self.temperature, self.beta, self.warmup = temperature, beta, warmup

    def losses(self, step: Step) -> PerSample:
        """The teacher where it withstands the attack, the student itself where it does not."""
        return iad(
            student_adv_logits=step.student_adv_logits,
            student_logits=step.student_logits,
            teacher_adv_logits=step.teacher_adv_logits,
            teacher_logits=step.teacher_logits,
            labels=step.batch.labels,
            temperature=self.temperature,
            beta=self.beta if step.progress >= self.warmup else 0.0,
        )

"""Indirect gradient matching, an addition to other methods (Lee, Cho and Kim 2025)."""

from gacd.losses.soft_labels import igdm
from gacd.methods.base import Given, Reweight, Step, Term
from gacd.shapes import PerSample


class IGDM(Term):
    """a p KL(sm(T(x + d) - T(x - d)) || sm(S(x + d) - S(x - d))), d = x' - x, p the progress.

    The weight rises linearly from 0 to a, as published: 20 in the published runs of CIFAR-100, 1 in
    those of CIFAR-10. x - d is not cut to [0, 1], which the published code does not do either.
    """

    needs_teacher = True
    is_addition = True

    def __init__(self, given: Given, *, alpha: float = 1.0, reweight: Reweight = "none") -> None:
        super().__init__(given, reweight=reweight)
        self.alpha = alpha

    def losses(self, step: Step) -> PerSample:
        """Outputs of student and teacher change alike from one side of an image to the other."""
        minus = 2 * step.batch.images - step.adv_images
        loss = igdm(
            student_plus_logits=step.student_adv_logits,
            student_minus_logits=step.student_at(minus),
            teacher_plus_logits=step.teacher_adv_logits,
            teacher_minus_logits=step.teacher(minus),
        )
        return self.alpha * step.progress * loss

"""Misclassification-aware adversarial training (Wang et al. 2020)."""

from gacd.losses.robust import mart
from gacd.methods.base import Given, Step, Term
from gacd.shapes import PerSample


class MART(Term):
    """BCE(f(x'), y) + beta KL(f(x) || f(x')) (1 - f(x)_y), x' by PGD on CE."""

    def __init__(self, given: Given, *, beta: float = 5.0) -> None:
        super().__init__(given)
        self.beta = beta

    def losses(self, step: Step) -> PerSample:
        """MART on the batch."""
        return mart(step.student_logits, step.student_adv_logits, step.batch.labels, beta=self.beta)

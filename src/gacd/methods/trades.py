"""TRADES (Zhang et al. 2019, Eq. 5)."""

from gacd.losses.robust import trades
from gacd.methods.base import Given, Step, Term
from gacd.shapes import PerSample


class TRADES(Term):
    """CE(f(x), y) + beta max_{x'} KL(f(x) || f(x'))."""

    objective = "kl"

    def __init__(self, given: Given, *, beta: float = 6.0) -> None:
        super().__init__(given)
        self.beta = beta

    def losses(self, step: Step) -> PerSample:
        """TRADES on the batch."""
        return trades(
            step.student_logits, step.student_adv_logits, step.batch.labels, beta=self.beta
        )

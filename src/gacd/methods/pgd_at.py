"""PGD adversarial training (Madry et al. 2018, Eq. 2.1)."""

from gacd.losses.soft_labels import cross_entropy
from gacd.methods.base import Step, Term
from gacd.shapes import PerSample


class PGDAT(Term):
    """max_{x' in ball(x)} CE(f(x'), y), the maximum found by PGD on the cross-entropy."""

    def losses(self, step: Step) -> PerSample:
        """Cross-entropy on the attacked batch."""
        return cross_entropy(step.student_adv_logits, step.batch.labels)

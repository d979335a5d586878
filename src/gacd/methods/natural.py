"""Natural training: cross-entropy on clean images."""

from gacd.losses.soft_labels import cross_entropy
from gacd.methods.base import Step, Term
from gacd.shapes import PerSample


class Natural(Term):
    """CE(f(x), y). No attack: the undefended network."""

    objective = None

    def losses(self, step: Step) -> PerSample:
        """Cross-entropy on the clean batch."""
        return cross_entropy(step.student_logits, step.batch.labels)

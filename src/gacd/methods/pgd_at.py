"""PGD adversarial training (Madry et al. 2018, Eq. 2.1)."""

from torch import Generator
from torch.nn import functional as F

from gacd.methods.base import Loss, Method, reduce
from gacd.shapes import Batch


class PGDAT(Method):
    """E[ max_{x' in ball(x)} CE(f(x'), y) ], the maximum found by PGD on the cross-entropy."""

    def forward(self, batch: Batch, generator: Generator) -> Loss:
        """Cross-entropy on the attacked batch."""
        attacked = self.adversarial(batch, generator, default="ce")
        logits = self.student(attacked).float()
        return Loss(reduce(F.cross_entropy(logits, batch.labels, reduction="none")), {})

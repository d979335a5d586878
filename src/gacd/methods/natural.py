"""Natural training: cross-entropy on clean images."""

from torch import Generator
from torch.nn import functional as F

from gacd.methods.base import Loss, Method, reduce
from gacd.shapes import Batch


class Natural(Method):
    """E[ CE(f(x), y) ]. No attack: the undefended network."""

    def forward(self, batch: Batch, generator: Generator) -> Loss:
        """Cross-entropy on the clean batch."""
        logits = self.student(batch.images).float()
        return Loss(reduce(F.cross_entropy(logits, batch.labels, reduction="none")), {})

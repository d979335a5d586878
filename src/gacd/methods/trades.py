"""TRADES (Zhang et al. 2019, Eq. 5)."""

from torch import Generator

from gacd.losses.robust import trades
from gacd.methods.base import Loss, Method, TrainingAttack, reduce
from gacd.models.base import Backbone
from gacd.shapes import Batch


class TRADES(Method):
    """E[ CE(f(x), y) + beta max_{x'} KL(f(x) || f(x')) ]."""

    def __init__(self, student: Backbone, attack: TrainingAttack, *, beta: float = 6.0) -> None:
        super().__init__(student, attack)
        self.beta = beta

    def forward(self, batch: Batch, generator: Generator) -> Loss:
        """TRADES on the batch."""
        attacked = self.adversarial(batch, generator, default="kl")
        natural = self.student(batch.images)
        loss = trades(natural, self.student(attacked), batch.labels, beta=self.beta)
        return Loss(reduce(loss), {})

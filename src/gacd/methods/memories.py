"""CRD's two momentum memories as a loss, for `crd` and for GACD's estimator `memory`."""

import math

import torch
from torch import Generator, Tensor, nn

from gacd.anchors import AnchorBank
from gacd.errors import UserError
from gacd.losses.contrastive import crd_nce
from gacd.memory import MomentumMemory, Normaliser, OtherClasses
from gacd.shapes import Batch, PerSample


class TwoMemories(nn.Module):
    """CRD's estimate: each image against `negatives` of other classes, in two momentum memories.

    The weights `weights_M` of the images, where given, belong to the teacher's side of each pair.
    """

    def __init__(
        self,
        bank: AnchorBank,
        dim: int,
        *,
        negatives: int,
        temperature: float,
        normaliser: str,
        seed: int,
    ) -> None:
        super().__init__()
        if normaliser == "exact":
            raise UserError(
                "estimator 'memory' needs a constant normaliser: say normaliser first-batch"
            )
        if bank.labels_M is None:
            raise UserError("estimator 'memory' draws from other classes: the bank needs labels")
        generator = torch.Generator(bank.features_MD.device).manual_seed(seed)
        self.memory = MomentumMemory(len(bank), dim, generator=generator)
        self.student_normaliser = Normaliser(normaliser)
        self.teacher_normaliser = Normaliser(normaliser)
        self.others = OtherClasses(bank.labels_M)
        self.size, self.negatives, self.temperature = len(bank), negatives, temperature

    def forward(
        self,
        s_BE: Tensor,
        t_BE: Tensor,
        batch: Batch,
        generator: Generator,
        weights_M: Tensor | None = None,
    ) -> PerSample:
        """Both sides of the loss (Eq. 17, 18); the memories move after scoring, as CRD's do."""
        drawn = self.others.draw(batch.labels, self.negatives, generator)
        rows_BJ = torch.cat([batch.index[:, None], drawn], dim=1)
        student_BJE, teacher_BJE = self.memory.read(rows_BJ)
        for normaliser, query_BE, memory_BJE in (
            (self.student_normaliser, s_BE, teacher_BJE),
            (self.teacher_normaliser, t_BE, student_BJE),
        ):
            if normaliser.wants_write:
                scores_BJ = torch.einsum("be,bje->bj", query_BE, memory_BJE) / self.temperature
                normaliser.write(scores_BJ.logsumexp(1) + math.log(self.size / rows_BJ.shape[1]))
        student_log_z = self.student_normaliser.read()
        teacher_log_z = self.teacher_normaliser.read()
        assert student_log_z is not None and teacher_log_z is not None  # never 'exact' here
        loss = crd_nce(
            s_BE,
            t_BE,
            student_BJE,
            teacher_BJE,
            dataset_size=self.size,
            student_log_z=student_log_z,
            teacher_log_z=teacher_log_z,
            weights_B=None if weights_M is None else weights_M[batch.index],
            weights_BJ=None if weights_M is None else weights_M[rows_BJ],
            temperature=self.temperature,
        )
        self.memory.write(batch.index, s_BE, t_BE)
        return loss

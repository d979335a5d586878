"""What the contrast is estimated over: anchors of a bank (GACD), or CRD's two momentum memories."""

import math

import torch
from torch import Generator, Tensor, nn

from gacd.anchors import AnchorBank, Anchors
from gacd.errors import UserError
from gacd.losses.contrastive import crd_nce
from gacd.losses.pairs import Pairs
from gacd.memory import MomentumMemory, Normaliser, OtherClasses
from gacd.shapes import Batch, PerSample


class OverAnchors(nn.Module):
    """GACD's estimate (Eq. 10): over the whole bank, or, `sampled`, over `negatives` rows of it."""

    def __init__(
        self,
        bank: AnchorBank,
        negatives: int,
        normaliser: str,
        *,
        sampled: bool = False,
        balanced: bool = False,
    ) -> None:
        super().__init__()
        self.bank, self.negatives = bank, negatives
        self.sampled, self.balanced = sampled, balanced
        self.normaliser = Normaliser(normaliser)

    def draw(self, generator: Generator, device: torch.device) -> Anchors:
        """The anchors of one step. Raises UserError where all of them lie on another device."""
        if not self.sampled:
            if (there := self.bank.features_MD.device) != device:
                raise UserError(
                    f"the bank is on {there} and the student on {device}: move the bank (`to`), or "
                    "use estimator 'sampled', which copies what it draws"
                )
            return self.bank.all()
        rows = self.bank.draw(self.negatives, generator, balanced=self.balanced)
        return self.bank.rows(rows, device=device)

    def forward(
        self, pairs: Pairs, batch: Batch, own: Anchors, anchors: Anchors, *, weighted: bool
    ) -> PerSample:
        """See `gacd_loss`; `own` are the images' rows of the bank, whose weights are theirs."""
        if self.normaliser.wants_write:
            with torch.no_grad():
                self.normaliser.write(pairs.log_partition())
        return pairs.gacd_loss(
            labels_B=batch.labels,
            anchor_labels_M=anchors.labels_M,
            weights_B=own.weights_M if weighted else None,
            anchor_weights_M=anchors.weights_M if weighted else None,
            negatives=self.negatives,
            log_z=self.normaliser.read(),
        )


class TwoMemories(nn.Module):
    """CRD's estimate: each image against `negatives` of other classes, in two momentum memories.

    The weights `weights_M` of the images, where given, belong to the teacher's side of each pair.
    """

    def __init__(
        self,
        bank: AnchorBank,
        dim: int,
        negatives: int,
        normaliser: str,
        *,
        temperature: float,
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
        """Both sides of CRD's loss (`crd_nce`); the memories move after scoring, as CRD's do."""
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

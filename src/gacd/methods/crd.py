"""Contrastive representation distillation (Tian, Krishnan and Isola 2020)."""

import torch

from gacd.losses.soft_labels import cross_entropy
from gacd.methods.base import Given, Reweight, Step, Term
from gacd.methods.estimates import TwoMemories
from gacd.models.projection import Projection
from gacd.shapes import PerSample


class CRD(Term):
    """CE(S(x), y) + beta NCE(s, t) on clean images, beta = 0.8 as published: see `crd_nce`."""

    objective = None
    needs_teacher = True
    needs_bank = True

    def __init__(
        self,
        given: Given,
        *,
        beta: float = 0.8,
        temperature: float = 0.07,
        negatives: int = 16384,
        dim: int = 128,
        reweight: Reweight = "none",
    ) -> None:
        super().__init__(given, reweight=reweight)
        assert given.teacher is not None and given.bank is not None
        self.beta = beta
        student, teacher = given.student.num_features, given.teacher.module.num_features
        self.student_projection = Projection(student, dim, seed=given.seed)
        self.teacher_projection = Projection(teacher, dim, seed=given.seed + 1)
        self.contrast = TwoMemories(
            given.bank, dim, negatives, "first-batch", temperature=temperature, seed=given.seed
        )

    def losses(self, step: Step) -> PerSample:
        """Cross-entropy, and the contrast of the clean batch with the memories."""
        features, seen = step.student_features, step.teacher_features  # passes of the autocast
        with torch.autocast(features.device.type, enabled=False):
            s_BE = self.student_projection(features.float())
            t_BE = self.teacher_projection(seen)
            contrast: PerSample = self.contrast(s_BE, t_BE, step.batch, step.generator)
        return cross_entropy(step.student_logits, step.batch.labels) + self.beta * contrast

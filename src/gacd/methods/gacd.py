"""Guided adversarial contrastive distillation (Bai et al. 2020, Eq. 7 to 10 and Algorithm 1)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from gacd.anchors import AnchorBank, Anchors
from gacd.errors import UserError, unknown
from gacd.losses.contrastive import crd_nce, gacd_loss, log_partition
from gacd.losses.information import info_nce_bound
from gacd.memory import MomentumMemory, Normaliser, OtherClasses
from gacd.methods.base import Loss, Method, Reweight, Teacher, TrainingAttack, reduce
from gacd.models.base import Backbone
from gacd.models.projection import Projection
from gacd.shapes import Batch, Images, Logits, PerSample


class GACD(Method):
    """The student's attacked features, told apart from the teacher's anchors of other classes.

    E_i[ -w_i log h(t_i, s_i) ] - k E_j[ w_j log(1 - h(t_j, s_i)) ], see `gacd_loss`: s_i the
    projected features of the attacked image, t_i the teacher's of the clean one. The student and
    both projections train, the student's own head does not: fit it afterwards. Logged beside the
    loss are InfoNCE's lower bound on the mutual information over the anchors at hand, `mi` in nats,
    and its ceiling, the logarithm of their number.
    """

    def __init__(
        self,
        student: Backbone,
        attack: TrainingAttack,
        teacher: Teacher,
        bank: AnchorBank,
        *,
        temperature: float = 0.1,
        negatives: int = 16384,
        dim: int = 128,
        estimator: str = "exact",
        normaliser: str = "exact",
        positive: str = "view",
        reweight: Reweight = "teacher",
        seed: int = 0,
    ) -> None:
        super().__init__(student, attack)
        if attack.objective not in ("default", "transport", "cosine"):
            raise UserError(
                f"attack.objective '{attack.objective}' needs the student's head, which gacd does "
                "not train: use transport or cosine"
            )
        for what, value, known in (
            ("estimator", estimator, ("exact", "sampled", "memory")),
            ("positive", positive, ("bank", "view")),
        ):
            if value not in known:
                raise unknown(what, value, known)
        self.teacher, self.bank = teacher, bank
        self.temperature, self.negatives = temperature, negatives
        self.estimator, self.positive, self.reweight = estimator, positive, reweight
        student.get_classifier().requires_grad_(False)
        self.student_projection = Projection(student.num_features, dim, seed=seed)
        self.teacher_projection = Projection(teacher.module.num_features, dim, seed=seed + 1)
        self.normaliser = Normaliser(normaliser)
        if estimator == "memory":
            if normaliser == "exact":
                raise UserError(
                    "estimator 'memory' needs a constant normaliser: say normaliser first-batch"
                )
            if bank.labels_M is None:
                raise UserError(
                    "estimator 'memory' draws from other classes: the bank needs labels"
                )
            generator = torch.Generator(bank.features_MD.device).manual_seed(seed)
            self.memory = MomentumMemory(len(bank), dim, generator=generator)
            self.teacher_normaliser = Normaliser(normaliser)
            self.others = OtherClasses(bank.labels_M)

    def forward(self, batch: Batch, generator: Generator) -> Loss:
        """The contrastive loss of the attacked batch."""
        attacked = self.adversarial(batch, generator, default="transport")
        features = self.student.forward_features(attacked)
        own = self.bank.rows(batch.index, device=features.device)
        seen = own.features_MD if self.positive == "bank" else self.teacher.features(batch.images)
        with torch.autocast(features.device.type, enabled=False):
            s_BE = self.student_projection(features.float())
            t_BE = self.teacher_projection(seen.float())
            anchors = self._anchors(generator, s_BE.device)
            settings: dict[str, Any] = {
                "index_B": batch.index,
                "anchor_index_M": anchors.index_M,
                "projection_weight_ED": self.teacher_projection.linear.weight,
                "projection_bias_E": self.teacher_projection.linear.bias,
                "temperature": self.temperature,
            }
            if self.estimator == "memory":
                loss = self._memory_loss(s_BE, t_BE, batch, own, generator)
            else:
                loss = self._bank_loss(s_BE, t_BE, batch, own, anchors, settings)
            bound = info_nce_bound(s_BE, t_BE, anchors.features_MD, **settings)
        return Loss(reduce(loss), {"mi": bound.nats, "mi_ceiling": bound.ceiling})

    def _bank_loss(
        self,
        s_BE: Tensor,
        t_BE: Tensor,
        batch: Batch,
        own: Anchors,
        anchors: Anchors,
        settings: dict[str, Any],
    ) -> PerSample:
        settings = {**settings, "dataset_size": len(self.bank)}
        if self.normaliser.wants_write:
            self.normaliser.write(log_partition(s_BE, t_BE, anchors.features_MD, **settings))
        weighted = self.reweight == "teacher"
        return gacd_loss(
            s_BE,
            t_BE,
            anchors.features_MD,
            labels_B=batch.labels,
            anchor_labels_M=anchors.labels_M,
            weights_B=own.weights_M if weighted else None,
            anchor_weights_M=anchors.weights_M if weighted else None,
            negatives=self.negatives,
            log_z=self.normaliser.read(),
            **settings,
        )

    def _memory_loss(
        self, s_BE: Tensor, t_BE: Tensor, batch: Batch, own: Anchors, generator: Generator
    ) -> PerSample:
        """The paper's literal route: CRD's two memories, k negatives of each image's own."""
        drawn = self.others.draw(batch.labels, self.negatives, generator)
        rows_BJ = torch.cat([batch.index[:, None], drawn], dim=1)
        student_BJE, teacher_BJE = self.memory.read(rows_BJ)
        size = len(self.bank)
        for normaliser, query_BE, memory_BJE in (
            (self.normaliser, s_BE, teacher_BJE),
            (self.teacher_normaliser, t_BE, student_BJE),
        ):
            if normaliser.wants_write:
                scores_BJ = torch.einsum("be,bje->bj", query_BE, memory_BJE) / self.temperature
                normaliser.write(scores_BJ.logsumexp(1) + math.log(size / rows_BJ.shape[1]))
        student_log_z, teacher_log_z = self.normaliser.read(), self.teacher_normaliser.read()
        assert student_log_z is not None and teacher_log_z is not None  # never 'exact' here
        weighted = self.reweight == "teacher"
        loss = crd_nce(
            s_BE,
            t_BE,
            student_BJE,
            teacher_BJE,
            dataset_size=size,
            student_log_z=student_log_z,
            teacher_log_z=teacher_log_z,
            weights_B=own.weights_M if weighted else None,
            weights_BJ=self.bank.weights_M[rows_BJ] if weighted else None,
            temperature=self.temperature,
        )
        self.memory.write(batch.index, s_BE, t_BE)  # after scoring, as CRD does
        return loss

    def _anchors(self, generator: Generator, device: torch.device) -> Anchors:
        if self.estimator != "sampled":
            return self.bank.all()
        return self.bank.rows(self.bank.draw(self.negatives, generator), device=device)

    @property
    @torch.no_grad()
    def predictor(self) -> Callable[[Images], Logits]:
        """The class whose mean teacher embedding is nearest: what features alone can answer."""
        anchors = self.bank.all()
        t_ME = self.teacher_projection(anchors.features_MD.float())
        classes = F.one_hot(anchors.labels_M, self.student.num_classes).to(t_ME)
        centre_KE = F.normalize(classes.T @ t_ME, dim=1)

        def predict(x: Images) -> Logits:
            s_BE: Tensor = self.student_projection(self.student.forward_features(x))
            return s_BE @ centre_KE.T.to(s_BE) / self.temperature

        return predict

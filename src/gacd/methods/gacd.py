"""Guided adversarial contrastive distillation (Bai et al. 2020, Eq. 7 to 10 and Algorithm 1)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from gacd.anchors import AnchorBank, Anchors
from gacd.errors import UserError, unknown
from gacd.losses.contrastive import gacd_loss, info_nce, log_partition
from gacd.memory import Normaliser
from gacd.methods.base import Loss, Method, Reweight, Teacher, TrainingAttack, reduce
from gacd.models.base import Backbone
from gacd.models.projection import Projection
from gacd.shapes import Batch, Images, Logits


class GACD(Method):
    """The student's attacked features, told apart from the teacher's anchors of other classes.

    E_i[ -w_i log h(t_i, s_i) ] - k E_j[ w_j log(1 - h(t_j, s_i)) ], see `gacd_loss`: s_i the
    projected features of the attacked image, t_i the teacher's of the clean one. The student and
    both projections train, the student's own head does not: fit it afterwards. Logged beside the
    loss are InfoNCE's lower bound on the mutual information, `mi` in nats, and its ceiling log M.
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
            ("estimator", estimator, ("exact", "sampled")),
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

    def forward(self, batch: Batch, generator: Generator) -> Loss:
        """The contrastive loss of the attacked batch."""
        attacked = self.adversarial(batch, generator, default="transport")
        features = self.student.forward_features(attacked)
        own = self.bank.rows(batch.index, device=features.device)
        seen = own.features_MD if self.positive == "bank" else self.teacher.features(batch.images)
        anchors = self._anchors(generator, features.device)
        with torch.autocast(features.device.type, enabled=False):
            pairs = (
                self.student_projection(features.float()),
                self.teacher_projection(seen.float()),
            )
            linear = self.teacher_projection.linear
            shared: dict[str, Any] = {
                "index_B": batch.index,
                "anchor_index_M": anchors.index_M,
                "projection_weight_ED": linear.weight,
                "projection_bias_E": linear.bias,
                "temperature": self.temperature,
                "dataset_size": len(self.bank),
            }
            if self.normaliser.wants_write:
                self.normaliser.write(log_partition(*pairs, anchors.features_MD, **shared).detach())
            weighted = self.reweight == "teacher"
            loss = gacd_loss(
                *pairs,
                anchors.features_MD,
                labels_B=batch.labels,
                anchor_labels_M=anchors.labels_M,
                weights_B=own.weights_M if weighted else None,
                anchor_weights_M=anchors.weights_M if weighted else None,
                negatives=self.negatives,
                log_z=self.normaliser.read(),
                **shared,
            )
            with torch.no_grad():
                ceiling = torch.full((), math.log(len(self.bank)), device=loss.device)
                bound = ceiling - info_nce(*pairs, anchors.features_MD, **shared).mean()
        return Loss(reduce(loss), {"mi": bound, "mi_ceiling": ceiling})

    def _anchors(self, generator: Generator, device: torch.device) -> Anchors:
        if self.estimator == "exact":
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

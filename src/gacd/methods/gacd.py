"""Guided adversarial contrastive distillation (Bai et al. 2020, Eq. 7 to 10 and Algorithm 1)."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from gacd.anchors import Anchors
from gacd.errors import unknown
from gacd.losses.information import info_nce_bound_of
from gacd.losses.pairs import Pairs
from gacd.memory import Normaliser
from gacd.methods.anchoring import Anchoring
from gacd.methods.base import Given, Reweight, Step, Term
from gacd.methods.memories import TwoMemories
from gacd.models.base import Backbone
from gacd.models.projection import Projection
from gacd.shapes import Batch, Images, Logits, PerSample


class GACD(Term):
    """The student's attacked features, told apart from the teacher's anchors of other classes.

    E_i[ -w_i log h(t_i, s_i) ] - k E_j[ w_j log(1 - h(t_j, s_i)) ], see `gacd_loss`: s_i the
    projected features of the attacked image, t_i the teacher's of the clean one. The student and
    both projections train, the student's own head does not: fit it afterwards. Logged beside the
    loss are InfoNCE's lower bound on the mutual information over the anchors at hand, `mi` in nats,
    and its ceiling, the logarithm of their number.
    """

    objective = "transport"
    needs_teacher = True
    needs_bank = True
    trains_head = False

    def __init__(
        self,
        given: Given,
        *,
        temperature: float = 0.1,
        negatives: int = 16384,
        dim: int = 128,
        estimator: str = "exact",
        balanced: bool = False,
        normaliser: str = "exact",
        positive: str = "view",
        teacher_projection: str = "live",
        refresh: int = 10,
        reweight: Reweight = "teacher",
    ) -> None:
        super().__init__(given, reweight=reweight)
        assert given.teacher is not None and given.bank is not None
        for what, value, known in (
            ("estimator", estimator, ("exact", "sampled", "memory")),
            ("positive", positive, ("bank", "view")),
        ):
            if value not in known:
                raise unknown(what, value, known)
        self.bank = given.bank
        self.temperature, self.negatives = temperature, negatives
        self.estimator, self.balanced, self.positive = estimator, balanced, positive
        self.anchoring = Anchoring(
            given.bank, dim, kind=teacher_projection, refresh=refresh, seed=given.seed + 1
        )
        width = self.anchoring.width
        self.student_projection = Projection(given.student.num_features, width, seed=given.seed)
        self.normaliser = Normaliser(normaliser)
        if estimator == "memory":
            self.contrast = TwoMemories(
                given.bank,
                width,
                negatives=negatives,
                temperature=temperature,
                normaliser=normaliser,
                seed=given.seed,
            )

    def forward(self, step: Step) -> PerSample:
        """The loss as it is: the teacher's weights belong to its pairs."""
        return self.losses(step)

    def losses(self, step: Step) -> PerSample:
        """The contrastive loss of the attacked batch."""
        batch, features = step.batch, step.student_adv_features
        own = self.bank.rows(batch.index, device=features.device)
        seen = own.features_MD if self.positive == "bank" else step.teacher_features
        self.anchoring.advance()
        with torch.autocast(features.device.type, enabled=False):
            s_BE = self.student_projection(features.float())
            t_BE = self.anchoring.current(seen.float())
            anchors = self._anchors(step.generator, s_BE.device)
            anchors_MD, projection = self.anchoring.anchors(anchors)
            pairs = Pairs(
                s_BE,
                t_BE,
                anchors_MD,
                index_B=batch.index,
                anchor_index_M=anchors.index_M,
                temperature=self.temperature,
                dataset_size=len(self.bank),
                **projection,
            )
            bound = info_nce_bound_of(pairs)
            if self.estimator == "memory":
                weights_M = self.bank.weights_M if self.reweight == "teacher" else None
                loss: PerSample = self.contrast(s_BE, t_BE, batch, step.generator, weights_M)
            else:
                loss = self._bank_loss(pairs, batch, own, anchors)
        step.logs |= {"mi": bound.nats, "mi_ceiling": bound.ceiling}
        return loss + self.anchoring.idle()

    def _bank_loss(self, pairs: Pairs, batch: Batch, own: Anchors, anchors: Anchors) -> PerSample:
        if self.normaliser.wants_write:
            with torch.no_grad():
                self.normaliser.write(pairs.log_partition())
        weighted = self.reweight == "teacher"
        return pairs.gacd_loss(
            labels_B=batch.labels,
            anchor_labels_M=anchors.labels_M,
            weights_B=own.weights_M if weighted else None,
            anchor_weights_M=anchors.weights_M if weighted else None,
            negatives=self.negatives,
            log_z=self.normaliser.read(),
        )

    def _anchors(self, generator: Generator, device: torch.device) -> Anchors:
        if self.estimator != "sampled":
            return self.bank.all()
        rows = self.bank.draw(self.negatives, generator, balanced=self.balanced)
        return self.bank.rows(rows, device=device)

    @property
    def teacher_projection(self) -> nn.Module:
        """Of the teacher's features into the embedding."""
        return self.anchoring.projection

    @torch.no_grad()
    def predictor(self, student: Backbone) -> Callable[[Images], Logits]:
        """The class whose mean teacher embedding is nearest: what features alone can answer."""
        anchors = self.bank.all()
        t_ME = self.teacher_projection(anchors.features_MD.float())
        classes = F.one_hot(anchors.labels_M, student.num_classes).to(t_ME)
        centre_KE = F.normalize(classes.T @ t_ME, dim=1)

        def predict(x: Images) -> Logits:
            s_BE: Tensor = self.student_projection(student.forward_features(x))
            return s_BE @ centre_KE.T.to(s_BE) / self.temperature

        return predict

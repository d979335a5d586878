"""Guided adversarial contrastive distillation (Bai et al. 2020, Eq. 7 to 10 and Algorithm 1)."""

from collections.abc import Callable

import torch

from gacd.errors import UserError, unknown
from gacd.losses.information import info_nce_bound_of
from gacd.methods.anchoring import Anchoring
from gacd.methods.base import Given, Reweight, Step, Term
from gacd.methods.estimates import OverAnchors, TwoMemories
from gacd.models.base import Backbone
from gacd.models.projection import Projection
from gacd.shapes import Images, Logits, PerSample

CHOICES = {"estimator": ("exact", "sampled", "memory"), "positive": ("bank", "view")}


class GACD(Term):
    """The student's attacked features, told apart from the teacher's anchors of other classes.

    l_i = -w_i log h(t_i, s_i) - k E_j[ w_j log(1 - h(t_j, s_i)) ], see `gacd_loss`: s_i the
    projected features of the attacked image, t_i the teacher's of the clean one, j of other
    classes. With the estimator `memory` the loss is `crd_nce`. The student and its projection
    train, the teacher's projection as `Anchoring` says, the student's head does not: fit it
    afterwards. InfoNCE's lower bound on mutual information over the anchors at hand is logged as
    `mi`, in nats, and its ceiling as `mi_ceiling`; not with `balanced`, as anchors drawn class by
    class give no bound.
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
        for name, value in {"estimator": estimator, "positive": positive}.items():
            if value not in CHOICES[name]:
                raise unknown(name, value, CHOICES[name])
        if balanced and estimator != "sampled":
            raise UserError(f"balanced draws anchors, but estimator {estimator} draws none")
        if given.bank.labels_M is None:
            raise UserError("gacd's negatives are of other classes: the bank needs labels")
        self.bank = given.bank.normalised() if reweight == "normalised" else given.bank
        self.temperature, self.positive = temperature, positive
        self.anchoring = Anchoring(
            self.bank, dim, kind=teacher_projection, refresh=refresh, seed=given.seed + 1
        )
        self.cycle = max(self.anchoring.refresh, 1)
        width = self.anchoring.width
        self.student_projection = Projection(given.student.num_features, width, seed=given.seed)
        self.anchors = OverAnchors(
            self.bank, negatives, normaliser, sampled=estimator == "sampled", balanced=balanced
        )
        self.contrast: TwoMemories | None = None
        if estimator == "memory":
            self.contrast = TwoMemories(
                self.bank, width, negatives, normaliser, temperature=temperature, seed=given.seed
            )

    def begin(self) -> None:
        """The teacher's projection trains in this step, or rests."""
        self.anchoring.advance()

    def forward(self, step: Step) -> PerSample:
        """The loss as it is: the teacher's weights belong to its pairs."""
        return self.losses(step)

    def losses(self, step: Step) -> PerSample:
        """The contrastive loss of the attacked batch."""
        batch, features = step.batch, step.student_adv_features
        own = self.bank.rows(batch.index, device=features.device)
        view_BD = step.teacher_features if self.positive == "view" else None
        weighted = self.reweight != "none"
        with torch.autocast(features.device.type, enabled=False):
            s_BE = self.student_projection(features.float())
            stored_BE = self.anchoring.current(own.features_MD.float())
            t_BE = stored_BE if view_BD is None else self.anchoring.current(view_BD)
            anchors = self.anchors.draw(step.generator, s_BE.device)
            pairs = self.anchoring.pairs(s_BE, t_BE, batch, anchors, temperature=self.temperature)
            if not self.anchors.balanced:
                bound = info_nce_bound_of(pairs, stored_BE)
                step.logs |= {"mi": bound.nats, "mi_ceiling": bound.ceiling}
            if self.contrast is None:
                loss: PerSample = self.anchors(pairs, batch, own, anchors, weighted=weighted)
            else:
                weights_M = self.bank.weights_M if weighted else None
                loss = self.contrast(s_BE, t_BE, batch, step.generator, weights_M)
        return loss + self.anchoring.idle()

    def predictor(self, student: Backbone) -> Callable[[Images], Logits]:
        """The class whose mean teacher embedding is nearest: what features alone can answer."""
        project, T = self.student_projection, self.temperature
        centre_KE = self.anchoring.class_means(student.num_classes, project.linear.weight.device)
        return lambda x: project(student.forward_features(x)) @ centre_KE.T / T

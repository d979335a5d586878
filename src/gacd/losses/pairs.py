"""Student and teacher side by side: a batch, its positives, and the anchors at hand."""

import math
from typing import NotRequired, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gacd.errors import UserError
from gacd.losses.checks import check_constant, check_length
from gacd.losses.fused import Others, Scores, at_least_float32, log_sum_exp, softplus_sum
from gacd.shapes import Labels, PerSample

Embeddings = Float[Tensor, "B E"]
AnchorFeatures = Float[Tensor, "M _"]
"""[M, E], of length 1, or raw teacher features [M, D] beside a projection."""
AnchorLabels = Int[Tensor, " M"]
AnchorWeights = Float[Tensor, " M"]
ProjectionWeight = Float[Tensor, "E D"]
ProjectionBias = Float[Tensor, " E"]


class Projected(TypedDict):
    """What every estimate over anchors can be told; after "default", what holds if it is not.

    projection_weight_ED: linear projection of raw anchors; default: they are embeddings already.
    projection_bias_E: the projection's bias; default: none.
    temperature: T, a number that is not learnt; default: 0.1.
    dataset_size: N, how many anchors those at hand stand for; default: their own number.
    """

    projection_weight_ED: NotRequired[ProjectionWeight | None]
    projection_bias_E: NotRequired[ProjectionBias | None]
    temperature: NotRequired[float]
    dataset_size: NotRequired[int | None]


class Setting(Projected):
    """The same, and which anchors are an image's own.

    index_B: the images' rows in the data set; no anchor is an image's own if not given.
    anchor_index_M: the anchors' rows in the data set; 0 to M - 1, the whole bank in order. Beside
        `index_B` it has to be given where the anchors are fewer than `dataset_size`.
    """

    index_B: NotRequired[Int[Tensor, " B"] | None]
    anchor_index_M: NotRequired[Int[Tensor, " M"] | None]


class Pairs:
    """Every pair of an image and an anchor. The estimates made of it share the projected anchors.

    The functions of `losses.contrastive` and `losses.information` make one estimate each. Raises a
    UserError on a temperature that is not positive, on shapes that do not fit, and where a constant
    (temperature, anchors) asks for a gradient.
    """

    def __init__(
        self,
        student_BE: Embeddings,
        positive_BE: Embeddings,
        anchors_MD: AnchorFeatures,
        *,
        index_B: Int[Tensor, " B"] | None = None,
        anchor_index_M: Int[Tensor, " M"] | None = None,
        projection_weight_ED: ProjectionWeight | None = None,
        projection_bias_E: ProjectionBias | None = None,
        temperature: float = 0.1,
        dataset_size: int | None = None,
    ) -> None:
        images, anchors = len(student_BE), len(anchors_MD)
        if images == 0:
            raise UserError("student_BE holds no image")
        if positive_BE.shape != student_BE.shape:
            raise UserError(
                f"positive_BE is {list(positive_BE.shape)}, but student_BE {list(student_BE.shape)}"
            )
        check_length(images, "images", index_B=index_B)
        check_length(anchors, "anchors", anchor_index_M=anchor_index_M)
        self.scores = Scores(
            student_BE, anchors_MD, projection_weight_ED, projection_bias_E, temperature=temperature
        )
        self.size = anchors if dataset_size is None else dataset_size
        if self.size < 1:
            raise UserError(f"dataset_size must be at least 1, not {self.size}")
        if index_B is not None and anchor_index_M is None and self.size != anchors:
            raise UserError(
                f"{anchors} anchors are not the {self.size} of the whole bank in order: say with "
                "anchor_index_M which rows they are"
            )
        if anchor_index_M is not None and index_B is None:
            raise UserError("anchor_index_M tells an image's own anchors: give index_B, too")
        self.positive_B = self.scores_of(positive_BE)
        self.own = None if index_B is None else Others(index_B, anchor_index_M, len(anchors_MD))
        self._constant: tuple[Tensor, Tensor] | None = None

    def scores_of(self, embeddings_BE: Embeddings) -> PerSample:
        """t_i.s_i/T, of the images with an embedding each."""
        student_BE, wide = self.scores.student_BE, at_least_float32
        return (wide(student_BE) * wide(embeddings_BE)).sum(1) / self.scores.temperature

    def log_sum_exp(self) -> tuple[PerSample, PerSample]:
        """log sum_j e^{t_j.s_i/T} over the anchors not image i's own, and their number."""
        if torch.is_grad_enabled():
            return log_sum_exp(self.scores, self.own)
        if self._constant is None:
            self._constant = log_sum_exp(self.scores, self.own)
        return self._constant

    def log_partition(self) -> PerSample:
        """See `losses.contrastive.log_partition`."""
        lse_B, terms_B = self.log_sum_exp()
        if self.own is None:
            return lse_B + math.log(self.size) - terms_B.log()
        log_mean_B = lse_B - terms_B.clamp(min=1).log()
        return torch.logaddexp(self.positive_B, log_mean_B + math.log(max(self.size - 1, 1)))

    def gacd_loss(
        self,
        *,
        labels_B: Labels,
        anchor_labels_M: AnchorLabels,
        weights_B: PerSample | None = None,
        anchor_weights_M: AnchorWeights | None = None,
        negatives: int = 16384,
        log_z: Float[Tensor, ""] | float | None = None,
        z_gradient: bool = False,
    ) -> PerSample:
        """See `losses.contrastive.gacd_loss`."""
        if negatives < 1:
            raise UserError(f"negatives must be at least 1, not {negatives}")
        images, anchors = len(self.positive_B), len(self.scores.anchors_MD)
        check_length(images, "images", labels_B=labels_B, weights_B=weights_B)
        check_length(
            anchors, "anchors", anchor_labels_M=anchor_labels_M, anchor_weights_M=anchor_weights_M
        )
        check_constant(anchor_weights_M=anchor_weights_M)
        if log_z is None:
            with torch.set_grad_enabled(z_gradient and torch.is_grad_enabled()):
                log_z = self.log_partition()
        elif isinstance(log_z, Tensor) and log_z.shape != ():
            raise UserError(f"log_z is one constant, not {list(log_z.shape)}")
        shift_B = self.scores.zeros() + math.log(negatives / self.size)
        offset_B = (log_z + shift_B).to(self.scores.wide)
        others = Others(labels_B, anchor_labels_M, len(self.scores.anchors_MD))
        sum_B, terms_B = softplus_sum(self.scores, offset_B, others, anchor_weights_M)
        loss_B = F.softplus(offset_B - self.positive_B)
        if weights_B is not None:
            loss_B = weights_B * loss_B
        return loss_B + sum_B * (negatives / terms_B.clamp(min=1))

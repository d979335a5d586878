"""The GACD estimate, InfoNCE and CRD's NCE: plain tensors in, one loss per image out.

Notation: s_i is the student's embedding of image i, t_j the teacher's of anchor j, both of length
1; T a temperature, N the size of the data set the anchors stand for, k the negatives per positive:

    h_ij = sigmoid(t_j.s_i / T - log Z_i - log(k / N))      the estimated q(C=1 | t_j, s_i)

The anchors are whatever the caller has at hand: all N of a bank (the estimator `exact`) or some
drawn from it (`sampled`). They come ready, [M, E] of length 1, or as raw teacher features [M, D]
with the weights of a linear projection, which is then applied, normalised and differentiated as
part of the loss; the anchors themselves are constants. Products are computed in the anchors' dtype
(float16 ones are widened, and bfloat16 ones on processors that are slow with them), all that
follows in float32 at least, under any autocast. The [B, M] matrix of scores is never formed
(`fused`).
"""

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gacd.errors import UserError
from gacd.losses.checks import check_length, check_temperature
from gacd.losses.fused import at_least_float32, product_dtype
from gacd.losses.pairs import (
    AnchorFeatures,
    AnchorLabels,
    AnchorWeights,
    Embeddings,
    Pairs,
    ProjectionBias,
    ProjectionWeight,
    Setting,
)
from gacd.shapes import Labels, PerSample


def gacd_loss(
    student_BE: Embeddings,
    positive_BE: Embeddings,
    anchors_MD: AnchorFeatures,
    *,
    labels_B: Labels,
    anchor_labels_M: AnchorLabels,
    weights_B: PerSample | None = None,
    anchor_weights_M: AnchorWeights | None = None,
    negatives: int = 16384,
    log_z: Float[Tensor, ""] | float | None = None,
    z_gradient: bool = False,
    **setting: Unpack[Setting],
) -> PerSample:
    """Minus the weighted log-likelihood of the pairs of each image (Eq. 9 and 10), in nats.

    l_i = - w_i log h_ii - k mean_{j: y_j != y_i} [ w_j log(1 - h_ij) ]

    The mean runs over the anchors at hand that are of another class than image i and is divided by
    their number, not by their weights; without any, the term is 0. Anchors drawn uniformly from a
    bank give an unbiased estimate of the loss over the whole bank for any fixed Z.

    Without labels, give image indices as both sorts of labels: negatives are then other instances.

    Args:
        student_BE: embeddings of the images, of length 1.
        positive_BE: the teacher's embeddings of the same images, of length 1.
        anchors_MD: the teacher's embeddings [M, E], or raw features [M, D] with a projection.
        labels_B: classes of the images.
        anchor_labels_M: classes of the anchors.
        weights_B: w_i, the teacher's probability of the image's true class; 1 if not given.
        anchor_weights_M: w_j of the anchors; 1 if not given.
        negatives: k.
        log_z: log Z, one constant for all images: 0 is the formula as printed, a
            `gacd.memory.Normaliser` keeps CRD's. None is `log_partition`, each image its own.
        z_gradient: whether the gradient runs through `log_partition` as well.
        setting: rows, projection, temperature, size of the data set: see `losses.pairs`.

    Raises:
        UserError: on a temperature or a k that is not positive, on shapes that do not fit, or where
            a gradient is asked of anchors, their weights or the temperature, which are constants.

    Only first derivatives exist, and torch.func's transforms do not apply. Source: Bai et al. 2020
    (arXiv:2009.09922), Eq. 7 to 10, and "Estimation Model h" for h, which has no Z there.
    """
    return Pairs(student_BE, positive_BE, anchors_MD, **setting).gacd_loss(
        labels_B=labels_B,
        anchor_labels_M=anchor_labels_M,
        weights_B=weights_B,
        anchor_weights_M=anchor_weights_M,
        negatives=negatives,
        log_z=log_z,
        z_gradient=z_gradient,
    )


def info_nce(
    student_BE: Embeddings,
    positive_BE: Embeddings,
    anchors_MD: AnchorFeatures,
    **setting: Unpack[Setting],
) -> PerSample:
    """InfoNCE of each image over the anchors, in nats: l_i = log Z_i - t_i.s_i / T.

    Z_i is `log_partition`'s, gradient included; the arguments are those of `gacd_loss`.

    Source: van den Oord et al. 2018 (arXiv:1807.03748), Eq. 4.
    """
    pairs = Pairs(student_BE, positive_BE, anchors_MD, **setting)
    return pairs.log_partition() - pairs.positive_B


def log_partition(
    student_BE: Embeddings,
    positive_BE: Embeddings,
    anchors_MD: AnchorFeatures,
    **setting: Unpack[Setting],
) -> PerSample:
    """log Z_i, Z_i the sum of e^{t.s_i/T} over the data set, as estimated from the anchors.

    Z_i = e^{t_i.s_i/T} + (N - 1) mean_{j != i} e^{t_j.s_i/T}     where rows are known
    Z_i = N mean_j e^{t_j.s_i/T}                                  where they are not

    e^{t_i.s_i/T} / Z_i is then a softmax over the data set. With `index_B` an image's own anchor is
    told from the others (`anchor_index_M` defaults to 0 to M - 1, the whole bank in order) and the
    positive stands in for it, so a sample of anchors need not contain it. All anchors at hand, N of
    them, give Z itself. Arguments and errors are those of `gacd_loss`.
    """
    return Pairs(student_BE, positive_BE, anchors_MD, **setting).log_partition()


def nce(
    query_BE: Embeddings,
    candidates_BJE: Float[Tensor, "B J E"],
    *,
    dataset_size: int,
    log_z: Float[Tensor, ""] | float,
    weights_BJ: Float[Tensor, "B J"] | None = None,
    temperature: float = 0.07,
) -> PerSample:
    """CRD's NCE: every image has candidates of its own, the first its positive; in nats.

    l_i = - w_i0 log h_i0 - sum_{j=1..k} w_ij log(1 - h_ij),    k = J - 1

    `weights_BJ` are those of the pairs, which are the teacher's: w_i where it is the query, w_j
    where it is the candidate. `crd_nce` adds the two up: GACD's estimator `memory`.

    Raises UserError without a negative, for a temperature that is not positive, or for shapes that
    do not fit. Source: Tian et al. 2020 (arXiv:1910.10699), Eq. 17 and 18, without the 1e-7 of its
    code.
    """
    if query_BE.shape != candidates_BJE.shape[::2]:
        raise UserError(
            f"candidates are [B, J, E] for queries [B, E], not {list(candidates_BJE.shape)} for "
            f"{list(query_BE.shape)}"
        )
    if candidates_BJE.shape[1] < 2:
        raise UserError("nce needs a positive and at least one negative of each image")
    if dataset_size < 1:
        raise UserError(f"dataset_size must be at least 1, not {dataset_size}")
    if weights_BJ is not None and weights_BJ.shape != candidates_BJE.shape[:2]:
        raise UserError(
            f"weights_BJ is {list(weights_BJ.shape)}, but the candidates are "
            f"{list(candidates_BJE.shape[:2])}"
        )
    check_temperature(temperature)
    if candidates_BJE.dtype == torch.float16:
        candidates_BJE = candidates_BJE.float()
    with torch.autocast(query_BE.device.type, enabled=False):
        query_BE1 = query_BE.to(candidates_BJE.dtype)[:, :, None]
        scores_BJ = torch.bmm(candidates_BJE, query_BE1)[:, :, 0]
    k = candidates_BJE.shape[1] - 1
    logits_BJ = at_least_float32(scores_BJ) / temperature - log_z - math.log(k / dataset_size)
    signs_J = torch.ones(k + 1, dtype=logits_BJ.dtype, device=logits_BJ.device)
    signs_J[:1] = -1  # a slice: one place would be written from the host, which waits
    losses_BJ = F.softplus(signs_J * logits_BJ)
    return (losses_BJ if weights_BJ is None else weights_BJ * losses_BJ).sum(1)


def crd_nce(
    student_BE: Embeddings,
    teacher_BE: Embeddings,
    student_memory_BJE: Float[Tensor, "B J E"],
    teacher_memory_BJE: Float[Tensor, "B J E"],
    *,
    dataset_size: int,
    student_log_z: Float[Tensor, ""],
    teacher_log_z: Float[Tensor, ""],
    weights_B: PerSample | None = None,
    weights_BJ: Float[Tensor, "B J"] | None = None,
    temperature: float = 0.07,
) -> PerSample:
    """CRD's two-sided loss: student against teacher memory, plus teacher against student memory.

    l_i = nce(s_i, teacher memory) + nce(t_i, student memory)

    The weights are the teacher's: `weights_B` of its queries, `weights_BJ` of its memory's rows.

    Source: Tian et al. 2020 (arXiv:1910.10699), Eq. 18 and the text below it.
    """
    check_length(len(student_BE), "images", weights_B=weights_B)
    student_B = nce(
        student_BE,
        teacher_memory_BJE,
        dataset_size=dataset_size,
        log_z=student_log_z,
        weights_BJ=weights_BJ,
        temperature=temperature,
    )
    teacher_B = nce(
        teacher_BE,
        student_memory_BJE,
        dataset_size=dataset_size,
        log_z=teacher_log_z,
        temperature=temperature,
    )
    return student_B + (teacher_B if weights_B is None else weights_B * teacher_B)


@torch.no_grad()
def project_anchors(
    features_MD: Float[Tensor, "M D"],
    weight_ED: ProjectionWeight | None,
    bias_E: ProjectionBias | None = None,
) -> Float[Tensor, "M E"]:
    """normalize(features W' + b), without gradient, in the features' dtype: a frozen projection.

    Without W: normalize(features). Products are float32's where those of the dtype are slow.
    """
    if weight_ED is None:
        return F.normalize(features_MD, dim=1)
    dtype = product_dtype(features_MD)
    bias = None if bias_E is None else bias_E.to(dtype)
    projected_ME = F.linear(features_MD.to(dtype), weight_ED.to(dtype), bias)
    return F.normalize(projected_ME, dim=1).to(features_MD.dtype)

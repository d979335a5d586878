"""Lower bounds on the mutual information between teacher's and student's features, in nats.

Monitors, apart from the loss: without weights, over anchors of every class, without gradient. The
loss itself bounds nothing (weights below 1 bring its logarithms, which are negative, nearer to 0,
and its negatives are not drawn from the product of the marginals).
"""

import math
from typing import NamedTuple, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gacd.losses.pairs import AnchorFeatures, Embeddings, Pairs, Projected, Setting
from gacd.shapes import Scalar


class Bound(NamedTuple):
    """A lower bound and the most it can ever say, in nats."""

    nats: Scalar
    ceiling: Scalar


def info_nce_bound(
    student_BE: Embeddings,
    positive_BE: Embeddings,
    anchors_MD: AnchorFeatures,
    **setting: Unpack[Setting],
) -> Bound:
    """InfoNCE's bound over the anchors at hand, whose ceiling is the log of their number.

    MI(t; s) >= E_i [ log n_i + t_i.s_i / T - log sum_j e^{t_j.s_i / T} ]

    The sum runs over the positive and the n_i - 1 anchors that are not the image's own, which
    `index_B` tells (see `losses.contrastive.log_partition`); without it, none is. Any temperature
    gives a bound; the best gives the highest.

    Source: Poole et al. 2019 (arXiv:1905.06922), Eq. 10.
    """
    return info_nce_bound_of(Pairs(student_BE, positive_BE, anchors_MD, **setting))


@torch.no_grad()
def info_nce_bound_of(pairs: Pairs, positive_BE: Embeddings | None = None) -> Bound:
    """`info_nce_bound` of pairs at hand; it shares their partition function with the loss.

    `positive_BE` replace the pairs' own positives where those are of another kind than the anchors:
    features of augmented views differ from those of plain images in ways that have nothing to do
    with the image, so with them there would be no bound.
    """
    lse_B, terms_B = pairs.log_sum_exp()
    positive_B = pairs.positive_B if positive_BE is None else pairs.scores_of(positive_BE)
    log_n_B = (terms_B + 1).log()
    bound_B = log_n_B + positive_B - torch.logaddexp(positive_B, lse_B)
    return Bound(bound_B.mean(), log_n_B.mean())


@torch.no_grad()
def nce_bound(
    student_BE: Embeddings,
    positive_BE: Embeddings,
    anchors_MD: AnchorFeatures,
    *,
    log_z: Float[Tensor, ""] | float,
    index_B: Int[Tensor, " B"],
    anchor_index_M: Int[Tensor, " M"],
    negatives: int = 16384,
    **setting: Unpack[Projected],
) -> Bound:
    """The bound behind the paper's objective, unweighted, negatives of all classes.

    MI(t; s) >= log k + E_i [ log h_ii + k mean_{j != i} log(1 - h_ij) ]

    It holds for every h that does not depend on the anchors, hence the constant `log_z`; the best h
    comes within one nat of the truth as k grows. The ceiling is log k.

    Source: Bai et al. 2020 (arXiv:2009.09922), Eq. 6 and 11 with w = 1.
    """
    loss_B = Pairs(student_BE, positive_BE, anchors_MD, **setting).gacd_loss(
        labels_B=index_B, anchor_labels_M=anchor_index_M, negatives=negatives, log_z=log_z
    )
    ceiling = loss_B.new_tensor(math.log(negatives))
    return Bound(ceiling - loss_B.mean(), ceiling)

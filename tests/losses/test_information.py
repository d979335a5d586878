"""Bounds on the mutual information of correlated Gaussians, which is known: -d/2 log(1 - rho^2).

The log density ratio of a pair is an inner product of [x, x^2, 1] and [y, 1, y^2], suitably scaled,
so the best critic is an embedding.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gacd.losses.contrastive import gacd_loss
from gacd.losses.information import Bound, info_nce_bound, nce_bound
from reference.gacd_eq9 import eq9

DIMENSIONS, RHO = 3, 0.8
TRUTH = -DIMENSIONS / 2 * math.log(1 - RHO**2)
LOG_CONSTANT = math.log(1 - RHO**2) * DIMENSIONS / 2  # log ratio = inner product - this
SLACK = 0.05  # four standard errors of the means below


def embed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    square, cross = -(RHO**2) / (2 * (1 - RHO**2)), RHO / (1 - RHO**2)
    students = torch.cat([cross * x, square * x**2, torch.ones_like(x)], dim=1)
    return students, torch.cat([y, torch.ones_like(y), square * y**2], dim=1)


def gaussians(n: int, anchors: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, noise = torch.randn(2, n, DIMENSIONS, generator=generator)
    students, positives = embed(x, RHO * x + math.sqrt(1 - RHO**2) * noise)
    other = torch.randn(anchors, DIMENSIONS, generator=generator)
    return students, positives, embed(other, other)[1]


def rises_towards_the_truth(bounds: list[Bound], gap: float) -> None:
    values = [float(bound.nats) for bound in bounds]
    assert all(value <= TRUTH + SLACK for value in values), (values, TRUTH)
    assert all(v <= float(bound.ceiling) for v, bound in zip(values, bounds, strict=True))
    assert all(lower < higher for lower, higher in pairwise(values)), values
    assert values[-1] > TRUTH - gap, (values, TRUTH)


def test_info_nce_stays_below_the_truth_and_tightens(generator: torch.Generator) -> None:
    def bound(n: int) -> Bound:
        """The mean over independent sets of n - 1 anchors with 100 images each."""
        parts = [
            info_nce_bound(*gaussians(100, n - 1, generator), temperature=1.0) for _ in range(100)
        ]
        return Bound(torch.stack([part.nats for part in parts]).mean(), parts[0].ceiling)

    rises_towards_the_truth([bound(n) for n in (2, 8, 64, 1024)], gap=0.1)


def test_nce_stays_below_the_truth_and_comes_within_a_nat(generator: torch.Generator) -> None:
    students, positives, anchors = gaussians(2000, 20_000, generator)

    def bound(k: int) -> Bound:
        return nce_bound(
            students,
            positives,
            anchors,
            log_z=torch.tensor(math.log(len(anchors)) + LOG_CONSTANT),
            index_B=-torch.arange(1, 2001),  # no image is an anchor
            anchor_index_M=torch.arange(len(anchors)),
            temperature=1.0,
            negatives=k,
        )

    rises_towards_the_truth([bound(k) for k in (1, 4, 64, 4096)], gap=1.1)


def test_a_wrong_critic_only_loosens_the_bounds(generator: torch.Generator) -> None:
    students, positives, anchors = gaussians(2000, 1000, generator)
    best = info_nce_bound(students, positives, anchors, temperature=1.0)
    worse = info_nce_bound(students, positives, anchors, temperature=0.3)
    assert worse.nats < best.nats - 0.1


def test_own_anchors_count_once(generator: torch.Generator) -> None:
    students, positives, anchors = gaussians(5, 20, generator)
    students.requires_grad_()  # a bound is a figure, not a loss
    bank = torch.cat([positives, anchors])
    expected = info_nce_bound(students[:1], positives[:1], bank[1:], temperature=1.0)
    got = info_nce_bound(
        students[:1], positives[:1], bank, index_B=torch.zeros(1).long(), temperature=1.0
    )
    torch.testing.assert_close(got, expected)
    assert got.ceiling == pytest.approx(math.log(25))
    index_M = torch.arange(25)
    other = nce_bound(
        students, positives, bank, log_z=torch.zeros(()), index_B=index_M[:5],
        anchor_index_M=index_M, temperature=1.0, negatives=64,
    )  # fmt: skip
    ones = torch.ones(25)
    loss_B = eq9(
        students.detach(), positives, bank, index_M[:5], index_M, ones[:5], ones, [0.0] * 5, 64, 25,
        1.0,
    )  # fmt: skip
    assert other.ceiling == pytest.approx(math.log(64))
    assert other.nats == pytest.approx(math.log(64) - loss_B.mean().item(), rel=1e-4)
    assert not got.nats.requires_grad and not other.nats.requires_grad


def test_the_weighted_form_printed_as_eq_11_is_no_bound(generator: torch.Generator) -> None:
    """With weights near 0 it claims log k nats between features that share nothing at all."""
    students, positives, anchors = gaussians(200, 1000, generator)
    independent = positives[torch.randperm(200, generator=generator)]
    k = 1000
    claimed = math.log(k) - gacd_loss(
        students,
        independent,
        anchors,
        labels_B=-torch.ones(200).long(),
        anchor_labels_M=torch.zeros(1000).long(),
        weights_B=torch.zeros(200),
        anchor_weights_M=torch.zeros(1000),
        temperature=1.0,
        negatives=k,
        log_z=torch.tensor(math.log(1000) + LOG_CONSTANT),
    )
    assert claimed.min() == pytest.approx(math.log(k))
    honest = info_nce_bound(students, independent, anchors, temperature=1.0)
    assert honest.nats < SLACK

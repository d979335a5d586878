"""GACD's loss of a batch, from its projections and the pure function."""

import copy
from typing import Any

import torch
from torch import Tensor

from gacd.losses.contrastive import gacd_loss
from methods.world import (
    NEGATIVES,
    TEMPERATURE,
    World,
    attacked,
)


def by_hand(world: World, method: Any, weight: Tensor | None, bias: Tensor | None) -> float:
    """The loss of a method that sees `attacked` images, projected as given."""
    batch, term = world.batch(), method.terms["gacd"]
    with torch.no_grad():
        student = copy.deepcopy(method.student).train()
        s = term.student_projection(student.forward_features(attacked(batch)))
        stored = world.bank.features_MD
        rows = stored if weight is None else stored @ weight.T + bias
        anchors = rows / rows.norm(dim=1, keepdim=True)
    losses = gacd_loss(
        s,
        anchors[batch.index],
        anchors,
        labels_B=batch.labels,
        anchor_labels_M=world.data.labels,
        weights_B=world.bank.weights_M[batch.index],
        anchor_weights_M=world.bank.weights_M,
        index_B=batch.index,
        temperature=TEMPERATURE,
        negatives=NEGATIVES,
    )
    return losses.mean().item()

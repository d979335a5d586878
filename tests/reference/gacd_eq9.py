"""Eq. 7 to 11 as loops over pairs in float64, written from the paper and nothing else."""

import math

import torch
from torch import Tensor


def h(score: float, log_z: float, k: int, size: int, temperature: float) -> float:
    """Eq. 7: the probability that a pair is congruent."""
    ratio = math.exp(score / temperature - log_z)
    return ratio / (ratio + k / size)


def exact_log_z(student_BE: Tensor, anchors_ME: Tensor, temperature: float) -> list[float]:
    """log of the sum over all anchors, for each image."""
    return [
        math.log(sum(math.exp(float(t @ s) / temperature) for t in anchors_ME.double()))
        for s in student_BE.double()
    ]


def eq9(
    student_BE: Tensor,
    positive_BE: Tensor,
    anchors_ME: Tensor,
    labels_B: Tensor,
    anchor_labels_M: Tensor,
    weights_B: Tensor,
    anchor_weights_M: Tensor,
    log_z: list[float],
    k: int,
    size: int,
    temperature: float,
) -> Tensor:
    """Minus Eq. 9: -w_i log h(t_i, s_i) - k E_{j: y_j != y_i}[w_j log(1 - h(t_j, s_i))]."""
    losses = []
    for i, s in enumerate(student_BE.double()):
        positive = float(positive_BE[i].double() @ s)
        loss = -float(weights_B[i]) * math.log(h(positive, log_z[i], k, size, temperature))
        terms = []
        for j, t in enumerate(anchors_ME.double()):
            if int(anchor_labels_M[j]) != int(labels_B[i]):
                probability = h(float(t @ s), log_z[i], k, size, temperature)
                terms.append(float(anchor_weights_M[j]) * math.log(1 - probability))
        if terms:
            loss -= k * sum(terms) / len(terms)
        losses.append(loss)
    return torch.tensor(losses, dtype=torch.float64)


def crd(
    query_BE: Tensor,
    candidates_BJE: Tensor,
    weights_BJ: Tensor,
    log_z: float,
    size: int,
    temperature: float,
) -> Tensor:
    """Eq. 17 of CRD with a pair's weight on each term; the first candidate is the positive."""
    losses = []
    for query, candidates, weights in zip(query_BE, candidates_BJE, weights_BJ, strict=True):
        k = len(candidates) - 1
        probabilities = [h(float(c @ query), log_z, k, size, temperature) for c in candidates]
        loss = -float(weights[0]) * math.log(probabilities[0])
        for weight, probability in zip(weights[1:], probabilities[1:], strict=True):
            loss -= float(weight) * math.log(1 - probability)
        losses.append(loss)
    return torch.tensor(losses, dtype=torch.float64)

"""Random problems for the contrastive losses, in float64."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DOUBLE = torch.float64


def problem(
    batch: int = 5, anchors: int = 23, width: int = 6, classes: int = 4, seed: int = 0
) -> dict[str, Any]:
    """A random problem in float64 whose images are rows of the bank."""
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, width, generator=generator, dtype=DOUBLE), dim=1)

    index_B = torch.randperm(anchors, generator=generator)[:batch]
    anchors_ME = unit(anchors)
    labels_M = torch.randint(classes, (anchors,), generator=generator)
    weights_M = torch.rand(anchors, generator=generator, dtype=DOUBLE)
    return {
        "student_BE": unit(batch),
        "positive_BE": anchors_ME[index_B],
        "anchors_MD": anchors_ME,
        "labels_B": labels_M[index_B],
        "anchor_labels_M": labels_M,
        "weights_B": weights_M[index_B],
        "anchor_weights_M": weights_M,
    }


def raw_problem(width: int = 9, **sizes: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The same with raw anchors, and the projection's weight and bias."""
    p = problem(**sizes)
    generator = torch.Generator().manual_seed(1)
    p["anchors_MD"] = torch.randn(
        len(p["anchors_MD"]), width, generator=generator, dtype=DOUBLE
    ).relu()
    embedding = p["student_BE"].shape[1]
    weight_ED = torch.randn(embedding, width, generator=generator, dtype=DOUBLE)
    return p, weight_ED, torch.randn(embedding, generator=generator, dtype=DOUBLE)

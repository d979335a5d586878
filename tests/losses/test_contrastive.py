import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gacd.losses.contrastive import gacd_loss
from reference.gacd_eq9 import eq9, exact_log_z


def problem(batch: int = 5, anchors: int = 23, width: int = 6, classes: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return F.normalize(
            torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1
        )

    index_B = torch.randperm(anchors, generator=generator)[:batch]
    anchors_ME = unit(anchors)
    anchor_labels_M = torch.randint(classes, (anchors,), generator=generator)
    anchor_weights_M = torch.rand(anchors, generator=generator, dtype=torch.float64)
    return {
        "student_BE": unit(batch),
        "positive_BE": anchors_ME[index_B],
        "anchors_MD": anchors_ME,
        "labels_B": anchor_labels_M[index_B],
        "anchor_labels_M": anchor_labels_M,
        "weights_B": anchor_weights_M[index_B],
        "anchor_weights_M": anchor_weights_M,
    }


@pytest.mark.parametrize("log_z", [None, 0.0, 3.0])
@pytest.mark.parametrize("k", [7, 500])
def test_equals_the_loop_over_eq_9(log_z: float | None, k: int) -> None:
    p = problem()
    z = None if log_z is None else torch.tensor(log_z, dtype=torch.float64)
    loss_B = gacd_loss(**p, temperature=0.3, negatives=k, log_z=z)
    log_zs = exact_log_z(p["student_BE"], p["anchors_MD"], 0.3) if z is None else [log_z] * 5
    expected = eq9(
        p["student_BE"],
        p["positive_BE"],
        p["anchors_MD"],
        p["labels_B"],
        p["anchor_labels_M"],
        p["weights_B"],
        p["anchor_weights_M"],
        log_zs,
        k,
        23,
        0.3,
    )
    torch.testing.assert_close(loss_B, torch.tensor(expected, dtype=torch.float64))

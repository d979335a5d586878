"""What chooses a checkpoint: accuracy on the held-out part of train, clean and under PGD."""

from collections.abc import Callable
from typing import cast

import torch
from lightning_fabric import Fabric

from gacd.attacks.objectives import cross_entropy
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel
from gacd.data.batches import iterate
from gacd.data.dataset import ArrayDataset
from gacd.methods.method import Method
from gacd.models.modes import evaluating


def validate(
    fabric: Fabric,
    method: Method,
    dataset: ArrayDataset,
    threat: ThreatModel,
    *,
    steps: int = 10,
    batch_size: int = 256,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracies (in %) of the method's predictor on `dataset`: clean, and under PGD of `steps`.

    The images are shared out over the ranks and the counts added up.
    """
    predictor = method.predictor
    generator = torch.Generator(dataset.images.device).manual_seed(seed + fabric.global_rank)
    right = torch.zeros(3, dtype=torch.int64, device=dataset.images.device)
    with evaluating(method), fabric.autocast():
        for x, y, _ in iterate(
            dataset,
            batch_size,
            shuffle=False,
            seed=seed,
            epoch=0,
            drop_last=False,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        ):
            attacked = pgd(
                cross_entropy(predictor, y),
                x,
                threat,
                steps=steps,
                step_size=2.5 * threat.eps / steps,
                generator=generator,
            )
            with torch.no_grad():
                right[0] += _right(predictor, x, y)
                right[1] += _right(predictor, attacked, y)
                right[2] += len(y)
    if fabric.world_size > 1:
        right = cast("torch.Tensor", fabric.all_reduce(right, reduce_op="sum"))
    natural, robust, n = right.tolist()
    return {"val_natural": 100 * natural / n, "val_robust": 100 * robust / n}


def _right(
    predictor: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    return (predictor(x).argmax(1) == y).sum()

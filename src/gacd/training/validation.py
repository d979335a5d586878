"""What chooses a checkpoint: accuracy on the held-out part of train, clean and under PGD."""

import torch
from lightning_fabric import Fabric

from gacd.attacks.threat import ThreatModel
from gacd.attacks.validation import count_right
from gacd.data.batches import iterate
from gacd.data.dataset import ArrayDataset
from gacd.methods.method import Method
from gacd.models.modes import evaluating
from gacd.training.ranks import summed


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
    generator = torch.Generator(dataset.images.device).manual_seed(seed + fabric.global_rank)
    batches = iterate(dataset, batch_size, rank=fabric.global_rank, world_size=fabric.world_size)
    with evaluating(method), fabric.autocast():
        right = count_right(method.predictor, batches, threat, steps=steps, generator=generator)
    natural, robust, n = summed(fabric, right).tolist()
    return {"val_natural": 100 * natural / n, "val_robust": 100 * robust / n}

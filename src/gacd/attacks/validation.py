"""How many images are right, clean and under PGD: what every choice on validation images counts."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from gacd.attacks.objectives import cross_entropy
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel
from gacd.shapes import Batch, Images, Labels, Logits


def one_answer(labels: Labels) -> float:
    """Accuracy, in %, of always answering the most frequent class, attacked or not."""
    return 100 * int(labels.bincount().max()) / len(labels)


def count_right(
    predictor: Callable[[Images], Logits],
    batches: Iterable[Batch],
    threat: ThreatModel,
    *,
    steps: int = 10,
    generator: torch.Generator,
) -> Int[Tensor, "3"]:
    """Right without attack, right under PGD of `steps`, and all of them, on the images' device.

    Cross-entropy, a random start drawn with `generator`, steps of 2.5 eps / steps. The predictor's
    mode is the caller's to set; nothing waits for the device.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=generator.device)
    for x, y, _ in batches:
        attacked = pgd(
            cross_entropy(predictor, y),
            x,
            threat,
            steps=steps,
            step_size=2.5 * threat.eps / max(steps, 1),
            generator=generator,
        )
        with torch.no_grad():
            counts[0] += (predictor(x).argmax(1) == y).sum()
            counts[1] += (predictor(attacked).argmax(1) == y).sum()
            counts[2] += len(y)
    return counts

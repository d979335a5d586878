"""A few test images under attack, with the model's answers: something to look at, not a figure."""

import base64
from typing import Any

import torch
from torch import Tensor

from gacd.attacks.objectives import cross_entropy
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel
from gacd.data.dataset import ArrayDataset
from gacd.evaluation.batches import batch_seed
from gacd.models.base import Backbone
from gacd.models.modes import evaluating
from gacd.shapes import Images


def attacked_examples(
    model: Backbone,
    dataset: ArrayDataset,
    *,
    threat: ThreatModel,
    step_size: float | None = None,
    steps: int = 20,
    count: int = 6,
    seed: int = 0,
) -> dict[str, Any]:
    """The first image of each of the first `count` classes, clean and under PGD, as JSON.

        {shape: [n, H, W, C], clean, attacked: base64 of that many bytes,
         truth: [n names], answers: {clean: [n names], attacked: [n names]}}

    Which images these are depends on the data alone, so any two models show the same ones. The
    answers are those to the attacked images themselves; their bytes are rounded, for the eye.
    `step_size` is in the units of eps, a quarter of it by default, as in `evaluate`.
    """
    rows = _first_of_each_class(dataset, count)
    device = next(model.parameters()).device
    x, labels = dataset.float_images(rows).to(device), dataset.labels[rows].to(device)
    with evaluating(model), torch.autocast(device.type, enabled=False):
        x_adv = pgd(
            cross_entropy(model, labels),
            x,
            threat,
            steps=steps,
            step_size=threat.step(step_size),
            generator=torch.Generator(device).manual_seed(batch_seed(seed, "examples")),
        )
        with torch.no_grad():
            answers = {"clean": model(x).argmax(1), "attacked": model(x_adv).argmax(1)}

    def names(classes: Tensor) -> list[str]:
        return [dataset.classes[k] for k in classes.tolist()]

    n, channels, height, width = x.shape
    return {
        "shape": [n, height, width, channels],
        "clean": _bytes(x),
        "attacked": _bytes(x_adv),
        "truth": names(labels),
        "answers": {key: names(classes) for key, classes in answers.items()},
    }


def _first_of_each_class(dataset: ArrayDataset, count: int) -> Tensor:
    found = (torch.nonzero(dataset.labels == k).flatten()[:1] for k in range(dataset.num_classes))
    return torch.cat(list(found))[:count]


def _bytes(x: Images) -> str:
    pixels = (255 * x).round().clamp(0, 255).to(torch.uint8)
    return base64.b64encode(pixels.permute(0, 2, 3, 1).cpu().numpy().tobytes()).decode("ascii")

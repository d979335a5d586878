"""AutoAttack (Croce & Hein 2020) as pyautoattack runs it: standard version, resumable by the batch.

The verdict on each image is that of one direct call of pyautoattack with the same seed and batch
size. We only take over its outer loop (attack by attack, survivors in batches), so that every batch
can be remembered. It seeds each of them itself, so none depends on where a run was interrupted.
"""

import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gacd.attacks.pgd import check_range
from gacd.attacks.threat import ThreatModel
from gacd.errors import UserError
from gacd.evaluation.batches import (
    assert_within,
    chunks,
    from_bits,
    is_right,
    shared_out,
    to_bits,
)
from gacd.evaluation.statistics import binomial_interval
from gacd.models.modes import evaluating
from gacd.randomness import global_randomness_kept
from gacd.ranks import ALONE, Ranks

_NORMS: dict[str, Literal["Linf", "L2"]] = {"linf": "Linf", "l2": "L2"}
_LOGGER = "auto-attack"
_SQUARE_SUSPICION = 0.2  # percent of the images that Square may add: pyautoattack's own limit


@dataclass(frozen=True)
class AutoAttackResult:
    """`robust[i]`: image i survived. `after`: accuracy in percent once each attack had run.

    `targets`: classes that each targeted attack tried. `notes`: pyautoattack's warnings and ours.
    """

    robust: Bool[Tensor, " n"]
    after: dict[str, float]
    targets: int
    notes: Sequence[str]
    seconds: float


def standard_attacks(num_classes: int) -> tuple[str, ...]:
    """The standard version's attacks, as far as the number of classes allows.

    The targeted DLR loss divides by a difference of the four largest logits, the untargeted one of
    three: with 3 classes apgd-dlr stands in for apgd-t, with 2 there is neither.
    """
    if num_classes < 2:
        raise UserError(f"AutoAttack needs at least 2 classes, not {num_classes}")
    dlr = {2: (), 3: ("apgd-dlr",)}.get(num_classes, ("apgd-t",))
    return ("apgd-ce", *dlr, "fab-t", "square")


def autoattack(
    model: nn.Module,
    images: Float[Tensor, "n C H W"],
    labels: Int[Tensor, " n"],
    *,
    num_classes: int,
    threat: ThreatModel,
    batch_size: int = 256,
    seed: int = 0,
    cache: Path | str | None = None,
    show_progress: bool = True,
    ranks: Ranks = ALONE,
) -> AutoAttackResult:
    """Run standard AutoAttack on images in [0, 1] (n C H W), on the model's device, in float32.

    Targeted attacks try min(9, num_classes - 1) classes. With `cache` every finished batch is
    written there and taken up again; that folder must belong to these images and settings alone.
    Several `ranks` share the batches of each attack out.
    Raises UserError for no images or images out of [0, 1], fewer than 2 classes or another number
    than the model's, eps 0, or l_2 on images smaller than 5 pixels.
    """
    cache = None if cache is None else Path(cache)
    names = standard_attacks(num_classes)
    check_autoattack(images, threat)
    targets = min(9, num_classes - 1)
    device = next(model.parameters(), images).device
    robust = torch.zeros(len(images), dtype=torch.bool)
    after: dict[str, float] = {}
    notes: dict[str, None] = {}
    seconds = 0.0

    def on_device(rows: Tensor) -> tuple[Tensor, Tensor]:
        # pyautoattack reshapes with view: it needs plain NCHW.
        x = images[rows.to(images.device)].to(device).contiguous()
        return x, labels[rows.to(labels.device)].to(device).long()

    with evaluating(model), torch.autocast(device.type, enabled=False):
        with torch.no_grad():
            found = model(on_device(torch.arange(min(1, len(images))))[0])
        if found.dim() != 2 or found.shape[1] != num_classes:
            raise UserError(
                f"the model gives {list(found.shape)} for an image, not num_classes={num_classes} "
                "logits"
            )
        for _, rows in chunks(torch.arange(len(images)), batch_size):
            robust[rows] = is_right(model, *on_device(rows)).cpu()
        for name in names:

            def attack(_: int, rows: Tensor, name: str = name) -> dict[str, Any]:
                x, y = on_device(rows)
                return _attack_batch(model, x, y, name, threat, targets, seed)

            batches = list(chunks(robust.nonzero().flatten(), batch_size))
            found = shared_out(
                batches,
                attack,
                folder=cache and cache / name,
                ranks=ranks,
                name=f"autoattack {name}",
                show_progress=show_progress,
            )
            for (_, rows), value in zip(batches, found, strict=True):
                robust[rows] = from_bits(value["robust"])
                notes |= dict.fromkeys(value["notes"])
                seconds += value["seconds"]
            after[name] = 100.0 * int(robust.sum()) / len(robust)

    # One image of 100 is more than the limit and shows nothing: the interval's lower end decides.
    added = round((list(after.values())[-2] - after["square"]) * len(robust) / 100)
    if binomial_interval(added, len(robust))[0] > _SQUARE_SUSPICION:
        notes[
            f"Square broke {added} of {len(robust)} images that the gradient attacks could not: "
            "suspect masked gradients"
        ] = None
    return AutoAttackResult(robust, after, targets, list(notes), seconds)


def _attack_batch(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    name: str,
    threat: ThreatModel,
    targets: int,
    seed: int,
) -> dict[str, Any]:
    start = time.perf_counter()
    with _isolated(x.device) as notes:
        from pyautoattack import AutoAttack

        adversary = AutoAttack(
            model, norm=_NORMS[threat.norm], eps=threat.eps, seed=seed, device=x.device
        )
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
        adversary.attacks_to_run = [name]
        x_adv, answers = adversary.run_standard_evaluation(x, labels, batch_size=len(x))
    assert_within(threat, x_adv, x)
    return {
        "robust": to_bits(answers == labels),
        "notes": notes,
        "seconds": time.perf_counter() - start,
    }


@contextmanager
def _isolated(device: torch.device) -> Iterator[list[str]]:
    """Undo what pyautoattack does globally (seeds, tracing, logging); collect what it warns of."""
    notes: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if note := _note(record.getMessage()):
                notes.append(note)

    logger = logging.getLogger(_LOGGER)
    before = logger.handlers, logger.propagate, logger.level
    tracer = sys.gettrace()
    try:
        logger.handlers, logger.propagate = [Collect(logging.WARNING)], False
        logger.setLevel(logging.WARNING)
        with global_randomness_kept(device):
            yield notes
    finally:
        logger.handlers, logger.propagate = before[0], before[1]
        logger.setLevel(before[2])
        sys.settrace(tracer)


def _note(message: str) -> str | None:
    """A warning without its counts, so that it reads the same from every batch."""
    if message.startswith("with only"):  # said of any 3-class model, also for what does run on it
        return None
    if "zero gradient" in message:
        return "some images had a gradient of exactly zero"
    return re.sub(r"\s*See \S+ for details\.$", "", message)


def check_autoattack(images: Tensor, threat: ThreatModel) -> None:
    """Raise UserError where AutoAttack cannot run on images [n, C, H, W]."""
    if threat.eps == 0:
        raise UserError("AutoAttack needs an eps above 0; for eps 0 ask for 'natural'")
    if threat.norm == "l2" and min(images.shape[-2:]) < 5:
        raise UserError(
            "l_2 AutoAttack needs images of at least 5 pixels a side, "
            f"not {images.shape[-2]}x{images.shape[-1]}"
        )
    if len(images) == 0:
        raise UserError("AutoAttack needs at least one image")
    if images.is_floating_point():
        check_range(images)

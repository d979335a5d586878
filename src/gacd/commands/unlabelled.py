"""Images without labels: read, freed of what the data hold already, answered by the teacher."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gacd import build
from gacd.commands.training import TrainingRun
from gacd.data.dataset import ArrayDataset, Splits
from gacd.data.folder import read_pictures
from gacd.errors import UserError
from gacd.evaluation.robust import answers
from gacd.models.base import Backbone
from gacd.shapes import PixelArray
from gacd.storage import load_tensors, save_tensors

_ANSWERS = "unlabelled.safetensors"


def read_unlabelled(run: TrainingRun, source: Path) -> PixelArray:
    """The images of a folder or an .npz that no part of the data has, as these are: [U, C, S, S].

    Raises UserError where the training images are not in memory, or none is left.
    """
    train = run.splits.train
    if not isinstance(train, ArrayDataset):
        raise UserError("unlabelled images are read into memory: leave data.stream out")
    pixels = read_pictures(source, size=train.size, channels=train.channels)
    test = run.test
    if run.cfg.data.test_limit is not None:  # others may be measured on later
        every = replace(run.cfg.data, test_limit=None, size=train.size)
        test = build.test_part(every).in_colour(train.channels)
    parts = {"train": train, "validation": run.splits.val, "test": test}
    known: dict[bytes, str] = {}
    for name, part in parts.items():
        known |= dict.fromkeys(_digests(part.images), name)
    places = [known.get(digest) for digest in _digests(pixels)]
    kept = torch.tensor([place is None for place in places])
    if not kept.all():
        found = ", ".join(f"{places.count(name):,} in {name}" for name in parts if name in places)
        run.note(f"unlabelled images that the data have are left out: {found}")
    if not kept.any():
        raise UserError(f"{source}: no image that the data have not: give others as unlabelled")
    return pixels[kept]


def _digests(images: Iterable[Tensor]) -> list[bytes]:
    return [hashlib.blake2b(image.numpy().tobytes()).digest() for image in images]


def answered(run: TrainingRun, pixels: PixelArray, teacher: Backbone) -> Splits:
    """The data with more training images, each of the class that the teacher answers.

    The answers are kept in the run's folder: a run goes on with those that it began with.
    """
    train, path = run.splits.train, run.cfg.out / _ANSWERS
    assert isinstance(train, ArrayDataset)  # or they could not be read
    nothing = torch.zeros(len(pixels), dtype=torch.int64)
    unlabelled = replace(train, images=pixels, labels=nothing)
    images = unlabelled.fingerprint()
    if run.fabric.is_global_zero and not path.is_file():
        save_tensors(path, {"labels": answers(teacher, unlabelled)}, {"images": images})
    run.fabric.barrier()
    tensors, meta = load_tensors(path, kept=False)
    if meta.get("images") != images:
        raise UserError(
            f"{path} is of other unlabelled images: give those again, or choose another --out"
        )
    labels = tensors["labels"]
    counts = torch.bincount(labels, minlength=train.num_classes)
    most = int(counts.argmax())
    run.note(
        f"{len(pixels):,} unlabelled images: the teacher answers {int((counts > 0).sum())} of "
        f"{train.num_classes} classes, most often {train.classes[most]} "
        f"({100 * int(counts[most]) / len(pixels):.0f} %)"
    )
    both = torch.cat([train.images, pixels]), torch.cat([train.labels, labels])
    return replace(run.splits, train=replace(train, images=both[0], labels=both[1]))

"""One door to every data set: train, validation and test part by name."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gacd.data.dataset import ArrayDataset, Splits, one_spelling
from gacd.data.folder import read_folder, read_test_folder
from gacd.data.images import resize
from gacd.data.readers import STREAMED, read_streamed
from gacd.data.sources import TORCHVISION, read_digits, read_torchvision
from gacd.data.split import stratified
from gacd.data.streamed import StreamedDataset
from gacd.errors import UserError, unknown

NAMES = ("digits", *TORCHVISION, *STREAMED)
Part = ArrayDataset | StreamedDataset
_SIZES = {"stl10": 32}  # default side in pixels where it is not the data's own
_TEST_SEED = 0  # constant, so that every model is tested on the same images


def load_splits(
    name: str,
    *,
    root: Path | str | None = None,
    title: str | None = None,
    size: int | None = None,
    classes: Sequence[str] | None = None,
    val_fraction: float = 0.1,
    train_limit: int | None = None,
    test_limit: int | None = None,
    stream: bool = False,
    workers: int = 0,
    seed: int,
) -> Splits:
    """The train, validation and test part of the data set `name`, one of `NAMES`.

    The validation part, `val_fraction` of the original training set, is carved from it first;
    `train_limit` and `test_limit` then keep at most so many images of what they name. All choices
    are stratified and keep the images' order. Validation and training part depend on `seed`, the
    test part never does: use one seed for a teacher and its students, or the teacher has seen
    their validation images. `size` is the side in pixels that images are resized to (32 for STL-10
    if not given). Only images of `classes` are kept where that is given, relabelled in its order.
    With `stream`, for those of `STREAMED`, training images stay on disk and `workers` processes
    decode them; the two other parts are in memory all the same.
    Raises UserError on bad names, paths, files and numbers.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction must be between 0 and 1, got {val_fraction:g}")
    root = None if root is None else Path(root)
    _check(name, root, size, stream)
    everything, test = (
        _kept(part, classes, title) for part in _read(name, root, size, stream, workers)
    )
    if absent := _without_images(everything):
        present = [name for name in everything.classes if name not in absent]
        raise UserError(
            f"class '{absent[0]}' has no training image: add some, "
            f"or keep the others alone by --data.classes, such as {shlex.join(present[:10])}"
        )
    in_val = stratified(everything.labels, round(len(everything) * val_fraction), seed=seed)
    train = _limit(everything.subset(~in_val), "train_limit", train_limit, seed)
    val = everything.subset(in_val)
    if len(val) == 0:
        raise UserError(
            f"val_fraction {val_fraction:g} of {len(everything)} images is none: raise it"
        )
    if absent := _without_images(train):
        raise UserError(
            f"class '{absent[0]}' has no image left to train on: "
            "add images of it, raise train_limit or lower val_fraction"
        )
    side = size or _SIZES.get(name)
    val = _loaded(val, side)
    train = train if stream else _loaded(train, side)
    return Splits(train, val, _tested(test, test_limit, side))


def load_test(
    name: str,
    *,
    root: Path | str | None = None,
    title: str | None = None,
    size: int | None = None,
    classes: Sequence[str] | None = None,
    test_limit: int | None = None,
    known: Sequence[str] = (),
    few: bool = False,
) -> ArrayDataset:
    """The test part of `load_splits` alone.

    Training images are decoded only to tell whether shards and tables are grey, by a `few` of them
    as a streamed set is. Class folders need none: the classes are then the folders of test/. These
    may lack some of the classes that are `known`, those of a network.
    """
    root = None if root is None else Path(root)
    _check(name, root, size)
    part = _read_test(name, root, size, few)
    if name == "folder":
        part = _by_name(part, one_spelling(known), classes)
    test = _kept(part, classes, title)
    return _tested(test, test_limit, size or _SIZES.get(name))


def _check(name: str, root: Path | None, size: int | None, stream: bool = False) -> None:
    if size is not None and size < 1:
        raise UserError(f"size must be at least one pixel, got {size}")
    if name not in NAMES:
        raise unknown("data set", name, NAMES)
    if stream and name not in STREAMED:
        raise UserError(f"data set '{name}' cannot be streamed, only {', '.join(STREAMED)} can")
    if root is None and name != "digits":
        raise UserError(f"data set '{name}' is read from files: say in which folder (data.root)")


def _kept(part: Part, classes: Sequence[str] | None, title: str | None) -> Part:
    """The images of these classes (default: all), every one with a label, called by the title."""
    if int(part.labels.min()) < 0:
        raise UserError(
            f"{part.name}: a label is negative (of an unlabelled image?); leave those out"
        )
    if part.num_classes < 2:
        raise UserError(
            f"{part.name}: its images are all of one class, '{part.classes[0]}'; "
            "it needs at least two classes"
        )
    part = part if classes is None else only_classes(part, classes)
    return replace(part, name=title or part.name)


def _by_name(part: Part, known: list[str], chosen: Sequence[str] | None) -> Part:
    """A folder's images with labels as a network has them, where it knows all of their classes.

    Where classes are chosen, those of the network are among them that no image is of.
    """
    if chosen is not None:
        lacking = [n for n in one_spelling(chosen) if n in known and n not in part.classes]
        return replace(part, classes=(*part.classes, *lacking))
    if not set(part.classes) <= set(known):
        return part
    labels = torch.tensor([known.index(name) for name in part.classes])[part.labels]
    return replace(part, labels=labels, classes=tuple(known))


def _tested(test: Part, limit: int | None, side: int | None) -> ArrayDataset:
    """What models are tested on: the same images for every seed."""
    if not len(test):
        raise UserError(f"{test.name}: no test image of {', '.join(test.classes)}: add some")
    if absent := _without_images(test):
        print(f"note: {test.name} has no test images of {', '.join(absent)}")
    return _loaded(_limit(test, "test_limit", limit, _TEST_SEED), side)


def _without_images(part: Part) -> list[str]:
    """The classes that no image of the part is of."""
    counts = torch.bincount(part.labels, minlength=part.num_classes).tolist()
    return [name for name, count in zip(part.classes, counts, strict=True) if not count]


def only_classes(part: Part, classes: Sequence[str]) -> Part:
    """The images of these classes, labelled 0, 1, ... in this order.

    Raises UserError for a name that is no class of the data, one given twice, or fewer than two.
    """
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise UserError(f"classes must be at least two different ones, not {', '.join(classes)}")
    new = torch.full((part.num_classes,), -1)
    known = one_spelling(part.classes)
    for label, (name, spelt) in enumerate(zip(classes, one_spelling(classes), strict=True)):
        if spelt not in known:
            raise unknown(f"class of {part.name}", name, part.classes)
        new[known.index(spelt)] = label
    labels = new.to(part.labels.device)[part.labels]
    kept = labels >= 0
    name = f"{part.name} ({len(classes)} of {part.num_classes} classes)"
    return replace(part.subset(kept), labels=labels[kept], classes=tuple(classes), name=name)


def _read(
    name: str, root: Path | None, size: int | None, stream: bool, workers: int
) -> tuple[Part, Part]:
    if name == "digits":
        return read_digits()
    assert root is not None  # checked
    if name == "folder" and not stream:
        return read_folder(root, size)
    if name in STREAMED:
        return read_streamed(name, root, size, workers, few=stream)
    return read_torchvision(name, root, train=True), read_torchvision(name, root, train=False)


def _read_test(name: str, root: Path | None, size: int | None, few: bool) -> Part:
    if root is not None and name == "folder":
        return read_test_folder(root, size)
    if root is not None and name in TORCHVISION:
        return read_torchvision(name, root, train=False)
    return _read(name, root, size, stream=few, workers=0)[1]


def _limit(part: Part, what: str, limit: int | None, seed: int) -> Part:
    if limit is None:
        return part
    there = int((torch.bincount(part.labels) > 0).sum())
    if limit < there:
        raise UserError(
            f"{what}={limit} is fewer than the {there} classes: keep at least one image of each"
        )
    if limit >= len(part):
        return part
    return part.subset(stratified(part.labels, limit, seed=seed))


def _loaded(part: Part, side: int | None) -> ArrayDataset:
    """In memory, and resized to this side."""
    part = part.load() if isinstance(part, StreamedDataset) else part
    return part if side is None else replace(part, images=resize(part.images, side))

"""The public data sets: scikit-learn's digits, and torchvision's from their original files."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gacd.data.dataset import ArrayDataset
from gacd.data.split import stratified
from gacd.errors import UserError

_DIGITS_TEST = 540  # 30 % of 1797
_DIGITS_SEED = 20200921  # any constant: the test set is the same for every seed of a study
_DIGITS = tuple("0123456789")
_STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def read_digits() -> tuple[ArrayDataset, ArrayDataset]:
    """scikit-learn's 1797 digits, 8x8 and grey: 1257 to train on, 540 (always the same) to test.

    Values 0 to 16 become bytes, round(255 v / 16). Read from scikit-learn's file: importing the
    package takes longer than the first training step.
    """
    found = find_spec("sklearn")
    assert found is not None and found.origin is not None  # a dependency
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    values = np.loadtxt(file, delimiter=",")
    pixels = np.rint(values[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    digits = _dataset(pixels, values[:, -1], _DIGITS, "digits")
    test = stratified(digits.labels, _DIGITS_TEST, seed=_DIGITS_SEED)
    return digits.subset(~test), digits.subset(test)


class _Source(NamedTuple):
    """A data set that torchvision reads, and the remedy where its files are missing."""

    name: str
    title: str
    put: str
    classes: tuple[str, ...] | None = None
    """Where torchvision does not say; these sets call their parts train and test."""


TORCHVISION = {
    "cifar10": _Source(
        "CIFAR10", "CIFAR-10", "unpack cifar-10-python.tar.gz there (it makes cifar-10-batches-py)"
    ),
    "cifar100": _Source(
        "CIFAR100", "CIFAR-100", "unpack cifar-100-python.tar.gz there (it makes cifar-100-python)"
    ),
    "stl10": _Source(
        "STL10", "STL-10", "unpack stl10_binary.tar.gz there (it makes stl10_binary)", _STL10
    ),
    "svhn": _Source("SVHN", "SVHN", "put train_32x32.mat and test_32x32.mat there", _DIGITS),
}


def read_torchvision(name: str, root: Path, *, train: bool) -> ArrayDataset:
    """Train or test set of a key of `TORCHVISION`, from its original files under `root`.

    Nothing is downloaded; torchvision checks every file's MD5. Raises UserError with the remedy
    where a file is missing or differs.
    """
    from torchvision import datasets

    source = TORCHVISION[name]
    make = getattr(datasets, source.name)
    try:
        if source.classes is not None:
            raw = make(root, split="train" if train else "test")
            return _dataset(raw.data, raw.labels, source.classes, name)
        raw = make(root, train=train)
        return _dataset(raw.data.transpose(0, 3, 1, 2), raw.targets, tuple(raw.classes), name)
    except (RuntimeError, OSError):  # torchvision's word for missing and for damaged alike
        download = f"d.{source.name}({str(root)!r}, download=True)"
        if source.name == "SVHN":  # STL-10's archive holds all its parts
            download = f"[d.SVHN({str(root)!r}, p, download=True) for p in ('train', 'test')]"
        raise UserError(
            f"{root}: no whole copy of {source.title}, files are missing or have a wrong checksum: "
            f'{source.put}, or run: python -c "import torchvision.datasets as d; {download}"'
        ) from None


def _dataset(pixels: Any, labels: Any, classes: tuple[str, ...], name: str) -> ArrayDataset:
    return ArrayDataset(
        torch.from_numpy(np.ascontiguousarray(pixels)),
        torch.from_numpy(np.array(labels, dtype=np.int64)),
        classes,
        name,
    )

"""A data set as it is kept: bytes and labels in two tensors, on whichever device they are used."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gacd.data.images import in_colour, to_float
from gacd.errors import UserError
from gacd.shapes import Images
from gacd.storage import fingerprint


def one_spelling(names: Iterable[object]) -> list[str]:
    """Names as they are compared: systems differ in how Unicode writes an accent."""
    return [unicodedata.normalize("NFC", str(name)) for name in names]


@runtime_checkable
class ImageDataset(Protocol):
    """What training reads: an `ArrayDataset` in memory, or a `StreamedDataset` on disk."""

    @property
    def labels(self) -> Tensor:
        """int64 [N], on the device."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, K."""

    @property
    def name(self) -> str:
        """For records and messages."""

    @property
    def num_classes(self) -> int:
        """K."""

    @property
    def channels(self) -> int:
        """C."""

    @property
    def size(self) -> int:
        """The side of the images, in pixels."""

    def __len__(self) -> int: ...

    def fetch(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """The bytes [B, C, H, W] of every batch of rows, in this order, on the device."""

    def to(self, device: torch.device | str) -> "ImageDataset":
        """The same data for another device."""

    def fingerprint(self) -> str:
        """A hash that tells data apart; of images on disk, by their files' names and sizes."""

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, in units of [0, 1]."""


@dataclass(frozen=True, eq=False)
class ArrayDataset:
    """Images uint8 [N, C, H, W] with labels int64 [N], 0 to K - 1, named by `classes`.

    Raises UserError where the parts do not fit together.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        for part in (self.images, self.labels):
            if not isinstance(part, Tensor):
                raise UserError(
                    f"{self.name}: images and labels must be tensors, not {type(part).__name__}"
                )
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise UserError(
                f"{self.name}: images must be uint8 [N, C, H, W], "
                f"got {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise UserError(
                f"{self.name}: {len(self.images)} images need as many int64 labels, "
                f"got {self.labels.dtype} {list(self.labels.shape)}"
            )
        if len(self.labels):
            low, high = (int(value) for value in self.labels.aminmax())
            if low < 0 or high >= len(self.classes):
                raise UserError(
                    f"{self.name}: labels must be 0 to {len(self.classes) - 1} "
                    f"for {len(self.classes)} classes, got {low} to {high}"
                )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """K, present or not among the labels."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """C: 1 grey, 3 colour."""
        return self.images.shape[1]

    @property
    def size(self) -> int:
        """The side of the (square) images, in pixels."""
        return self.images.shape[-1]

    def fingerprint(self) -> str:
        """A hash of every byte, label and class name: equal if and only if the data are."""
        return fingerprint(
            (
                str(tuple(self.images.shape)),
                self.images.cpu().contiguous().numpy().tobytes(),
                self.labels.cpu().contiguous().numpy().tobytes(),
                *self.classes,
            )
        )

    def subset(self, index: Tensor | slice) -> "ArrayDataset":
        """The images at some rows (int64, or a slice), or where a mask (bool [N]) is true."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device | str) -> "ArrayDataset":
        """The same data set on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def fetch(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """The bytes of every batch of rows."""
        return (self.images[index] for index in batches)

    def in_colour(self, channels: int) -> "ArrayDataset":
        """The same images for a network of so many channels; those in colour stay as they are."""
        grey = self.channels == 1
        return replace(self, images=in_colour(self.images, channels)) if grey else self

    def float_images(self, index: Tensor | slice = slice(None)) -> Images:
        """Images at some rows, in [0, 1], channels-last in memory."""
        return to_float(self.images[index])

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and population standard deviation of each channel, in units of [0, 1].

        Counted from histograms: exact, and no float copy of the set. A constant channel gets 1
        for its deviation, so that dividing by it is harmless.
        """
        values = torch.arange(256, dtype=torch.float64) / 255
        means, deviations = [], []
        for channel in self.images.unbind(1):
            share = torch.bincount(channel.flatten(), minlength=256).cpu().double()
            share /= share.sum()
            mean = (share * values).sum()
            means.append(float(mean))
            deviations.append(float((share * (values - mean) ** 2).sum().sqrt()) or 1.0)
        return tuple(means), tuple(deviations)


@dataclass(frozen=True, eq=False)
class Splits:
    """Three disjoint parts: models are trained on `train`, chosen on `val`, reported on `test`."""

    train: ImageDataset
    val: ArrayDataset
    test: ArrayDataset

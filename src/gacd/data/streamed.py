"""A data set that stays on disk: images are decoded as they are asked for, by worker processes.

Any row can be read at any time, so the order of an epoch is the same permutation as in memory, and
a run that resumes in the middle of one begins there without reading what came before.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gacd.data.dataset import ArrayDataset
from gacd.data.folder import fitted
from gacd.errors import UserError
from gacd.storage import fingerprint

_GRACE = 20  # seconds, in which a process that a whole job's SIGTERM met writes its checkpoint
_SAMPLE = 2048  # images that mean and standard deviation are taken from


@runtime_checkable
class Reader(Protocol):
    """Where the images are. It is handed to worker processes, so it holds no open file."""

    def __len__(self) -> int: ...

    def image(self, row: int) -> Image.Image:
        """Image `row`, grey (L) or RGB."""

    def fingerprint(self) -> str:
        """A hash of what lies there: names, sizes."""


@dataclass(frozen=True, eq=False)
class StreamedDataset:
    """Some `rows` of what `reader` reads, as images of `size` x `size` pixels.

    In memory are the labels, eight bytes a row and what `reader` keeps of where the images lie, no
    image. `workers` processes decode ahead (0: this one). Images are scaled and cropped as
    `read_folder` does it, and brought to `channels` (1: grey, 3: RGB).
    """

    reader: Reader
    rows: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    size: int
    channels: int
    workers: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_classes(self) -> int:
        """K, present or not among the labels."""
        return len(self.classes)

    def fetch(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """The bytes [B, C, S, S] of every batch of rows, in this order, on the labels' device.

        Each worker decodes whole batches, up to two ahead; they come back in order.
        """
        if not batches:
            return iter(())
        device = self.labels.device
        rows = self.rows[torch.cat(list(batches)).cpu()]  # one wait for the device, not one a step
        loader = DataLoader(
            _Decoder(self.reader, self.size, self.channels),
            sampler=torch.split(rows, [len(index) for index in batches]),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_interrupts,
        )
        return (_whole(pixels).to(device, non_blocking=True) for pixels in loader)

    def subset(self, index: Tensor) -> "StreamedDataset":
        """The images at some rows (int64), or where a mask (bool [N]) is true."""
        return replace(self, rows=self.rows[index.cpu()], labels=self.labels[index])

    def to(self, device: torch.device | str) -> "StreamedDataset":
        """The same images, which arrive on another device."""
        return replace(self, labels=self.labels.to(device))

    def load(self) -> ArrayDataset:
        """All of it, in memory."""
        rows = torch.split(torch.arange(len(self)), 256)
        shape = len(self), self.channels, self.size, self.size
        pixels = torch.empty(shape, dtype=torch.uint8, device=self.labels.device)
        for part, batch in zip(torch.split(pixels, 256), self.fetch(rows), strict=True):
            part.copy_(batch)
        return ArrayDataset(pixels, self.labels, self.classes, self.name)

    def fingerprint(self) -> str:
        """A hash of the files' names and sizes, of the rows and of the labels."""
        sizes = f"{self.size} {self.channels}"
        arrays = (t.cpu().contiguous().numpy().tobytes() for t in (self.rows, self.labels))
        return fingerprint((self.reader.fingerprint(), sizes, *arrays, *self.classes))

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of each channel, in units of [0, 1]; from at most 2048 images, evenly spread."""
        some = torch.linspace(0, len(self) - 1, min(len(self), _SAMPLE)).long()
        some.clamp_(max=len(self) - 1)  # float32 rounds numbers above 2^24, also up
        return self.to("cpu").subset(some).load().mean_std()


class _Decoder(Dataset["Tensor | UserError"]):
    """One item is one batch, or why there is none: an exception would arrive with a traceback."""

    def __init__(self, reader: Reader, size: int, channels: int) -> None:
        self.reader, self.size, self.mode = reader, size, "L" if channels == 1 else "RGB"

    def __getitem__(self, rows: Tensor) -> Tensor | UserError:
        images = (self.reader.image(row).convert(self.mode) for row in rows.tolist())
        try:
            return torch.from_numpy(np.stack([fitted(image, self.size) for image in images]))
        except UserError as error:
            return error


def _whole(batch: Tensor | UserError) -> Tensor:
    if isinstance(batch, UserError):
        raise batch
    return batch


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C and SIGTERM, which reach a whole job, are the training process's to handle.

    It ends its workers itself; one that it can end by SIGTERM alone has some seconds more.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name == "posix":
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))

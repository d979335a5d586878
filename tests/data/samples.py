"""Images made up for streamed data, and how a shard holds them."""

import io
import tarfile

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "emu")
COUNTS = {"train": 11, "test": 4}  # of each class


def picture(part: str, label: int, number: int) -> Image.Image:
    key = [len(part), label, number]
    pixels = np.random.default_rng(key).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def samples(part: str) -> list[tuple[int, int]]:
    return [(label, n) for label in range(len(CLASSES)) for n in range(COUNTS[part])]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()

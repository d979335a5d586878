"""Where streamed images come from: class folders, WebDataset shards, Hugging Face datasets."""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor

from gacd.data.folder import SUFFIXES, UNREADABLE, find_images, open_image, plain, why
from gacd.data.streamed import Reader, StreamedDataset
from gacd.errors import UserError
from gacd.storage import fingerprint

Part = tuple[Reader, list[int]]
"""A reader, and its labels."""


_Found = tuple[tuple[str, ...], Part, Part]
"""The classes, and the train and test part."""
_LOOKED_AT = 100  # images, to tell grey sets from others, and sets of several sizes


def read_streamed(
    name: str, root: Path, size: int | None, workers: int, *, few: bool = True
) -> tuple[StreamedDataset, StreamedDataset]:
    """Train and test set of a key of `STREAMED` under `root`, of whose images `few` are read.

    The images are grey if all of some hundred, evenly spaced, are, or else all for training; their
    `size`, where it is not given, is the first one's.
    Raises UserError, naming the file or folder.
    """
    classes, train, test = STREAMED[name](root)
    side = size or min(train[0].image(0).size)
    rows = range(0, len(train[0]), max(1, len(train[0]) // _LOOKED_AT))
    some = [(image.mode, image.size) for image in map(train[0].image, rows)]
    grey = all(mode == "L" for mode, _ in some) and (
        few or all(train[0].image(row).mode == "L" for row in range(len(train[0])))
    )
    if size is None and any(found != (side, side) for _, found in some):
        print(
            f"note: images are scaled and cropped to {side} pixels a side, as the first one has: "
            "say --data.size"
        )
    return tuple(  # type: ignore[return-value]
        StreamedDataset(
            reader,
            torch.arange(len(labels)),
            torch.tensor(labels, dtype=torch.int64),
            classes,
            root.resolve().name,
            side,
            1 if grey else 3,
            workers,
        )
        for reader, labels in (train, test)
    )


@dataclass(frozen=True, eq=False)
class FolderReader:
    """Image files by their paths."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, row: int) -> Image.Image:
        """Decode one file."""
        return open_image(self.paths[row])

    def fingerprint(self) -> str:
        """Of names and sizes."""
        return fingerprint(_stamp(path) for path in self.paths)


def _folder(root: Path) -> _Found:
    classes, *parts = find_images(root)
    train, test = (
        (FolderReader([path for path, _ in files]), [label for _, label in files])
        for files in parts
    )
    return classes, train, test


@dataclass(frozen=True, eq=False)
class ShardReader:
    """Images inside tar files, by their place: shard, first byte, length."""

    shards: Sequence[Path]
    places_N3: Tensor

    def __len__(self) -> int:
        return len(self.places_N3)

    def image(self, row: int) -> Image.Image:
        """Decode one member."""
        number, offset, length = self.places_N3[row].tolist()
        shard = self.shards[number]
        with shard.open("rb") as file:
            file.seek(offset - tarfile.BLOCKSIZE)  # the member's header begins with its name
            name = file.read(tarfile.BLOCKSIZE)[:100].rstrip(b"\0").decode(errors="replace")
            return open_image(io.BytesIO(file.read(length)), f"{shard}: {name}")

    def fingerprint(self) -> str:
        """Of the shards' names and sizes."""
        return fingerprint(_stamp(path) for path in self.shards)


def _webdataset(root: Path) -> _Found:
    """`root`/train/*.tar and test/*.tar; members KEY.jpg (or .png, ...) and KEY.cls, a number.

    Class names: the lines of `root`/classes.txt, where there is one.
    """
    train, test = (_shards(root / part) for part in ("train", "test"))
    names = root / "classes.txt"
    highest = max(*train[1], *test[1])
    if names.is_file():
        classes = _names(names)
        if highest >= len(classes):
            raise UserError(
                f"{names}: {len(classes)} classes, but a label in the shards: {highest}"
            )
    elif highest >= len(train[1]):
        raise UserError(
            f"{root}: a label in the shards is {highest}, of {len(train[1])} images: KEY.cls holds "
            "the number of a class, from 0"
        )
    else:
        classes = tuple(str(label) for label in range(highest + 1))
    return classes, train, test


def _names(file: Path) -> tuple[str, ...]:
    """The class on each line of a file; no two are the same."""
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().split("\n")  # -sig: no mark before
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8; save it anew as that") from None
    names = tuple(name.strip() for name in lines)
    if "" in names:
        raise UserError(f"{file}: line {names.index('') + 1} is empty; name a class on each line")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{file}: '{twice[0]}' stands there twice; give each class its own name")
    return names


def _shards(folder: Path) -> Part:
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"{folder}: no shards; put *.tar files there, with KEY.jpg and KEY.cls")
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for number, (found, classes) in enumerate(pool.map(_scan, shards)):
            places += [(number, *place) for place in found]
            labels += classes
    return ShardReader(shards, torch.tensor(places)), labels


def _scan(shard: Path) -> tuple[list[tuple[int, int]], list[int]]:
    """Where each image of a shard lies, and its label: from the headers and the .cls members."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with shard.open("rb") as opened, tarfile.open(fileobj=opened, mode="r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                key, _, extension = file.partition(".")
                key = f"{folder}/{key}"
                if f".{extension.lower()}" in SUFFIXES:
                    images[key] = member.offset_data, member.size
                elif extension == "cls":
                    content = archive.extractfile(member)
                    text = content.read() if content else b""
                    labels[key] = _label(text, f"{shard}: {member.name}")
            _check_end(shard, opened, archive.offset)
    except (tarfile.TarError, ValueError, OSError) as error:
        raise UserError(f"{shard}: cannot be read as a shard of images ({error})") from None
    lacking = next(iter(images.keys() ^ labels.keys()), None)
    if lacking is not None or not images:
        what = "no image" if lacking is None else f"half of {lacking.strip('/')}"
        raise UserError(f"{shard}: {what}; each sample needs KEY.jpg (or .png, ...) and KEY.cls")
    return list(images.values()), [labels[key] for key in images]


def _label(text: bytes, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{where}: holds {text[:20]!r}, not the number of a class") from None


def _check_end(shard: Path, opened: BinaryIO, end: int) -> None:
    """Refuse a shard that does not end, in zeros alone, where its last readable member does.

    To tarfile the end of the file, or a header it cannot read, is the end of the archive as well.
    """
    opened.seek(end)
    block = opened.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise UserError(
            f"{shard}: cut short or damaged at byte {end}: copy it again, or, if it is "
            "whole and lacks the end of an archive, append 1024 zero bytes"
        )
    while block := opened.read(1 << 20):
        if block.count(0) < len(block):
            raise UserError(
                f"{shard}: more follows the end of the archive at byte {end}: copy it again, or, "
                "where several were joined, keep each in a file of its own"
            )


@dataclass(frozen=True, eq=False)
class TableReader:
    """A column of images of a Hugging Face data set, mapped from its Arrow files."""

    table: Any
    column: str
    where: str
    stamp: str

    def __len__(self) -> int:
        return len(self.table)

    def image(self, row: int) -> Image.Image:
        """Decode one row."""
        name = f"{self.where}: the image of row {row}"
        try:
            found: Image.Image | None = self.table[row][self.column]
        except UNREADABLE as error:
            raise UserError(f"{name} cannot be read ({why(error)}); leave such rows out") from None
        if found is None:
            raise UserError(f"{name} is missing; leave such rows out")
        return plain(found, name)

    def fingerprint(self) -> str:
        """Of the data set's files."""
        return self.stamp


def _huggingface(root: Path) -> _Found:
    """What `save_to_disk` wrote, or a folder of Parquet files: parts train and test.

    The image and the label are the first columns of these types.
    """
    if not root.is_dir():  # the package would look for a data set of that name on the network
        raise UserError(f"{root}: no such folder; put a data set there")
    try:
        import datasets
    except ImportError:
        raise UserError(
            "Hugging Face data sets need a package: pip install 'gacd[huggingface]'"
        ) from None
    saved = (root / "dataset_dict.json").is_file()
    if not saved and (root / "state.json").is_file():
        raise UserError(
            f"{root}: holds one Dataset alone; save a DatasetDict of two, train and test, instead"
        )
    try:
        parts = (datasets.load_from_disk if saved else datasets.load_dataset)(str(root))
    except datasets.exceptions.DatasetGenerationError as error:  # its cause alone says why
        raise UserError(f"{root}: cannot be read as a data set ({error.__cause__})") from None
    except IndexError:  # the package writes a part without rows, and cannot read it
        raise UserError(f"{root}: a part of it holds no images; add some") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{root}: cannot be read as a data set ({error})") from None
    if not {"train", "test"} <= parts.keys():
        raise UserError(f"{root}: has the parts {', '.join(parts)}; it needs train and test")
    columns = parts["train"].features
    image, label = (
        next((name for name, kind in columns.items() if isinstance(kind, wanted)), None)
        for wanted in (datasets.Image, datasets.ClassLabel)
    )
    if image is None or label is None:
        raise UserError(f"{root}: needs a column of type Image and one of type ClassLabel")
    stamp = None
    if not saved:  # the library's own, which save_to_disk keeps, is here of times and places
        files = (path for path in root.rglob("*.parquet") if path.is_file())
        sizes = sorted(f"{path.relative_to(root)} {path.stat().st_size}" for path in files)
        stamp = fingerprint(sizes) if sizes else None
    train, test = (
        _column(parts[part], image, label, f"{root} {part}", stamp) for part in ("train", "test")
    )
    theirs = parts["test"].features[label]
    if getattr(theirs, "names", None) != columns[label].names:
        raise UserError(
            f"{root}: the column '{label}' names other classes in test than in train, or in "
            "another order: cast it to train's ClassLabel"
        )
    return tuple(columns[label].names), train, test


def _column(table: Any, image: str, label: str, where: str, stamp: str | None) -> Part:
    """A part's images and labels."""
    if lacking := {image, label} - table.features.keys():
        raise UserError(f"{where}: lacks the column '{min(lacking)}'")
    labels = list(table[label])
    if None in labels:
        raise UserError(f"{where}: row {labels.index(None)} has no label; leave such rows out")
    stamp = stamp or str(table._fingerprint)  # which casting would change
    if not table.features[image].decode:
        table = table.cast_column(image, type(table.features[image])())
    return TableReader(table, image, where, stamp), labels


def _stamp(path: Path) -> str:
    """The same wherever the data lie, and whenever they were copied there."""
    return f"{path.parent.name}/{path.name} {path.stat().st_size}"


STREAMED: dict[str, Callable[[Path], _Found]] = {
    "folder": _folder,
    "webdataset": _webdataset,
    "huggingface": _huggingface,
}
"""What can be streamed, by name."""

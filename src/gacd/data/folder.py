"""A folder of photographs, one subfolder a class: train/CLASS/* and test/CLASS/*."""

import math
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from gacd import storage
from gacd.data.dataset import ArrayDataset, one_spelling
from gacd.data.images import in_colour
from gacd.errors import UserError, first_line, unknown
from gacd.progress import progress
from gacd.shapes import PixelArray

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
)
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises for a file that is no image, or a damaged one."""
_WORTH_CACHING = 5.0  # seconds of decoding that a file in the cache should save
_DEEP = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})  # PIL would clip these to 255


def read_folder(root: Path, size: int | None = None) -> tuple[ArrayDataset, ArrayDataset]:
    """Train and test set of `root`/train/CLASS/* and `root`/test/CLASS/*.

    Classes are the folders under train/, in alphabetical order. Every image is scaled and
    centre-cropped to `size` x `size` pixels (default: the shorter side of the first image);
    grey only if all are, otherwise RGB. Decoding that takes long is kept as one file in
    $GACD_CACHE, by default ~/.cache/gacd. Raises UserError, naming the file or folder.
    """
    classes, train, test = find_images(root)
    both = _dataset(root, train + test, classes, size)
    return both.subset(slice(len(train))), both.subset(slice(len(train), None))


def read_test_folder(root: Path, size: int | None = None) -> ArrayDataset:
    """The test set of `read_folder`, by itself: train/, where there is one, names the classes."""
    classes = _classes(root, "train" if (root / "train").is_dir() else "test", least=1)
    return _dataset(root, _files(root / "test", classes), classes, size)


def read_pictures(source: Path, *, size: int, channels: int) -> PixelArray:
    """Every image below a folder, in the order of their paths, or every one in an .npz archive.

    Bytes [N, channels, size, size], scaled and centre-cropped. An archive has an array `image`,
    bytes [N, H, W, C] with one or three channels, as public sets of generated images do; what else
    it holds is not read. Raises UserError where there is no image, or where they are in colour and
    the data are grey.
    """
    pixels = _archive(source, size) if source.suffix == ".npz" else _pictures(source, size)
    if pixels.shape[1] > channels:
        raise UserError(f"{source}: its images are in colour, and the data are grey: convert them")
    return in_colour(pixels, channels)


def _pictures(folder: Path, size: int) -> PixelArray:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; images are looked for in it and below, or in an .npz file"
        )
    left_out: list[str] = []
    paths = list(_below(folder, left_out, set()))
    if not paths:
        raise UserError(f"{folder}: no images in it or below ({', '.join(sorted(SUFFIXES))})")
    if left_out:
        print(
            f"note: {len(left_out)} files below {folder} are left out, such as {min(left_out)}: "
            f"images are {', '.join(sorted(SUFFIXES))}"
        )
    return _load(paths, folder, size)


def _archive(file: Path, size: int) -> PixelArray:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:  # pickles are refused
            names = arrays.files
            images = arrays["image"] if "image" in names else None
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"{file}: cannot be read as a NumPy archive ({first_line(error)}); replace the file"
        ) from None
    if images is None:
        raise UserError(f"{file}: has no array 'image', but {', '.join(names) or 'nothing'}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(
            f"{file}: its 'image' is {images.dtype} {images.shape}: save bytes [N, H, W, C], "
            "with one channel or three"
        )
    if not images.size:
        raise UserError(f"{file}: its 'image' holds no images: {images.shape}")
    if images.shape[1:3] == (size, size):
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    grey = images.shape[3] == 1
    pictures = (Image.fromarray(image[..., 0] if grey else image) for image in images)
    return torch.from_numpy(np.stack([fitted(picture, size) for picture in pictures]))


def _below(folder: Path, left_out: list[str], seen: set[Path]) -> Iterator[Path]:
    """The images, by their paths; what else there is goes to `left_out`. A link may lead back."""
    if (place := folder.resolve()) in seen:
        return
    seen.add(place)
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    _check_names(folder, (entry.name for entry in entries))
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _below(Path(entry.path), left_out, seen)
        elif _is_image(entry):
            yield Path(entry.path)
        else:
            left_out.append(entry.path)


def _dataset(
    root: Path, files: "Files", classes: tuple[str, ...], size: int | None
) -> ArrayDataset:
    pixels = _load([path for path, _ in files], root, size)
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return ArrayDataset(pixels, labels, classes, root.resolve().name)


Files = list[tuple[Path, int]]
"""Images, each with its class."""


def find_images(root: Path) -> tuple[tuple[str, ...], Files, Files]:
    """The classes of `root`, and the images of its train and test part. Raises UserError."""
    classes = _classes(root, "train")
    return classes, _files(root / "train", classes), _files(root / "test", classes)


def _classes(root: Path, part: str, least: int = 2) -> tuple[str, ...]:
    """The classes by the folders of a part; those in test/ must be among them."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; it should hold train/CLASS/* and test/CLASS/*")
    classes = _folders(root / part)
    if len(classes) < least:
        raise UserError(
            f"{root / part}: {len(classes)} class folder(s); "
            "it needs at least two, each with the images of one class"
        )
    for name in _folders(root / "test"):
        if name not in classes:
            raise UserError(f"{root / 'test' / name}: {unknown('class', name, classes)}")
    return tuple(classes)


def _folders(folder: Path) -> dict[str, Path]:
    """The classes of a part, in order, and their folders.

    Of the ways in which Unicode writes an accent, names have one: systems differ in theirs.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; put {folder.name}/CLASS/* images there")
    folders = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    _check_names(folder, (path.name for path in folders))
    named: dict[str, Path] = {}
    names = one_spelling(path.name for path in folders)
    for name, path in zip(names, folders, strict=True):
        if name in named:
            raise UserError(
                f"{folder}: two folders are '{name}', in two spellings of Unicode: join them"
            )
        named[name] = path
    return dict(sorted(named.items()))


def _check_names(folder: Path, names: Iterable[str]) -> None:
    """Refuse names that are no text: neither a record nor a message could hold them."""
    for name in names:
        if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
            shown = os.fsencode(folder / name).decode(errors="backslashreplace")
            raise UserError(f"{shown}: its name is not UTF-8; rename it")


def _files(folder: Path, classes: Sequence[str]) -> Files:
    """Every image of `folder` with its class; a class may lack its folder in test/, not images."""
    found: Files = []
    left_out: list[str] = []
    folders = _folders(folder)
    for label, name in enumerate(classes):
        if name not in folders:
            continue
        with os.scandir(folders[name]) as found_there:  # it knows what is a folder, unasked
            entries = list(found_there)
        _check_names(folders[name], (entry.name for entry in entries))
        paths = sorted(Path(entry.path) for entry in entries if _is_image(entry))
        taken = {path.name for path in paths}
        left_out += [e.path for e in entries if e.name not in taken and e.name[0] != "."]
        if not paths:
            raise UserError(
                f"{folders[name]}: no images; add some ({', '.join(sorted(SUFFIXES))}) "
                "or remove the folder"
            )
        found += [(path, label) for path in paths]
    if not found:
        raise UserError(f"{folder}: no images; it should hold one folder for each class")
    if left_out:
        kinds = ", ".join(sorted(SUFFIXES))
        print(
            f"note: {len(left_out)} things in the classes of {folder} are left out, such as "
            f"{min(left_out)}: images are files directly in a class's folder, {kinds}"
        )
    return found


def _is_image(entry: "os.DirEntry[str]") -> bool:
    """A file, by its name; hidden ones are the system's, and a link to nothing is refused."""
    suffix = Path(entry.name).suffix.lower()
    if suffix not in SUFFIXES or entry.name.startswith("."):
        return False
    if entry.is_symlink() and not Path(entry.path).exists():  # nor does a link to itself lead on
        raise UserError(f"{entry.path}: a link to a file that is not there; remove it")
    return entry.is_file()  # no pipe, at which decoding would wait for ever


def _load(paths: Sequence[Path], root: Path, size: int | None) -> PixelArray:
    """Decode, or read what an earlier run decoded of the same files (names, sizes, times)."""
    parts = [f"v2 size {size} of {root.resolve()}"]
    for path in paths:
        stat = path.stat()
        parts.append(f"{path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}")
    cache = Path(os.environ.get("GACD_CACHE") or Path.home() / ".cache" / "gacd")
    file = cache / f"images-{storage.fingerprint(parts)}.safetensors"
    if file.is_file():
        try:
            images: PixelArray = storage.load_tensors(file)[0]["images"]
            return images
        except UserError:
            file.unlink()  # cut short; it can be made again
    began = time.monotonic()
    images = _decode_all(paths, size)
    if time.monotonic() - began > _WORTH_CACHING:
        try:
            storage.save_tensors(file, {"images": images}, {"folder": root.name})
        except UserError as error:
            warnings.warn(f"images are decoded anew each time: {error}", stacklevel=2)
        else:
            print(
                f"note: the decoded images are kept in {file} "
                f"({images.nbytes / 1e6:,.0f} MB; delete it at will)"
            )
    return images


def _decode_all(paths: Sequence[Path], size: int | None) -> PixelArray:
    side = size or min(open_image(paths[0]).size)
    shape = len(paths), 3, side, side
    try:
        pixels = np.empty(shape, dtype=np.uint8)
    except MemoryError:
        raise UserError(
            f"{len(paths)} images of {side} pixels a side are {math.prod(shape) / 1e9:,.0f} GB, "
            "more than the memory has: lower --data.size, or say --data.stream true"
        ) from None

    def decode(row: int) -> tuple[bool, bool] | UserError:
        """Write one image into its row; whether it is grey, and whether its size is another."""
        try:
            image = open_image(paths[row])
        except UserError as error:
            return error
        pixels[row] = fitted(image, side)
        return image.mode == "L", image.size != (side, side)

    grey, others, bad = True, 0, dict[Path, UserError]()
    with (
        progress(len(paths), "decoding") as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for path, found in zip(paths, pool.map(decode, range(len(paths))), strict=True):
            if isinstance(found, UserError):
                bad[path] = found
            else:
                grey &= found[0]
                others += found[1]
            bar.advance()
    if bad:
        first, *rest = bad
        more = f" (and {len(rest)} more: {', '.join(map(str, rest[:9]))})" if rest else ""
        raise UserError(f"{bad[first]}{more}")
    if others and size is None:
        print(
            f"note: {others} of {len(paths)} images are scaled and cropped to {side} pixels a "
            "side, as the first one has: say --data.size"
        )
    return torch.from_numpy(pixels[:, :1].copy() if grey else pixels)


def fitted(image: Image.Image, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes [C, size, size] of an image, scaled and centre-cropped; C = 1: grey, 3: RGB."""
    array = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def plain(image: Image.Image, path: object) -> Image.Image:
    """A decoded image as grey (L) or RGB; one of more than 8 bits a channel is refused."""
    with suppress(Exception):  # a tag that cannot be read says nothing
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in _DEEP:
        raise UserError(f"{path}: {image.mode} pixels; save it with 8 bits a channel")
    if image.mode in ("1", "L"):
        return image.convert("L")
    if "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def open_image(file: Path | BytesIO, path: object = None) -> Image.Image:
    """A decoded image, grey (L) or RGB; alpha is dropped. `path` names it, where a file does not.

    Raises UserError, naming it, where it cannot be read.
    """
    path = path or file
    try:
        with Image.open(file) as image:
            return plain(image, path)
    except UNREADABLE as error:
        raise UserError(
            f"{path}: cannot be read as an image ({why(error)}); replace the file or remove it"
        ) from None


def why(error: Exception) -> str:
    """What PIL says of an image, without the address of the bytes that it was given."""
    return re.sub(r" <_io\.BytesIO[^>]*>", "", str(error))

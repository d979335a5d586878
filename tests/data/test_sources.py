"""The real torchvision readers, on small files in the original formats on disk.

torchvision compares MD5 sums with the full data sets'; the tests put the small files' sums into
its lists. The library itself never touches the check.
"""

import copyreg
import hashlib
import io
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat
from sklearn.datasets import load_digits
from torchvision import datasets

from gacd.data.load import load_test
from gacd.data.sources import TORCHVISION, read_digits, read_torchvision
from gacd.errors import UserError

RNG = np.random.default_rng
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905
Parts = dict[str, tuple[np.ndarray, list[int]]]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def rows(n: int, seed: int) -> np.ndarray:
    return RNG(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


class OldPickler(pickle.Pickler):
    """Protocol 2 with a dtype as NumPy of Python 2 wrote it: ('u1', 0, 1), integers for flags."""

    dispatch_table = copyreg.dispatch_table.copy()

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.dtype):
            return np.dtype, (value.str.lstrip("|"), 0, 1)
        return NotImplemented


def old_pickle(path: Path, value: Any) -> None:
    buffer = io.BytesIO()
    OldPickler(buffer, protocol=2).dump(value)
    path.write_bytes(buffer.getvalue().replace(b"numpy._core.", b"numpy.core."))


def write_cifar10(root: Path, patch: pytest.MonkeyPatch) -> Parts:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names_of = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    written = {}
    for seed, file in enumerate(names_of):
        written[file] = (rows(10, seed), [int(label) for label in RNG(seed).permutation(10)])
        data, labels = written[file]
        old_pickle(folder / file, {"batch_label": file, "data": data, "labels": labels})
    old_pickle(folder / "batches.meta", {"label_names": CIFAR10_CLASSES, "num_vis": 3072})
    sums = [[name, md5(folder / name)] for name in names_of]
    patch.setattr(datasets.CIFAR10, "train_list", sums[:5])
    patch.setattr(datasets.CIFAR10, "test_list", sums[5:])
    meta = {**datasets.CIFAR10.meta, "md5": md5(folder / "batches.meta")}
    patch.setattr(datasets.CIFAR10, "meta", meta)
    train = [written[file] for file in names_of[:5]]
    images = np.concatenate([data for data, _ in train])
    return {
        "train": (images.reshape(-1, 3, 32, 32), [y for _, labels in train for y in labels]),
        "test": (written["test_batch"][0].reshape(-1, 3, 32, 32), written["test_batch"][1]),
    }


def write_cifar100(root: Path, patch: pytest.MonkeyPatch) -> Parts:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    parts: Parts = {}
    for part, n in (("train", 200), ("test", 100)):
        data, fine = rows(n, n), [i % 100 for i in range(n)]
        coarse = [label // 5 for label in fine]
        old_pickle(folder / part, {"data": data, "fine_labels": fine, "coarse_labels": coarse})
        parts[part] = data.reshape(-1, 3, 32, 32), fine
    fine_names = [f"fine{i}" for i in range(100)]
    old_pickle(folder / "meta", {"fine_label_names": fine_names, "coarse_label_names": ["x"] * 20})
    patch.setattr(datasets.CIFAR100, "train_list", [["train", md5(folder / "train")]])
    patch.setattr(datasets.CIFAR100, "test_list", [["test", md5(folder / "test")]])
    meta = {**datasets.CIFAR100.meta, "md5": md5(folder / "meta")}
    patch.setattr(datasets.CIFAR100, "meta", meta)
    return parts


def write_stl10(root: Path, patch: pytest.MonkeyPatch) -> Parts:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    parts: Parts = {}
    for seed, part in enumerate(("train", "test")):
        images = RNG(seed).integers(0, 256, (20, 3, 96, 96), dtype=np.uint8)
        labels = [i % 10 for i in range(20)]
        images.swapaxes(2, 3).tofile(folder / f"{part}_X.bin")  # columns first on the disk
        (np.array(labels, dtype=np.uint8) + 1).tofile(folder / f"{part}_y.bin")
        parts[part] = images, labels
    (folder / "unlabeled_X.bin").write_bytes(b"")
    files = ["train_X.bin", "train_y.bin", "unlabeled_X.bin", "test_X.bin", "test_y.bin"]
    sums = [[name, md5(folder / name)] for name in files]
    patch.setattr(datasets.STL10, "train_list", sums[:3])
    patch.setattr(datasets.STL10, "test_list", sums[3:])
    return parts


def write_svhn(root: Path, patch: pytest.MonkeyPatch) -> Parts:
    root.mkdir(parents=True, exist_ok=True)
    parts: Parts = {}
    sums = dict(datasets.SVHN.split_list)
    for seed, part in enumerate(("train", "test")):
        images = RNG(seed).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
        labels = [i % 10 for i in range(20)]
        file = f"{part}_32x32.mat"
        stored = np.array([label or 10 for label in labels], dtype=np.uint8)[:, None]  # 0 is 10
        savemat(root / file, {"X": images.transpose(2, 3, 1, 0), "y": stored})
        sums[part] = [sums[part][0], file, md5(root / file)]
        parts[part] = images, labels
    patch.setattr(datasets.SVHN, "split_list", sums)
    return parts


WRITERS: dict[str, Callable[[Path, pytest.MonkeyPatch], Parts]] = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "stl10": write_stl10,
    "svhn": write_svhn,
}
CLASSES: dict[str, Iterable[str]] = {
    "cifar10": CIFAR10_CLASSES,
    "cifar100": (f"fine{i}" for i in range(100)),
    "stl10": ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"],
    "svhn": "0123456789",
}


def test_every_source_is_tested() -> None:
    assert set(WRITERS) == set(TORCHVISION)


@pytest.mark.parametrize("name", WRITERS)
def test_original_files_give_their_pixels_and_labels(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = WRITERS[name](tmp_path, monkeypatch)
    for part in ("train", "test"):
        data = read_torchvision(name, tmp_path, train=part == "train")
        images, labels = written[part]
        assert data.images.dtype == torch.uint8
        assert np.array_equal(data.images.numpy(), images)
        assert data.labels.tolist() == labels
        assert data.name == name
    assert data.classes == tuple(CLASSES[name])
    alone = load_test(name, root=tmp_path, size=data.size)
    assert alone.fingerprint() == data.fingerprint()


@pytest.mark.parametrize("name", WRITERS)
def test_a_damaged_file_is_an_error_with_its_remedy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[name](tmp_path, monkeypatch)
    damaged = sorted(path for path in tmp_path.rglob("*test*") if path.is_file())[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError, match="wrong checksum"):
        read_torchvision(name, tmp_path, train=False)


@pytest.mark.parametrize("name", WRITERS)
def test_missing_files_are_an_error_with_its_remedy(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_torchvision(name, tmp_path, train=False)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message
    assert TORCHVISION[name].title in message
    command = message.split('python -c "')[1].removesuffix('"')
    compile(command, "remedy", "exec")  # what we tell a user to run is Python
    assert "download=True" in command


def test_digits_are_scikit_learns_in_bytes() -> None:
    train, test = read_digits()
    assert (len(train), len(test)) == (1257, 540)
    assert train.images.shape[1:] == (1, 8, 8)
    levels = torch.cat([train.images, test.images]).unique().tolist()
    assert levels == [round(value * 255 / 16) for value in range(17)]

    def key(image: np.ndarray, label: int) -> tuple[bytes, int]:
        return np.rint(image * (16 / 255)).astype(np.uint8).tobytes(), label

    ours = [
        key(image, int(label))
        for data in (train, test)
        for image, label in zip(data.images.numpy(), data.labels, strict=True)
    ]
    images, labels = load_digits(return_X_y=True)
    theirs = [
        (image.astype(np.uint8).tobytes(), int(y)) for image, y in zip(images, labels, strict=True)
    ]
    assert sorted(ours) == sorted(theirs)  # each of the 1797 in exactly one part

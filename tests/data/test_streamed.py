"""Streamed data: the same batches as from memory, from any source, at any step, by any workers."""

import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from samples import CLASSES, COUNTS, add, picture, png, samples

from gacd.data.batches import iterate
from gacd.data.load import load_splits
from gacd.data.readers import FolderReader
from gacd.data.streamed import StreamedDataset
from gacd.errors import UserError
from gacd.shapes import Batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    for part in COUNTS:
        for label, number in samples(part):
            path = root / part / CLASSES[label] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(part, label, number).save(path)
    return root


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in the same order, in shards of ten, as WebDataset lays them out."""
    root = tmp_path_factory.mktemp("shards")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for part in COUNTS:
        (root / part).mkdir()
        for first in range(0, len(samples(part)), 10):
            with tarfile.open(root / part / f"{first:06}.tar", "w") as archive:
                for label, number in samples(part)[first : first + 10]:
                    key = f"{label}{number:02}"
                    add(archive, f"{key}.cls", str(label).encode())
                    add(archive, f"{key}.png", png(picture(part, label, number)))
    return root


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("table")
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))}
    )
    parts = {
        part: datasets.Dataset.from_dict(
            {
                "picture": [picture(part, *sample) for sample in samples(part)],
                "kind": [label for label, _ in samples(part)],
            },
            features=features,
        )
        for part in COUNTS
    }
    datasets.DatasetDict(parts).save_to_disk(str(root))
    return root


SETTINGS: dict[str, Any] = {"size": 8, "val_fraction": 0.2, "seed": 3}
ORDER: dict[str, Any] = {
    "batch_size": 5, "shuffle": True, "seed": 1, "epoch": 2, "drop_last": False, "pad": 1,
    "flip": True,
}  # fmt: skip


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["folder", "webdataset", "huggingface"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_are_those_of_memory(
    name: str, workers: int, folder: Path, request: pytest.FixtureRequest
) -> None:
    expected = load_splits("folder", root=folder, **SETTINGS)
    if name == "huggingface":
        root = request.getfixturevalue("table")
    else:
        root = folder if name == "folder" else request.getfixturevalue("shards")
    found = load_splits(name, root=root, stream=True, workers=workers, **SETTINGS)
    assert isinstance(found.train, StreamedDataset)
    assert found.train.classes == CLASSES
    assert found.train.mean_std() == expected.train.mean_std()  # fewer than 2048 images
    whole = list(iterate(expected.train, **ORDER))
    assert_same(list(iterate(found.train, **ORDER)), whole)
    assert_same(list(iterate(found.train, **ORDER, start=3)), whole[3:])
    for rank in range(2):
        ranks = {"rank": rank, "world_size": 2}
        assert_same(
            list(iterate(found.train, **ORDER, **ranks)),
            list(iterate(expected.train, **ORDER, **ranks)),
        )
    for part in ("val", "test"):
        assert torch.equal(getattr(found, part).images, getattr(expected, part).images)
        assert torch.equal(getattr(found, part).labels, getattr(expected, part).labels)
    if name != "folder":  # or all of it in memory
        loaded = load_splits(name, root=root, **SETTINGS)
        assert_same(list(iterate(loaded.train, **ORDER)), whole)


def test_only_what_is_asked_for_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = load_splits("folder", root=folder, stream=True, **SETTINGS).train
    assert isinstance(train, StreamedDataset)
    asked: list[int] = []
    image = type(train.reader).image
    monkeypatch.setattr(
        type(train.reader), "image", lambda self, row: asked.append(row) or image(self, row)
    )
    batches = list(iterate(train, **ORDER, start=4))
    assert asked == [int(train.rows[row]) for batch in batches for row in batch.index]


def test_statistics_are_of_images_from_everywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files come class by class: the first of them would be of one class."""
    train = load_splits("folder", root=folder, stream=True, workers=1, **SETTINGS).train
    assert isinstance(train, StreamedDataset) and train.workers == 1
    monkeypatch.setattr("gacd.data.streamed._SAMPLE", 3)
    rows = torch.tensor([0, (len(train) - 1) // 2, len(train) - 1])
    assert train.mean_std() == train.load().subset(rows).mean_std()


def test_fingerprints_and_limits(folder: Path) -> None:
    def prints(**changes: Any) -> str:
        return load_splits(
            "folder", root=folder, stream=True, **SETTINGS | changes
        ).train.fingerprint()

    assert prints() == prints()
    assert len({prints(), prints(seed=4), prints(size=7), prints(train_limit=6)}) == 4
    limited = load_splits(
        "folder", root=folder, stream=True, classes=["emu", "cat"], train_limit=8, **SETTINGS
    ).train
    assert (len(limited), limited.classes) == (8, ("emu", "cat"))
    assert limited.labels.bincount().tolist() == [4, 4]


@pytest.mark.parametrize("name", ["folder", "webdataset"])
def test_a_moved_copy_is_the_same_data(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    root = request.getfixturevalue("folder" if name == "folder" else "shards")

    def of(place: Path) -> str:
        return load_splits(name, root=place, stream=True, **SETTINGS).train.fingerprint()

    copy = shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert of(copy) == of(root)
    file = next(path for path in sorted((copy / "train").rglob("*")) if path.is_file())
    file.write_bytes(file.read_bytes() + b"\0" * 512)
    assert of(copy) != of(root)


def test_images_that_will_be_cropped_are_noted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in COUNTS:
        for label, number in samples(part):
            path = tmp_path / part / CLASSES[label] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            side = 16 if (part, label, number) == ("train", 2, 5) else 9
            picture(part, label, number).resize((side, side)).save(path)
    for root, size, noted in ((folder, None, True), (folder, 9, False), (tmp_path, None, True)):
        found = load_splits("folder", root=root, size=size, stream=True, seed=0)
        assert found.train.size == 9
        assert ("cropped to 9 pixels a side" in capsys.readouterr().out) is noted
    (tmp_path / "train" / CLASSES[2] / "05.png").unlink()
    load_splits("folder", root=tmp_path, stream=True, seed=0)
    assert "cropped" not in capsys.readouterr().out


def test_grey_stays_grey(tmp_path: Path) -> None:
    for part in COUNTS:
        for label, number in samples(part):
            path = tmp_path / part / CLASSES[label] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(part, label, number).convert("L").save(path)
    found = load_splits("folder", root=tmp_path, stream=True, **SETTINGS).train
    expected = load_splits("folder", root=tmp_path, **SETTINGS).train
    assert found.channels == expected.channels == 1
    assert_same(list(iterate(found, **ORDER)), list(iterate(expected, **ORDER)))
    picture("train", 2, 9).save(tmp_path / "train" / CLASSES[2] / "09.png")  # not the first
    found = load_splits("folder", root=tmp_path, stream=True, **SETTINGS).train
    expected = load_splits("folder", root=tmp_path, **SETTINGS).train
    assert found.channels == expected.channels == 3
    assert_same(list(iterate(found, **ORDER)), list(iterate(expected, **ORDER)))


def test_grey_of_more_than_eight_bits_is_scaled_or_refused_and_never_clipped(
    tmp_path: Path,
) -> None:
    datasets = pytest.importorskip("datasets")
    deep = Image.fromarray(np.full((9, 12), 4096, dtype=np.uint16))
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))}
    )
    rows = {"picture": [deep] * 33, "kind": [label for label in range(3) for _ in range(11)]}
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path))
    with pytest.raises(UserError, match=r"train: the image of row 0: .*bits"):
        load_splits("huggingface", root=tmp_path, **SETTINGS)


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_network() -> None:
    with pytest.raises(UserError, match=r"^mnist: no such folder"):
        load_splits("huggingface", root=Path("mnist"), **SETTINGS)


def test_classes_that_test_calls_otherwise_are_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def part(names: list[str], **changes: Any) -> Any:
        features = datasets.Features(
            {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=names)}
        )
        rows = {"picture": [picture("train", 0, n) for n in range(24)], "kind": [0, 1, 2] * 8}
        return datasets.Dataset.from_dict(rows | changes, features=features)

    train = part(["a", "b", "c"])
    for name, test, said in (
        ("order", part(["b", "a", "c"]), "names other classes in test than in train"),
        ("column", train.remove_columns("kind"), "test: lacks the column 'kind'"),
        ("label", part(["a", "b", "c"], kind=[None, 1, 2] * 8), "test: row 0 has no label"),
        (
            "image",
            part(["a", "b", "c"], picture=[None] * 24),
            "test: the image of row 0 is missing",
        ),
    ):
        root = tmp_path / name
        datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(root))
        with pytest.raises(UserError, match=said):
            load_splits("huggingface", root=root, **SETTINGS)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (-1, "a label is negative"),
        (10**11, "a label in the shards is 100000000000, of 34 images"),
        (4, r"class '3' has no training image: .* --data.classes, such as 0 1 2 4$"),
    ],
)
def test_labels_that_no_class_has(tmp_path: Path, label: int, said: str) -> None:
    for part in COUNTS:
        (tmp_path / part).mkdir()
        with tarfile.open(tmp_path / part / "0.tar", "w") as archive:
            for number, other in enumerate([*(label for label, _ in samples(part)), label]):
                add(archive, f"{number}.cls", str(other).encode())
                add(archive, f"{number}.png", png(picture(part, 0, number)))
    with pytest.raises(UserError, match=said):
        load_splits("webdataset", root=tmp_path, **SETTINGS)


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'digits' cannot be streamed, only folder, webdataset"):
        load_splits("digits", stream=True, **SETTINGS)
    with pytest.raises(UserError, match=r"train: no shards; put \*\.tar files there"):
        load_splits("webdataset", root=tmp_path, **SETTINGS)
    for part in COUNTS:
        (tmp_path / part).mkdir()
        with tarfile.open(tmp_path / part / "0.tar", "w") as archive:
            add(archive, "a.png", png(picture(part, 0, 0)))
    with pytest.raises(UserError, match=r"0\.tar: half of a; each sample needs KEY\.jpg"):
        load_splits("webdataset", root=tmp_path, **SETTINGS)
    (tmp_path / "train" / "0.tar").write_bytes(b"no archive at all" * 100)
    with pytest.raises(UserError, match=r"0\.tar: cannot be read as a shard"):
        load_splits("webdataset", root=tmp_path, **SETTINGS)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_is_named_in_one_line(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    root = tmp_path / "pets"
    shutil.copytree(folder, root)
    train = load_splits("folder", root=root, stream=True, workers=workers, **SETTINGS).train
    assert isinstance(train, StreamedDataset) and isinstance(train.reader, FolderReader)
    broken = train.reader.paths[int(train.rows[3])]
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(UserError) as refused:
        list(iterate(train, **ORDER))
    said = str(refused.value)
    assert said.startswith(f"{broken}: cannot be read as an image") and "\n" not in said


def test_a_sample_of_very_many_rows_stays_within_them() -> None:
    """float32 knows no odd numbers above 2^24, and would round the last row up."""

    class Endless:
        def __len__(self) -> int:
            return 20_000_003

        def image(self, row: int) -> Image.Image:
            return Image.new("L", (8, 8), 100)

        def fingerprint(self) -> str:
            return "endless"

    rows = torch.arange(20_000_003)
    data = StreamedDataset(Endless(), rows, torch.zeros_like(rows), ("a", "b"), "many", 8, 1)
    assert data.mean_std()[0] == pytest.approx((100 / 255,))


def test_more_streamed_images_than_are_read_or_looked_at_at_once(tmp_path: Path) -> None:
    """Grey classes first: of 600 files the first hundred are all grey."""
    generator = torch.Generator().manual_seed(0)
    for part, n in (("train", 300), ("test", 2)):
        for name, mode in (("a", "L"), ("b", "RGB")):
            (folder := tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                shape = (8, 8) if mode == "L" else (8, 8, 3)
                pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{i:03}.png")
    plain = {"root": tmp_path, "val_fraction": 0.9, "seed": 0}
    ours, theirs = (load_splits("folder", stream=s, **plain) for s in (True, False))
    assert ours.train.channels == theirs.train.channels == 3 and len(ours.val) == 540
    assert ours.val.fingerprint() == theirs.val.fingerprint()

"""Shards and tables that are not as they should be: refused in one line that says where."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from samples import COUNTS, add, picture, png

from gacd.data.load import load_splits, load_test
from gacd.errors import UserError

SETTINGS: dict[str, Any] = {"size": 8, "val_fraction": 0.2, "seed": 3}

SHARD_FORMATS = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}


def write_shards(root: Path, labels: list[str], format: int = tarfile.PAX_FORMAT) -> Path:
    """One shard of images with these labels for each part; returns that of train.

    The names are longer than a header has room for.
    """
    for part in COUNTS:
        (root / part).mkdir(parents=True)
        with tarfile.open(root / part / "0.tar", "w", format=format) as archive:
            for number, label in enumerate(labels):
                key = f"{'long' * 15}/{'long' * 15}/{number}"
                add(archive, f"{key}.cls", label.encode())
                add(archive, f"{key}.png", png(picture(part, 0, number)))
    return root / "train" / "0.tar"


def table(labels: list[int], classes: list[str]) -> Any:
    """Images with these labels, as Hugging Face's library has them."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=classes)}
    )
    images = [picture("train", 0, number) for number in range(len(labels))]
    return datasets.Dataset.from_dict({"picture": images, "kind": labels}, features=features)


def save_table(root: Path, **parts: Any) -> None:
    import datasets

    datasets.DatasetDict(parts).save_to_disk(str(root))


def save_parquet(root: Path, monkeypatch: pytest.MonkeyPatch, **parts: Any) -> None:
    """Files that the library reads by way of a cache, which is put beside them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", root.parent / "cache")
    root.mkdir()
    for part, rows in parts.items():
        rows.to_parquet(str(root / f"{part}.parquet"))


@pytest.mark.parametrize("format", SHARD_FORMATS.values(), ids=SHARD_FORMATS)
def test_a_shard_that_is_not_whole_is_refused(tmp_path: Path, format: int) -> None:
    shard = write_shards(tmp_path, ["0", "1"] * 5, format)
    whole = shard.read_bytes()
    with tarfile.open(shard) as archive:
        cls, image = archive.getmembers()[10:12]
    at, data = cls.offset, image.offset_data
    found = load_splits("webdataset", root=tmp_path, **SETTINGS)
    assert len(found.train) + len(found.val) == 10
    cut = (
        f"{shard}: cut short or damaged at byte {at}: copy it again, or, if it is whole and lacks "
    )
    cut += "the end of an archive, append 1024 zero bytes"
    joined = ": copy it again, or, where several were joined, keep each in a file of its own"
    for damaged, said in (
        (whole[:at], cut),
        (whole[: at + 200], cut),
        (whole[: at + 3] + b"!" + whole[at + 4 :], cut),
        (
            whole[: data + 20],
            f"{shard}: cannot be read as a shard of images (unexpected end of data)",
        ),
        (
            whole[:at] + bytes(512) + whole[at + 512 :],
            f"{shard}: more follows the end of the archive at byte {at}{joined}",
        ),
    ):
        shard.write_bytes(damaged)
        with pytest.raises(UserError) as refused:
            load_splits("webdataset", root=tmp_path, **SETTINGS)
        assert str(refused.value) == said
    shard.write_bytes(whole + whole)
    with pytest.raises(UserError, match=r"more follows the end of the archive at byte \d+: copy"):
        load_splits("webdataset", root=tmp_path, **SETTINGS)


@pytest.mark.skipif(not shutil.which("tar"), reason="needs tar")
@pytest.mark.parametrize("format", ["v7", "ustar", "gnu", "pax"])
def test_shards_that_tar_wrote(tmp_path: Path, format: str) -> None:
    """Whatever the format, and however many zeros end it."""
    loose = tmp_path / "loose"
    loose.mkdir()
    for number in range(10):
        (loose / f"{number}.cls").write_text(str(number % 2))
        (loose / f"{number}.png").write_bytes(png(picture("train", 0, number)))
    names = sorted(path.name for path in loose.iterdir())
    for part in COUNTS:
        (tmp_path / part).mkdir()
        made = tmp_path / part / "0.tar"
        command = ["tar", f"--format={format}", "-b64", "-cf", str(made), "-C", str(loose)]
        subprocess.run([*command, *names], check=True)
    test = load_splits("webdataset", root=tmp_path, **SETTINGS).test
    assert test.labels.tolist() == [0, 1] * 5


@pytest.mark.parametrize("name", ["webdataset", "huggingface"])
def test_one_class_is_not_enough(tmp_path: Path, name: str) -> None:
    root = tmp_path / "all"
    if name == "webdataset":
        write_shards(root, ["0"] * 10)
    else:
        save_table(root, train=table([0] * 10, ["0"]), test=table([0] * 10, ["0"]))
    for load in (load_splits, load_test):
        with pytest.raises(UserError) as refused:
            load(name, root=root, **(SETTINGS if load is load_splits else {"size": 8}))
        assert str(refused.value) == (
            "all: its images are all of one class, '0'; it needs at least two classes"
        )


@pytest.mark.parametrize("how", ["saved", "parquet"])
def test_a_copied_table_is_the_same_data(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "all"
    parts = {"train": table([0, 1] * 10, ["a", "b"]), "test": table([0, 1] * 3, ["a", "b"])}
    if how == "saved":
        save_table(root, **parts)
    else:
        save_parquet(root, monkeypatch, **parts)

    def of(place: Path) -> str:
        found = load_splits("huggingface", root=place, stream=True, **SETTINGS).train
        return found.fingerprint()

    copy = shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    before = of(root)
    assert of(copy) == before
    for path in root.rglob("*.*"):
        os.utime(path, (1, 1))
    assert of(root) == before
    if how == "parquet":
        table([0, 1] * 11, ["a", "b"]).to_parquet(str(copy / "train.parquet"))
        assert of(copy) != before


def test_a_column_that_is_not_to_be_decoded_is(tmp_path: Path) -> None:
    import datasets

    rows = table([0, 1] * 10, ["a", "b"])
    found = []
    for name, part in {
        "a": rows,
        "b": rows.cast_column("picture", datasets.Image(decode=False)),
    }.items():
        save_table(tmp_path / name / "set", train=part, test=part)
        found.append(load_splits("huggingface", root=tmp_path / name / "set", **SETTINGS).train)
    assert found[0].images.equal(found[1].images)


def test_a_set_in_memory_is_grey_only_if_all_of_its_images_are(tmp_path: Path) -> None:
    """One in colour, which is not among the hundred that a streamed set is told by."""
    root = tmp_path / "shards"
    for part, count in (("train", 301), ("test", 4)):
        (root / part).mkdir(parents=True)
        with tarfile.open(root / part / "0.tar", "w") as archive:
            for number in range(count):
                image = picture(part, 0, number).convert("L")
                image = image.convert("RGB") if number == 5 else image
                add(archive, f"{number:03}.cls", str(number % 2).encode())
                add(archive, f"{number:03}.png", png(image))
    for stream, channels in ((True, 1), (False, 3)):
        test = load_splits("webdataset", root=root, stream=stream, **SETTINGS).test
        assert test.channels == channels
        assert load_test("webdataset", root=root, size=8, few=stream).images.equal(test.images)


def test_the_names_of_classes_are_utf8_and_differ(tmp_path: Path) -> None:
    write_shards(tmp_path, ["0", "1"] * 5)
    names = tmp_path / "classes.txt"
    names.write_bytes("\ufeffcafé\r\nb\r\n".encode())
    assert load_splits("webdataset", root=tmp_path, **SETTINGS).train.classes == ("café", "b")
    for written, said in (
        ("café\nb\n".encode("latin-1"), "is not UTF-8; save it anew as that"),
        (b"b\na\nb\n", "'b' stands there twice; give each class its own name"),
        (b"a\n\nb\n", "line 2 is empty; name a class on each line"),
    ):
        names.write_bytes(written)
        with pytest.raises(UserError) as refused:
            load_splits("webdataset", root=tmp_path, **SETTINGS)
        assert str(refused.value) == f"{names}: {said}"


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_table_without_rows_is_refused(tmp_path: Path, part: str) -> None:
    parts = {"train": table([0, 1] * 5, ["a", "b"]), "test": table([0, 1] * 5, ["a", "b"])}
    save_table(tmp_path, **parts | {part: parts[part].select([])})
    with pytest.raises(UserError) as refused:
        load_splits("huggingface", root=tmp_path, **SETTINGS)
    assert str(refused.value) == f"{tmp_path}: a part of it holds no images; add some"


def test_a_damaged_parquet_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "all"
    rows = table([0, 1] * 5, ["a", "b"])
    save_parquet(root, monkeypatch, train=rows, test=rows)
    (root / "test.parquet").write_bytes((root / "test.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"^{root}: cannot be read as a data set \(.*footer.*\)$"):
        load_splits("huggingface", root=root, **SETTINGS)


@pytest.mark.parametrize("format", SHARD_FORMATS.values(), ids=SHARD_FORMATS)
def test_a_bad_member_of_a_shard_is_named(tmp_path: Path, format: int) -> None:
    shard = write_shards(tmp_path, ["0", "1", "cat", "1"] * 2, format)
    with pytest.raises(UserError) as refused:
        load_splits("webdataset", root=tmp_path, **SETTINGS)
    assert str(refused.value).startswith(f"{shard}: {'long' * 15}/")
    assert str(refused.value).endswith("/2.cls: holds b'cat', not the number of a class")
    with tarfile.open(shard, "w", format=format) as archive:
        for number in range(10):
            add(archive, f"{number}.cls", str(number % 2).encode())
            image = png(picture("train", 0, number))
            add(archive, f"{number}.png", image[:40] if number == 3 else image)
    for part in COUNTS:
        if part != "train":
            shutil.copyfile(shard, tmp_path / part / "0.tar")
    with pytest.raises(UserError, match=rf"^{shard}: 3\.png: cannot .* image \([^<>]+\)"):
        load_splits("webdataset", root=tmp_path, **SETTINGS)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_bad_image_of_a_table_is_named_by_its_part_and_row(tmp_path: Path, part: str) -> None:
    datasets = pytest.importorskip("datasets")
    whole = table([0, 1] * 5, ["a", "b"])
    rows = whole.cast_column("picture", datasets.Image(decode=False)).to_list()
    rows[7]["picture"]["bytes"] = b"no image"
    bad = datasets.Dataset.from_list(rows, features=whole.features)
    save_table(tmp_path, **{"train": whole, "test": whole} | {part: bad})
    with pytest.raises(
        UserError, match=rf"^{tmp_path} {part}: the image of row 7 cannot be read \(.*\); leave"
    ):
        load_splits("huggingface", root=tmp_path, **SETTINGS)


def test_one_part_saved_alone_is_refused(tmp_path: Path) -> None:
    table([0, 1] * 5, ["a", "b"]).save_to_disk(str(tmp_path))
    with pytest.raises(UserError) as refused:
        load_splits("huggingface", root=tmp_path, **SETTINGS)
    assert str(refused.value) == (
        f"{tmp_path}: holds one Dataset alone; save a DatasetDict of two, train and test, instead"
    )

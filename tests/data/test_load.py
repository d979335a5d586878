from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gacd.data.dataset import ArrayDataset
from gacd.data.load import load_splits, load_test
from gacd.errors import UserError


def rows(data: ArrayDataset) -> list[bytes]:
    return [image.numpy().tobytes() for image in data.images]


def test_parts_are_disjoint_whole_and_stratified() -> None:
    splits = load_splits("digits", seed=0)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [1131, 126, 540]
    whole = torch.cat([splits.train.labels, splits.val.labels]).bincount() / 1257
    for part in (splits.train, splits.val):
        counts = part.labels.bincount()
        assert (counts - whole * len(part)).abs().max() <= 1
    assert not set(rows(splits.train)) & set(rows(splits.val))
    assert not set(rows(splits.train)) & set(rows(splits.test))


def test_the_seed_moves_validation_and_never_the_test_part() -> None:
    first, again, other = (load_splits("digits", seed=s, test_limit=100) for s in (0, 0, 1))
    assert first.val.fingerprint() == again.val.fingerprint()
    assert first.train.fingerprint() == again.train.fingerprint()
    assert first.val.fingerprint() != other.val.fingerprint()
    assert first.test.fingerprint() == other.test.fingerprint()


def test_limits_keep_order_and_leave_validation_as_it_was() -> None:
    whole = load_splits("digits", seed=0)
    less = load_splits("digits", seed=0, train_limit=100, test_limit=50)
    assert (len(less.train), len(less.test)) == (100, 50)
    assert less.val.fingerprint() == whole.val.fingerprint()
    for part, full in ((less.train, whole.train), (less.test, whole.test)):
        assert (part.labels.bincount() - len(part) / 10).abs().max() < 1.5
        place = {image: i for i, image in enumerate(rows(full))}
        places = [place[image] for image in rows(part)]
        assert places == sorted(places)
    assert len(load_splits("digits", seed=0, train_limit=10**6).train) == 1131


def test_size_resizes_every_part() -> None:
    splits = load_splits("digits", seed=0, size=12, train_limit=20)
    assert {part.size for part in (splits.train, splits.val, splits.test)} == {12}


def write_folder(root: Path, counts: dict[str, int]) -> Path:
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_a_folder_is_split_too(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train/a": 10, "train/b": 20, "test/a": 2, "test/b": 2})
    splits = load_splits("folder", root=root, seed=3, val_fraction=0.2, size=4)
    assert splits.train.labels.bincount().tolist() == [8, 16]
    assert splits.val.labels.bincount().tolist() == [2, 4]
    assert splits.test.size == 4


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_the_test_part_by_itself_is_the_same(tmp_path: Path, stream: bool) -> None:
    root = write_folder(tmp_path, {f"{p}/{c}": 9 for p in ("train", "test") for c in "abc"})
    chosen = {"root": root, "size": 4, "classes": ["c", "a"], "test_limit": 5}
    whole = load_splits("folder", **chosen, stream=stream, seed=3, val_fraction=0.2).test
    alone = load_test("folder", **chosen)
    assert (alone.fingerprint(), alone.name) == (whole.fingerprint(), whole.name)
    digits = load_test("digits", test_limit=50, size=12)
    assert (
        digits.fingerprint()
        == load_splits("digits", test_limit=50, size=12, seed=1).test.fingerprint()
    )


def test_the_test_part_needs_no_training_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path, {"test/b": 2, "test/a": 3})
    found = load_test("folder", root=root)
    assert (found.classes, found.labels.tolist()) == (("a", "b"), [0, 0, 0, 1, 1])
    (root / "train").mkdir()
    for name in "abc":
        (root / "train" / name).mkdir()
        (root / "train" / name / "never.png").write_text("not read")
    assert load_test("folder", root=root).classes == ("a", "b", "c")
    assert "has no test images of c" in capsys.readouterr().out
    for arguments, says in (
        ({"name": "folder", "root": root / "none"}, "no such folder"),
        ({"name": "folder", "root": root / "test"}, "no such folder; put test/CLASS"),
        ({"name": "folder"}, "say in which folder"),
        ({"name": "digit"}, "did you mean 'digits'"),
    ):
        with pytest.raises(UserError, match=says):
            load_test(**arguments)


def test_stl10_is_resized_to_32_pixels_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    big = ArrayDataset(
        torch.zeros(40, 3, 96, 96, dtype=torch.uint8), torch.arange(40) % 2, ("a", "b"), "stl10"
    )
    monkeypatch.setattr("gacd.data.load.read_torchvision", lambda name, root, train: big)
    assert load_splits("stl10", root=Path(), seed=0).train.size == 32
    assert load_splits("stl10", root=Path(), seed=0, size=48).test.size == 48


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "cifar-10"}, "did you mean 'cifar10'"),
        ({"name": "cifar10"}, "say in which folder"),
        ({"name": "digits", "val_fraction": 0.0}, "val_fraction must be between 0 and 1"),
        ({"name": "digits", "val_fraction": 1.0}, "val_fraction must be between 0 and 1"),
        ({"name": "digits", "val_fraction": 1e-5}, "is none: raise it"),
        ({"name": "digits", "train_limit": 9}, "train_limit=9 is fewer than the 10 classes"),
        ({"name": "digits", "test_limit": 0}, "test_limit=0 is fewer than the 10 classes"),
        ({"name": "digits", "size": 0}, "at least one pixel"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_splits(**{"seed": 0, **arguments})  # type: ignore[arg-type]


def test_a_class_left_without_training_images_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train/many": 90, "train/rare": 1, "test/many": 1})
    with pytest.raises(UserError, match="class 'rare' has no image left"):
        load_splits("folder", root=root, seed=0, train_limit=2)


def test_some_classes_only_in_the_order_asked_for() -> None:
    whole = load_splits("digits", seed=0)
    some = load_splits("digits", seed=0, classes=["7", "0", "4"])
    assert some.test.classes == some.train.classes == ("7", "0", "4")
    assert some.test.name == "digits (3 of 10 classes)"
    for new, old in enumerate((7, 0, 4)):
        expected = rows(whole.test.subset(whole.test.labels == old))
        assert rows(some.test.subset(some.test.labels == new)) == expected
    assert len(some.test) == sum(int((whole.test.labels == k).sum()) for k in (0, 4, 7))
    parts = [set(rows(part)) for part in (some.train, some.val, some.test)]
    assert not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]


def test_classes_of_a_folder(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_folder(tmp_path / part, {"bird": 4, "cat": 5, "truck": 6})
    splits = load_splits(
        "folder", root=tmp_path, classes=["truck", "bird"], val_fraction=0.3, seed=0
    )
    assert splits.test.labels.bincount().tolist() == [6, 4]


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["0", "ten"], "unknown class of digits 'ten'"),
        (["1"], "two different"),
        (["1", "1"], "two"),
    ],
)
def test_impossible_choices_of_classes(classes: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_splits("digits", seed=0, classes=classes)


def test_classes_that_no_test_image_is_of(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets", {"train/a": 5, "train/b": 5, "train/c": 5, "test/c": 2})
    for load, more in ((load_splits, {"seed": 0, "val_fraction": 0.2}), (load_test, {})):
        with pytest.raises(UserError) as refused:
            load("folder", root=root, classes=["a", "b"], **more)
        assert str(refused.value) == "pets (2 of 3 classes): no test image of a, b: add some"

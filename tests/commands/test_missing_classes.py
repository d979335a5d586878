"""`gacd evaluate` on a folder of test images that lacks classes which the network knows."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from PIL import Image

from command_line import refusal
from gacd import cli
from gacd.data.dataset import ArrayDataset
from gacd.data.load import load_splits
from gacd.evaluation.robust import answers
from gacd.linear import fit_head
from gacd.models import create_model
from gacd.models.checkpoints import load_model, save_model
from gacd.storage import load_meta, read_json

# By their labels, so not in the alphabet's order, which that of folders is.
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of the digits that names its classes, and beside it one that does not."""
    folder = tmp_path_factory.mktemp("shipped")
    model = create_model("digits-cnn-4", num_classes=10, channels=1, seed=0)
    fit_head(model, load_splits("digits", train_limit=400, seed=0), None)
    meta = {"architecture": "digits-cnn-4"}
    save_model(folder / "unnamed.safetensors", model, meta)
    save_model(folder / "named.safetensors", model, meta | {"classes": list(NAMES)})
    return folder / "named.safetensors"


def photographs(root: Path, names: Iterable[str], part: str = "test") -> ArrayDataset:
    """Eight images of each of these digits below `root`; the same as a data set of all ten."""
    digits = load_splits("digits", seed=0).test
    rows = []
    for name in names:
        (folder := root / part / name).mkdir(parents=True)
        own = (digits.labels == NAMES.index(name)).nonzero().flatten()[:8].tolist()
        for row in own:
            Image.fromarray(digits.images[row, 0].numpy()).save(folder / f"{row}.png")
        rows += own
    return digits.subset(torch.tensor(rows))


def command(model: Path, root: Path, *more: str) -> list[str]:
    data = ["--data.name", "folder", "--data.root", str(root), "--fabric.accelerator", "cpu"]
    flags = ["--attacks", "natural", "--threat.eps", "0.1", "--out", str(root / "out"), *more]
    return ["evaluate", "--checkpoint", str(model), *data, *flags]


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("names", [("seven", "zero", "one", "eight"), ("three",), NAMES])
def test_labels_are_by_the_names_that_the_network_knows(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, ...]
) -> None:
    field = tmp_path / "field"
    test = photographs(field, names)
    assert cli.main(command(shipped, field, "--evaluation.workers", "1")) == 0
    lacking = ", ".join(name for name in NAMES if name not in names)
    said = f"note: field has no test images of {lacking}\n"
    assert (said in capsys.readouterr().out) is (names != NAMES)
    (row,) = read_json(field / "out" / "results.json")
    right = int((answers(load_model(shipped)[0], test) == test.labels).sum())
    assert right > 0 and row["natural"] == pytest.approx(100 * right / len(test))
    assert (row["n"], row["dataset"]) == (len(test), "field")
    kept = field / "out" / "model" / "model.safetensors"
    assert load_meta(kept)["classes"] == list(NAMES)
    assert cli.main(command(kept, field, "--out", str(tmp_path / "again"))) == 0


@pytest.mark.usefixtures("no_page")
def test_folders_of_training_images_may_lack_them_too(shipped: Path, tmp_path: Path) -> None:
    photographs(tmp_path, ("two", "one"), "train")
    photographs(tmp_path, ("one",))
    assert cli.main(command(shipped, tmp_path)) == 0
    assert read_json(tmp_path / "out" / "results.json")[0]["n"] == 8


@pytest.mark.usefixtures("no_page")
def test_a_class_that_the_network_does_not_know_is_refused_and_can_be_left_out(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs(tmp_path, ("two", "one"))
    (tmp_path / "test" / "one").rename(tmp_path / "test" / "hen")
    photographs(tmp_path, ("one", "nine"))
    remedy = f"--data.classes {' '.join(NAMES)}"
    assert refusal(capsys, *command(shipped, tmp_path)) == (
        f"{shipped}: does not know the class hen of the data: choose a checkpoint of these "
        f"classes, or leave images of others out by {remedy}"
    )
    mistyped = remedy.replace("seven", "sevn").split()
    assert "unknown class of" in refusal(capsys, *command(shipped, tmp_path, *mistyped))
    some = refusal(capsys, *command(shipped, tmp_path, "--data.classes", "one", "two"))
    assert "knows 10 classes, and the data lack 8 of them" in some
    assert cli.main(command(shipped, tmp_path, *remedy.split())) == 0
    assert read_json(tmp_path / "out" / "results.json")[0]["n"] == 24


@pytest.mark.usefixtures("no_page")
def test_a_network_that_does_not_name_its_classes_needs_a_folder_for_each(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unnamed = shipped.with_name("unnamed.safetensors")
    photographs(tmp_path, ("two", "one"))
    said = refusal(capsys, *command(unnamed, tmp_path))
    assert "a model of 10 classes and 1 channels, but the data has 2 and 1" in said
    assert said.endswith(
        "(or name the classes that it does not, by folders in train/, empty ones too)"
    )
    for name in NAMES:
        (tmp_path / "train" / name).mkdir(parents=True)
    assert cli.main(command(unnamed, tmp_path)) == 0

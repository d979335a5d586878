"""Images without labels: who trains on them, as what, and which of them nobody may see."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import refusal
from commands.conftest import DISTILL
from gacd import cli
from gacd.anchors import AnchorBank
from gacd.commands import distill as command
from gacd.commands import training
from gacd.data.dataset import ArrayDataset, Splits
from gacd.data.folder import read_pictures
from gacd.data.load import load_splits
from gacd.errors import UserError
from gacd.models.checkpoints import load_model
from gacd.storage import load_tensors, read_json

ROWS = ("pgd-at", "rst", "kd", "gacd+aft")


def pictures(folder: Path, images: torch.Tensor) -> None:
    """Grey PNGs [N, 1, H, W], half of them in a folder further down."""
    for i, image in enumerate(images):
        place = folder / "deep" / "deeper" if i % 2 else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place / f"{i:04d}.png")


def parts() -> Splits:
    return load_splits("digits", train_limit=200, test_limit=40, seed=0)


def run(out: Path, folder: Path, *methods: str) -> int:
    where = ["--out", str(out), "--unlabelled", str(folder)]
    return cli.main([*DISTILL, *where, "--methods", *methods])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 new images; 5, 4 and 3 of train, validation and test, 2 that the test's limit cuts off."""
    there = tmp_path_factory.mktemp("pictures")
    known = parts()
    for name, images, n in (
        ("new", torch.randint(256, (60, 1, 8, 8), dtype=torch.uint8, generator=_seeded()), 60),
        ("train", known.train.images, 5),  # type: ignore[attr-defined]
        ("val", known.val.images, 4),
        ("test", known.test.images, 3),
        ("more", _unmeasured(known), 2),
    ):
        pictures(there / name, images[:n])
    (there / ".hidden").mkdir()
    (there / ".hidden" / "no image.png").write_text("nor looked at")
    (there / "notes.txt").write_text("nor this")
    return there


def _unmeasured(known: Splits) -> torch.Tensor:
    """Test images that a limit leaves out: a later run may be measured on them."""
    measured = {image.numpy().tobytes() for image in known.test.images}
    every = load_splits("digits", seed=0).test.images
    return torch.stack([image for image in every if image.numpy().tobytes() not in measured])


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Seen:
    """The training sets of every stage, and of every linear layer, by name."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sets: dict[str, ArrayDataset] = {}
        fit, head = training.fit, command.fit_head

        def fitted(
            fabric: Any, method: Any, splits: Any, plan: Any, *, out: Path, name: str
        ) -> Any:
            self.sets[name] = splits.train
            return fit(fabric, method, splits, plan, out=out, name=name)

        def headed(student: Any, splits: Any, threat: Any, **more: Any) -> Any:
            self.sets["linear layer"] = splits.train
            return head(student, splits, threat, **more)

        patch.setattr(training, "fit", fitted)
        patch.setattr(command, "fit_head", headed)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    out = tmp_path_factory.mktemp("runs") / "unlabelled"
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch)
        assert run(out, folder, *ROWS) == 0
    return out, seen


def test_methods_with_a_teacher_train_on_them_as_on_what_it_answers(
    finished: tuple[Path, Seen],
) -> None:
    out, seen = finished
    own = parts().train
    assert isinstance(own, ArrayDataset)
    with_teacher = {"rst", "kd", "gacd/features", "linear layer", "gacd+aft"}
    assert seen.sets.keys() == {"teacher", "pgd-at", *with_teacher}
    for name in ("teacher", "pgd-at"):
        assert seen.sets[name].fingerprint() == own.fingerprint(), name
    teacher, _ = load_model(out / "teacher" / "model.safetensors")
    for name in with_teacher:
        train = seen.sets[name]
        assert torch.equal(train.images[:200], own.images), name
        assert torch.equal(train.labels[:200], own.labels), name
        added = train.subset(torch.arange(200, len(train)))
        with torch.no_grad():
            answers = teacher.eval()(added.float_images()).argmax(1)
        assert torch.equal(added.labels, answers), name


def test_images_that_the_data_have_are_left_out(finished: tuple[Path, Seen], folder: Path) -> None:
    """Of 74 images 60 are new; those of the test part would be trained on otherwise."""
    _, seen = finished
    added = seen.sets["kd"].images[200:]
    written = [np.asarray(Image.open(path)) for path in sorted((folder / "new").rglob("*.png"))]
    assert sorted(image.numpy().tobytes() for image in added) == sorted(
        image.tobytes() for image in written
    )


def test_the_bank_holds_them_with_the_teachers_confidence(finished: tuple[Path, Seen]) -> None:
    out, seen = finished
    bank = AnchorBank.load(out / "anchors.safetensors")
    train = seen.sets["kd"]
    assert len(bank) == 260
    rows = bank.all()
    assert torch.equal(rows.labels_M, train.labels)
    teacher, _ = load_model(out / "teacher" / "model.safetensors")
    with torch.no_grad():
        sure = teacher.eval()(train.float_images()).softmax(1)[torch.arange(260), train.labels]
    torch.testing.assert_close(rows.weights_M, sure)
    assert (rows.weights_M[200:] >= 1 / 10).all()  # of its own answer: at least chance


def test_records_and_page_say_so(finished: tuple[Path, Seen]) -> None:
    out, _ = finished
    rows = {row["method"]: row for row in read_json(out / "results.json")[1:]}
    assert {name: row.get("unlabelled") for name, row in rows.items()} == {
        "pgd-at": None, "rst": 60, "kd": 60, "gacd+aft": 60,
    }  # fmt: skip
    assert rows["kd"]["train_images"] == 260 // 32 * 32
    assert rows["pgd-at"]["train_images"] == 200 // 32 * 32
    page = (out / "report.html").read_text()
    assert "Students with a teacher also trained on 60 images without labels" in page


def test_methods_that_have_no_use_for_them_say_so(
    folder: Path, tmp_path: Path, no_page: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", folder, "pgd-at") == 0
    assert "the unlabelled images train none of these methods: they" in capsys.readouterr().out


def test_without_such_images_self_training_is_adversarial_training(tmp_path: Path) -> None:
    assert cli.main([*DISTILL, "--out", str(tmp_path / "run"), "--methods", "pgd-at", "rst"]) == 0
    ours, theirs = (
        load_tensors(tmp_path / "run" / name / "model.safetensors")[0] for name in ("rst", "pgd-at")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_goes_on_with_the_answers_that_it_began_with(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_page: None
) -> None:
    out = tmp_path / "run"
    assert run(out, folder, "kd") == 0
    tensors, _ = load_tensors(out / "unlabelled.safetensors")
    kept = (out / "unlabelled.safetensors").read_bytes()
    assert run(out, folder, "kd", "rst") == 0
    assert (out / "unlabelled.safetensors").read_bytes() == kept
    assert read_json(out / "rst" / "record.json")["unlabelled"] == len(tensors["labels"]) == 60

    plain = [*DISTILL, "--out", str(out), "--methods", "kd", "iad"]
    said = refusal(capsys, *plain)
    assert "holds another run" in said and "unlabelled" in said
    other = tmp_path / folder.name
    pictures(other, torch.full((3, 1, 8, 8), 7, dtype=torch.uint8))
    said = refusal(capsys, *DISTILL, "--out", str(out), "--unlabelled", str(other))
    assert "is of other unlabelled images: give those again, or choose another --out" in said
    assert not (out / "gacd").exists()


def _empty(root: Path) -> Path:
    (root / "empty" / "below").mkdir(parents=True)
    return root / "empty"


def _colour(root: Path) -> Path:
    (root / "colour").mkdir()
    Image.new("RGB", (8, 8), (200, 9, 9)).save(root / "colour" / "red.png")
    return root / "colour"


def _known(root: Path) -> Path:
    pictures(root / "known", parts().test.images[:4])
    return root / "known"


def _broken(root: Path) -> Path:
    (root / "broken").mkdir()
    (root / "broken" / "a.png").write_bytes(b"not a picture")
    return root / "broken"


def archive(file: Path, **arrays: Any) -> Path:
    np.savez_compressed(file, **arrays)
    return file


def _cut_short(root: Path) -> Path:
    whole = archive(root / "cut.npz", image=np.zeros((9, 8, 8, 1), np.uint8)).read_bytes()
    (root / "cut.npz").write_bytes(whole[: len(whole) // 2])
    return root / "cut.npz"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: root / "nowhere", "nowhere: no such folder; images are looked for in it"),
        (lambda root: root / "nowhere.npz", "nowhere.npz: no such file"),
        (_cut_short, "cut.npz: cannot be read as a NumPy archive ("),
        (
            lambda root: archive(root / "a.npz", image=np.array([{}], dtype=object)),
            "a.npz: cannot be read as a NumPy archive (Object arrays cannot be loaded",
        ),
        (
            lambda root: archive(root / "a.npz", images=np.zeros(3), label=np.zeros(3)),
            "a.npz: has no array 'image', but images, label",
        ),
        (
            lambda root: archive(root / "a.npz", image=np.zeros((2, 1, 8, 8), np.float32)),
            "a.npz: its 'image' is float32 (2, 1, 8, 8): save bytes [N, H, W, C]",
        ),
        (
            lambda root: archive(root / "a.npz", image=np.zeros((0, 8, 8, 1), np.uint8)),
            "a.npz: its 'image' holds no images: (0, 8, 8, 1)",
        ),
        (
            lambda root: archive(root / "a.npz", image=np.zeros((2, 8, 8, 3), np.uint8)),
            "a.npz: its images are in colour, and the data are grey: convert them",
        ),
        (_empty, "empty: no images in it or below (.bmp, "),
        (_colour, "colour: its images are in colour, and the data are grey: convert them"),
        (_known, "known: no image that the data have not: give others as unlabelled"),
        (_broken, "a.png: cannot be read as an image"),
    ],
)
def test_refused_before_the_teacher_trains(
    make: Callable[[Path], Path], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = make(tmp_path)
    out = tmp_path / "run"
    assert said in refusal(capsys, *DISTILL, "--out", str(out), "--unlabelled", str(where))
    assert not (out / "teacher").exists()


def test_grey_images_serve_where_the_data_are_in_colour(tmp_path: Path) -> None:
    pictures(tmp_path / "grey", torch.full((3, 1, 12, 12), 7, dtype=torch.uint8))
    assert (
        read_pictures(tmp_path / "grey", size=8, channels=3).tolist() == [[[[7] * 8] * 8] * 3] * 3
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [12, 8])
def test_an_archive_of_images_is_a_folder_of_them(size: int, channels: int, tmp_path: Path) -> None:
    images = torch.randint(256, (5, 12, 12, channels), dtype=torch.uint8, generator=_seeded())
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images.numpy().squeeze()):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    file = archive(tmp_path / "images.npz", image=images.numpy(), label=np.arange(5))
    found, wanted = (
        read_pictures(source, size=size, channels=3) for source in (file, tmp_path / "folder")
    )
    assert found.shape == (5, 3, size, size)
    assert torch.equal(found, wanted)


def test_an_archive_is_answered_as_its_folder_is(
    folder: Path, finished: tuple[Path, Seen], tmp_path: Path, no_page: None
) -> None:
    images = read_pictures(folder, size=8, channels=1)
    file = archive(tmp_path / "images.npz", image=images.permute(0, 2, 3, 1).numpy())
    assert run(tmp_path / "run", file, "kd") == 0
    found, wanted = (
        load_tensors(out / "unlabelled.safetensors") for out in (tmp_path / "run", finished[0])
    )
    assert torch.equal(found[0]["labels"], wanted[0]["labels"])
    assert found[1] == wanted[1]  # the fingerprint of the images


@pytest.mark.parametrize(("first_side", "grey"), [(16, False), (24, True)])
def test_test_images_are_left_out_whatever_the_first_of_them_looks_like(
    tmp_path: Path, first_side: int, grey: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By themselves the test images would be of another side, or grey: they are as the data are."""
    generator = np.random.default_rng(2)
    root, dump = tmp_path / "photos", tmp_path / "dump"
    dump.mkdir()
    for part in ("train", "test"):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for i in range(6):
                side = first_side if (part, name, i) == ("test", "a", 0) else 24
                image = Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8))
                image = image.convert("L") if grey and part == "test" else image
                image.save(root / part / name / f"{i}.png")
                if part == "test":
                    image.save(dump / f"{name}{i}.png")
    for i in range(3):
        Image.fromarray(generator.integers(0, 256, (24, 24, 3), np.uint8)).save(dump / f"{i}.png")
    kept: list[int] = []

    def answered(_: Any, pixels: Any, *__: Any) -> Any:
        kept.append(len(pixels))
        raise UserError("enough")

    monkeypatch.setattr(command, "answered", answered)
    data = ["--data.name", "folder", "--data.root", str(root), "--data.test_limit", "4"]
    out = ["--unlabelled", str(dump), "--out", str(tmp_path / "run"), "--methods", "rst"]
    few = ["--teacher.training.batch_size", "4", "--training.batch_size", "4"]
    small = ["--data.train_limit", "12", "--data.val_fraction", "0.2"]
    assert cli.main([*DISTILL, *data, *out, *few, *small]) == 2
    assert kept == [3]


@pytest.mark.usefixtures("no_page")
def test_they_count_for_the_size_of_a_batch(
    finished: tuple[Path, Seen], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 labelled images make no batch of 32, but with 60 more they do."""
    teacher = ["--teacher.checkpoint", str(finished[0] / "teacher" / "model.safetensors")]
    few = [*teacher, "--teacher.evaluate", "false", "--data.train_limit", "20"]
    few += ["--training.batch_size", "32", "--unlabelled", str(folder / "new")]
    out = ["--out", str(folder.parent / "few")]
    assert cli.main([*DISTILL, *few, *out, "--methods", "rst"]) == 0
    said = refusal(capsys, *DISTILL, *few, *out, "--methods", "pgd-at")
    assert "32 images is more than the 20" in said


def test_links_are_followed_once_and_what_is_no_image_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "elsewhere", torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    photos = tmp_path / "photos"
    pictures(photos, torch.ones(2, 1, 8, 8, dtype=torch.uint8))
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "linked" / "back").symlink_to(photos)
    (photos / "a.heic").write_text("unknown")
    assert len(read_pictures(photos, size=8, channels=1)) == 5
    assert "1 files below" in (said := capsys.readouterr().out) and "a.heic" in said

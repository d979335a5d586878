"""A checkpoint's classes and the data's: the same number of them is not enough."""

import inspect
import os
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from lightning_fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from safetensors.torch import save_file

from gacd import build
from gacd import config as c
from gacd.anchors import AnchorBank
from gacd.attacks.threat import ThreatModel
from gacd.config import methods as settings
from gacd.data.dataset import ArrayDataset
from gacd.data.load import only_classes
from gacd.errors import UserError
from gacd.losses import contrastive, robust, soft_labels
from gacd.losses.information import nce_bound
from gacd.losses.pairs import Pairs
from gacd.methods import METHODS, TrainingAttack
from gacd.models import create_model
from gacd.models.base import Backbone
from gacd.models.checkpoints import load_model, save_model
from gacd.storage import save_tensors
from gacd.training.loop import Plan


def data(*classes: str) -> ArrayDataset:
    return ArrayDataset(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.arange(3), classes, "d")


def test_classes_in_another_order_are_refused_and_other_words_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.safetensors"
    model = create_model("digits-cnn-2", num_classes=3, channels=1, seed=0)
    meta = {"architecture": "digits-cnn-2", "classes": ["cat", "dog", "fox"]}
    save_model(path, model, meta)
    build.from_checkpoint(path, build.Given(), data("cat", "dog", "fox"))
    assert not capsys.readouterr().out
    for other in (("dog", "cat", "fox"), ("cat", "dog", "hen")):
        with pytest.raises(UserError, match="classes are cat, dog, fox, the data's"):
            build.from_checkpoint(path, build.Given(), data(*other))
    build.from_checkpoint(path, build.Given(), data("n1", "n2", "n3"))
    assert "calls its classes cat, dog, fox, the data n1, n2, n3" in capsys.readouterr().out


def test_data_with_some_of_the_classes_are_told_from_other_data(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model = create_model("digits-cnn-2", num_classes=3, channels=1, seed=0)
    save_model(path, model, {"architecture": "digits-cnn-2", "classes": ["cat", "dog", "fox"]})
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    for names, message in (
        (
            ("cat", "fox"),
            r"knows 3 classes, and the data lack 1 of them \(such as dog\): choose data",
        ),
        (
            ("cat", "hen"),
            "not know the class hen of the data.*leave .* out by --data.classes cat dog fox",
        ),
        (("hen", "cow"), "a model of 3 classes and 1 channels, but the data has 2 and 1"),
    ):
        some = ArrayDataset(images, torch.arange(2), names, "d")
        with pytest.raises(UserError, match=message):
            build.from_checkpoint(path, build.Given(), some)


def made(
    tmp_path: Path, mean: list[float] | None = None, std: list[float] | None = None
) -> Backbone:
    """A network, all of it in m.safetensors; its weights alone in m.pt and w.safetensors."""
    model = create_model("digits-cnn-2", num_classes=3, channels=1, mean=mean, std=std, seed=0)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    save_model(tmp_path / "m.safetensors", model, {"architecture": "digits-cnn-2"})
    return model.eval()


@pytest.mark.parametrize("name", ["m.pt", "w.safetensors"])
def test_weights_alone_are_normalised_as_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    original = made(tmp_path, [0.3], [0.2])
    pets, images = data("cat", "dog", "fox"), torch.rand(4, 1, 8, 8)
    plain, _ = build.from_checkpoint(tmp_path / name, build.Given("digits-cnn-2"), pets)
    assert f"{name} gets images in [0, 1]; give --mean and --std if" in capsys.readouterr().out
    assert not torch.equal(plain.eval()(images), original(images))
    said = build.Given("digits-cnn-2", [0.3], [0.2])
    same, architecture = build.from_checkpoint(tmp_path / name, said, pets)
    assert not capsys.readouterr().out
    assert torch.equal(same.eval()(images), original(images)) and architecture == "digits-cnn-2"
    with pytest.raises(UserError, match="a number for each channel: 1"):
        build.from_checkpoint(tmp_path / name, said._replace(mean=[0.3] * 3, std=[0.2] * 3), pets)
    with pytest.raises(UserError, match=r"say which network it is with --teacher\.model, such"):
        build.from_checkpoint(tmp_path / name, build.Given(), pets, flag="--teacher.model")


def test_a_file_that_names_itself_needs_nothing_said(tmp_path: Path) -> None:
    made(tmp_path, [0.3], [0.2])
    path, pets = tmp_path / "m.safetensors", data("cat", "dog", "fox")
    assert build.from_checkpoint(path, build.Given("digits-cnn-2"), pets)[1] == "digits-cnn-2"
    with pytest.raises(UserError, match="holds a digits-cnn-2: leave --model out"):
        build.from_checkpoint(path, build.Given("resnet18"), pets)
    with pytest.raises(UserError, match="holds its own mean and std: leave them out"):
        build.from_checkpoint(path, build.Given(mean=[0.5], std=[0.5]), pets)


def test_a_state_of_training_is_normalised_as_its_network_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = made(tmp_path, [0.3], [0.2])
    state = {f"student.{name}": tensor for name, tensor in original.state_dict().items()}
    best, pets = tmp_path / "best.safetensors", data("cat", "dog", "fox")
    save_tensors(best, state, {"epoch": 2, "mean": [0.3], "std": [0.2]})
    with pytest.raises(UserError, match="say which network it is"):
        build.from_checkpoint(best, build.Given(), pets)
    images = torch.rand(4, 1, 8, 8)
    same, _ = build.from_checkpoint(best, build.Given("digits-cnn-2"), pets)
    assert torch.equal(same.eval()(images), original(images)) and not capsys.readouterr().out
    with pytest.raises(UserError, match="holds its own mean and std: leave them out"):
        build.from_checkpoint(best, build.Given("digits-cnn-2", [0.5], [0.5]), pets)
    (tmp_path / "m.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"state of training; the finished .* is .*model\.safet"):
        build.from_checkpoint(best, build.Given(), pets)


def test_a_network_for_large_images_is_told_from_other_misfits(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18(num_classes=3).state_dict()
    torch.save(theirs, tmp_path / "m.pt")
    with pytest.raises(UserError, match="for large images: networks here begin with a 3x3 conv"):
        build.network(tmp_path / "m.pt", build.Given("resnet18", num_classes=3), channels=3)


def defaults(of: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(of).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


CALLED = {"T": "temperature", "k": "negatives", "width": "dim", "warm-up": "warmup"}


def test_what_has_no_settings_of_its_own_can_be_reweighted_where_it_has_a_teacher() -> None:
    assert defaults(METHODS["rst"]) == defaults(settings.Reweighted)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("natural", "pgd-at", "rst")])
def test_a_method_has_the_defaults_of_its_flags_and_of_its_documentation(name: str) -> None:
    own = defaults(METHODS[name])
    flags = defaults(getattr(settings, METHODS[name].__name__))
    flags.pop("anchors", None)  # of the bank
    assert own == flags
    table = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    row = "rslad+igdm" if name == "igdm" else name
    (line,) = re.findall(rf"^\| `{re.escape(row)}` \|.*$", table, re.MULTILINE)
    said = re.findall(r"(\S+) ([\d./]+|teacher)(?= \(|,|$)", line.split(" | ")[4])
    assert said
    for key, value in said:
        plain = value if value == "teacher" else float(Fraction(value))
        assert own[CALLED.get(key, key)] == pytest.approx(plain), key


PARTS: list[tuple[Callable[..., Any], type, dict[str, str]]] = [
    (soft_labels.kd, settings.KD, {}),
    (soft_labels.ard, settings.ARD, {}),
    (soft_labels.rslad, settings.RSLAD, {"adv_weight": "alpha"}),
    (soft_labels.iad, settings.IAD, {}),
    (soft_labels.adaad, settings.AdaAD, {"adv_weight": "alpha"}),
    (robust.trades, settings.TRADES, {}),
    (robust.mart, settings.MART, {}),
    (contrastive.nce, settings.CRD, {}),
    (contrastive.crd_nce, settings.CRD, {}),
    (contrastive.gacd_loss, settings.GACD, {}),
    (Pairs, settings.GACD, {}),
    (Pairs.gacd_loss, settings.GACD, {}),
    (nce_bound, settings.GACD, {}),
    (AnchorBank.build, settings.GACD, {"dtype": "anchors"}),
    (Plan, c.Training, {}),
]


@pytest.mark.parametrize(("part", "section", "called"), PARTS)
def test_what_is_used_by_itself_has_the_defaults_of_the_command_line(
    part: Callable[..., Any], section: type, called: dict[str, str]
) -> None:
    flags = defaults(section)
    found = {called.get(name, name): value for name, value in defaults(part).items()}
    shared = found.keys() & flags.keys()
    assert shared
    for name in shared:
        assert found[name] == flags[name], name


def test_images_too_small_for_any_network_are_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (7, 9), i).save(tmp_path / part / name / f"{i}.png")
    cfg = c.Data(name="folder", root=tmp_path, val_fraction=0.5)
    with pytest.raises(UserError, match=r"7 pixels wide, .* at least 8: say --data\.size"):
        build.splits(cfg, 0)
    assert build.splits(replace(cfg, size=8), 0).test.size == 8


def test_precision_and_threads_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    for precision, dtype in (("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)):
        cfg = c.Fabric(accelerator="cpu", threads=3, precision=precision)
        with build.fabric(cfg).autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert threads == [3, 3]
    with pytest.raises(UserError, match=r"threads is 25, but this machine has 3 processors"):
        build.fabric(c.Fabric(accelerator="cpu", threads=25))
    assert threads == [3, 3]


def test_images_of_another_size_than_a_network_saw_must_be_meant(tmp_path: Path) -> None:
    made(tmp_path)
    model, _ = load_model(tmp_path / "m.safetensors")
    path = tmp_path / "small.safetensors"
    save_model(path, model, {"architecture": "digits-cnn-2", "size": 16})
    pets = data("cat", "dog", "fox")
    with pytest.raises(UserError, match="images of 16 pixels a side, and these have 8: say --data"):
        build.from_checkpoint(path, build.Given(), pets)
    build.from_checkpoint(path, build.Given(), pets, size=8)


def test_torchrun_and_fabric_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun started 2 processes, but"):
        build.fabric(c.Fabric(accelerator="cpu"))


def test_an_accent_is_one_letter_to_checkpoints_and_data(tmp_path: Path) -> None:
    """As a Mac writes it, and as others do."""
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    path = tmp_path / "model.safetensors"
    net = create_model("digits-cnn-2", num_classes=2, channels=1, seed=0)
    save_model(path, net, {"architecture": "digits-cnn-2", "classes": ["bar", "cafe\u0301"]})
    data = ArrayDataset(images, labels, ("bar", "caf\u00e9"), "drinks")
    assert build.from_checkpoint(path, build.Given(), data)[1] == "digits-cnn-2"
    assert only_classes(data, ["cafe\u0301", "bar"]).labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("gpu", "fast", "found"),
    [(False, True, "bf16-mixed"), (False, False, "32-true"), (True, False, "bf16-mixed")],
)
def test_precision_is_the_faster_one_unless_it_is_said(
    gpu: bool, fast: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(build, "fast_bf16", lambda device: fast or device == "cuda")
    assert build.precision(c.Fabric()) == found
    on_the_cpu = c.Fabric(accelerator="cpu")
    assert build.precision(on_the_cpu) == ("bf16-mixed" if fast else "32-true")
    for said in ("bf16-mixed", "32-true"):
        assert build.precision(c.Fabric(precision=said)) == said


def test_more_gpus_than_there_are_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: Any) -> None:
        raise MisconfigurationException("You requested gpu: [0, 1]\n But your machine has [0]")

    monkeypatch.setattr(build, "Fabric", refuses)
    with pytest.raises(UserError, match=r"fabric: You requested gpu: \[0, 1\] But your machine"):
        build.fabric(c.Fabric(devices=2))


def test_grey_images_are_a_colour_networks_too(tmp_path: Path) -> None:
    network = create_model("digits-cnn-2", num_classes=10, channels=3, seed=0)
    path = tmp_path / "model.safetensors"
    save_model(path, network, {"architecture": "digits-cnn-2"})
    data = c.Data(test_limit=20)
    grey, colour = build.test_part(data), build.test_part(data, path)
    assert torch.equal(colour.images, grey.images.expand(-1, 3, -1, -1))


def test_what_is_said_of_data_machine_and_attack_reaches_a_stage() -> None:
    fabric = c.Fabric(compile=True, batch_norm="synchronised")
    plan = build.plan(c.Training(), c.Data(pad=3, flip=True), fabric, 7)
    assert (plan.pad, plan.flip, plan.compile, plan.sync_batch_norm) == (3, True, True, True)
    threat = ThreatModel(eps=0.1)
    said = c.Attack(steps=4, step_size="3/255", objective="kl")
    wanted = TrainingAttack(threat=threat, steps=4, step_size=3 / 255, objective="kl")
    assert build.attack(said, threat) == wanted

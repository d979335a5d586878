"""`gacd evaluate`: any mix of attacks, another model's images, cascades, and kill -9."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyautoattack
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import gacd.evaluation.autoattack as autoattack_module
import gacd.evaluation.robust as robust_module
from evaluation.conftest import QuickAutoAttack
from gacd import cli
from gacd import models as registered
from gacd.attacks.threat import ThreatModel
from gacd.commands import run
from gacd.data.load import load_splits
from gacd.evaluation.outcomes import Evaluation
from gacd.evaluation.robust import evaluate
from gacd.models import create_model, register_model
from gacd.models.checkpoints import load_model, save_model
from gacd.storage import load_meta, read_json

COMMON = [
    *("--data.train_limit", "200", "--data.test_limit", "60", "--threat.eps", "0.1"),
    *("--fabric.accelerator", "cpu", "--fabric.precision", "32-true", "--fabric.threads", "1"),
    *("--evaluation.batch_size", "16"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model to attack, with the features of chance and a head fitted to them; and a stranger."""
    from gacd.linear import fit_head

    folder = tmp_path_factory.mktemp("models")
    splits = load_splits("digits", train_limit=400, seed=0)
    paths = []
    for seed, name in enumerate(("ours", "stranger")):
        model = create_model("digits-cnn-4", num_classes=10, channels=1, seed=seed)
        fit_head(model, splits, None)
        paths.append(folder / f"{name}.safetensors")
        save_model(paths[-1], model, {"architecture": "digits-cnn-4"})
    return paths[0], paths[1]


def command(model: Path, out: Path, attacks: str, *more: str) -> list[str]:
    paths = ["--checkpoint", str(model), "--out", str(out)]
    return ["evaluate", *paths, "--attacks", *attacks.split(), *COMMON, *more]


class Rounds(nn.Module):
    """Its gradient is zero wherever it has one."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 0.03).round()


def test_masked_gradients_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(num_classes: int, channels: int) -> nn.Module:
        return nn.Sequential(Rounds(), nn.Flatten(), nn.Linear(64 * channels, num_classes))

    monkeypatch.setattr(registered, "_REGISTERED", {})
    register_model("rounds", build, classifier="2")
    torch.save(build(10, 1).state_dict(), tmp_path / "rounds.pt")
    for attacks, note in {
        "pgd3 cw3": "note: model: pgd3, cw3 broke no image; autoattack tells masked gradients\n",
        "autoattack": "note: model: gradients do not vanish: no (100.0 % of the input gradient's",
    }.items():
        line = command(tmp_path / "rounds.pt", tmp_path / attacks, attacks, "--model", "rounds")
        more = ["--threat.eps", "0.02", "--evaluation.autoattack_limit", "10"]
        assert cli.main([*line, *more]) == 0
        assert note in capsys.readouterr().out


def test_the_help_explains_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("cw (Carlini and Wagner's margin; 40 steps)", "Spare an image", "Another model"):
        assert words in said


@pytest.mark.usefixtures("no_page")
def test_the_verdicts_are_of_the_step_and_seed_asked_for(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = "--seed", "5", "--evaluation.step_size", "0.02", "--data.title", "ours"
    assert cli.main(command(models[0], tmp_path, "pgd3 noise", *flags)) == 0
    ours = Evaluation.load(tmp_path / "model" / "outcomes.safetensors")
    test = load_splits("digits", title="ours", train_limit=200, test_limit=60, seed=5).test
    theirs = evaluate(
        load_model(models[0])[0], test, attacks=["pgd3", "noise"], threat=ThreatModel(eps=0.1),
        step_size=0.02, batch_size=16, seed=5,
    )  # fmt: skip
    assert ours.settings == theirs.settings
    assert all(torch.equal(ours.robust[name], right) for name, right in theirs.robust.items())


@pytest.mark.usefixtures("no_page")
def test_every_attack_asked_for_is_shown_and_recorded(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, stranger = models
    asked = "pgd3x2 fgsm cw2 transfer"
    assert cli.main(command(model, tmp_path, asked, "--source", str(stranger))) == 0
    out = capsys.readouterr().out
    assert "ours (digits-cnn-4) on digits" in out
    words = re.search(r"method.*", out)[0].split()
    assert words[1:6] == ["natural", "PGD-3×2", "FGSM", "CW-2", "transfer"]
    (row,) = read_json(tmp_path / "results.json")
    for name in ("natural", *asked.split()):
        assert f"{row[name]:.1f}" in out
    assert row["natural"] > row["transfer"] > row["pgd3x2"]
    assert "cascade" not in row
    found = Evaluation.load(tmp_path / "model" / "outcomes.safetensors")
    assert len(found.settings["source"]) == 16
    assert "Cascade" not in out


@pytest.mark.usefixtures("no_page")
def test_a_cascade_is_the_worst_case_so_far_and_says_so(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--evaluation.cascade", "true"
    assert cli.main(command(models[0], tmp_path, "cw2 pgd3 fgsm", *flags)) == 0
    assert "Cascade: an image once broken is not attacked again" in capsys.readouterr().out
    (row,) = read_json(tmp_path / "results.json")
    assert row["cascade"] is True
    assert row["natural"] >= row["cw2"] >= row["pgd3"] >= row["fgsm"] == row["worst"]
    assert read_json(tmp_path / "model" / "record.json")["settings"]["cascade"] is True


def test_a_transfer_needs_a_source(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(arguments: list[str]) -> str:
        assert cli.main(arguments) == 2
        return capsys.readouterr().err.splitlines()[-1]

    asked = command(models[0], tmp_path / "out", "transfer")
    assert "'transfer' needs a model to make its images on" in refusal(asked)
    assert "--source FILE" in refusal(["train", "--attacks", "transfer"])
    assert "--source FILE" in refusal(["finetune", "--attacks", "transfer"])
    assert "no.safetensors: no such file" in refusal([*asked, "--source", "no.safetensors"])
    (public := tmp_path / "public.pt").touch()
    assert "such as --source_model resnet18" in refusal([*asked, "--source", str(public)])


@pytest.mark.usefixtures("no_page")
def test_a_public_source(models: tuple[Path, Path], tmp_path: Path) -> None:
    state = create_model("digits-cnn-2", num_classes=10, channels=1, seed=3).state_dict()
    torch.save(state, tmp_path / "public.pt")
    flags = ["--source", str(tmp_path / "public.pt"), "--source_model", "digits-cnn-2"]
    assert cli.main(command(models[0], tmp_path / "out", "transfer", *flags)) == 0
    (row,) = read_json(tmp_path / "out" / "results.json")
    assert 0 < row["transfer"] <= row["natural"]


@pytest.mark.usefixtures("no_page")
def test_killed_and_resumed_to_the_same_outcomes(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 in a real process, in the middle of an attack; what it had found is not redone."""
    attacks = "natural pgd2 pgd200"
    weak = "--threat.eps", "0.02"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "gacd.cli", *command(models[0], killed, attacks, *weak)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while not list(killed.glob("model/evaluation/pgd200-*/*.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    found = {p: p.stat().st_mtime_ns for p in killed.glob("model/evaluation/pgd*/*.json")}
    assert 4 < len(found) < 8  # four batches of either attack
    assert not (killed / "model" / "record.json").exists()

    assert cli.main(command(models[0], killed, attacks, *weak)) == 0
    assert cli.main(command(models[0], whole, attacks, *weak)) == 0
    assert {p: p.stat().st_mtime_ns for p in found} == found
    ours, theirs = (
        Evaluation.load(out / "model" / "outcomes.safetensors") for out in (killed, whole)
    )
    assert ours.settings == theirs.settings
    for name in attacks.split():
        assert torch.equal(ours.robust[name], theirs.robust[name])
    assert 0 < ours.accuracy("pgd200") < ours.accuracy("natural")

    capsys.readouterr()
    assert cli.main(["compare", str(killed), str(whole), "--json"]) == 0
    pairs = json.loads(capsys.readouterr().out)["attacks"]
    assert [pair["p"] for pair in pairs.values()] == [1.0] * 4


def test_what_a_network_cost_goes_with_it_and_nothing_is_made_up(
    models: tuple[Path, Path], no_page: None, tmp_path: Path
) -> None:
    trained = tmp_path / "trained.safetensors"
    model, about = load_model(models[0])
    spent = {"seconds": 7.0, "images": 10, "cost": {"flops": 3.0}}
    save_model(trained, model, about | {"spent": spent})
    for path in (trained, models[0]):
        assert cli.main(command(path, tmp_path / path.stem, "natural")) == 0
    known, unknown = (
        read_json(tmp_path / name / "model" / "record.json") for name in ("trained", "ours")
    )
    assert (known["train_seconds"], known["train_flops"]) == (7.0, 3.0)
    assert "train_seconds" not in unknown
    assert load_meta(tmp_path / "trained" / "model" / "model.safetensors")["spent"]["images"] == 10


def test_a_radius_of_the_wrong_norm_is_noted(
    models: tuple[Path, Path], no_page: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for eps, noted in (("8/255", True), ("0.5", False)):
        words = command(models[0], tmp_path / eps[0], "natural")
        words[words.index("0.1")] = eps
        assert cli.main([*words, "--threat.norm", "l2"]) == 0
        assert ("an l2 eps of 0.0314 is next to nothing" in capsys.readouterr().out) is noted
    words = command(models[0], tmp_path / "step", "natural", "--evaluation.step_size", "2")
    assert cli.main(words) == 2
    assert "step_size is 2: " in capsys.readouterr().err


def test_test_images_are_enough(models: tuple[Path, Path], no_page: None, tmp_path: Path) -> None:
    test = load_splits("digits", seed=0).test
    for row, (image, label) in enumerate(zip(test.images[:30], test.labels[:30], strict=True)):
        folder = tmp_path / "mine" / "test" / str(int(label))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{row}.png")
    data = ("--data.name", "folder", "--data.root", str(tmp_path / "mine"))
    words = command(models[0], tmp_path / "out", "natural pgd3", *data)
    assert cli.main([*words, "--evaluation.workers", "1"]) == 0
    record = read_json(tmp_path / "out" / "model" / "record.json")
    some = test.subset(torch.arange(30))
    model, _ = load_model(models[0])
    found = evaluate(model, some, attacks=["natural"], threat=ThreatModel(eps=0.1))
    assert record["natural"] == pytest.approx(found.accuracy("natural"), abs=0.1)


def test_nothing_that_was_found_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "write_run_report", lambda *_, **__: None)
    monkeypatch.setattr(pyautoattack, "AutoAttack", QuickAutoAttack)
    net = create_model("digits-cnn-4", num_classes=10, channels=1, seed=0)
    save_model("own.safetensors", net, {"architecture": "digits-cnn-4"})
    asked = ["evaluate", "--checkpoint", "own.safetensors", *COMMON, "--attacks", "autoattack"]
    asked += ["--evaluation.eps_curve", "[0.05]", "--evaluation.autoattack_limit", "20"]
    asked += ["--out", "run"]
    assert cli.main(asked) == 0
    Path("run/model/record.json").unlink()  # killed just before it

    def again(*_: object, **__: object) -> None:
        pytest.fail("computed again")

    monkeypatch.setattr(robust_module._Run, "attack", again)
    monkeypatch.setattr(autoattack_module, "_attack_batch", again)
    assert cli.main(asked) == 0

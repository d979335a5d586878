"""`gacd transfer` and `gacd analyze` from end to end, in miniature."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from gacd import cli
from gacd.attacks.threat import ThreatModel
from gacd.commands import analyze as command
from gacd.data.load import load_splits
from gacd.evaluation import structure
from gacd.models import create_model
from gacd.models.checkpoints import load_model, save_model
from gacd.storage import read_json

SMALL = [
    *("--data.test_limit", "40", "--threat.eps", "0.1"),
    *("--fabric.accelerator", "cpu", "--fabric.precision", "32-true"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three networks that nobody trained."""
    folder = tmp_path_factory.mktemp("saved")
    for seed, (name, width) in enumerate({"teacher": 4, "ard": 2, "gacd": 4}.items()):
        architecture = f"digits-cnn-{width}"
        model = create_model(
            architecture, num_classes=10, channels=1, mean=(0.3,), std=(0.4,), seed=seed
        )
        meta = {"architecture": architecture, "method": name, "seed": seed}
        save_model(folder / f"{name}.safetensors", model, meta)
    return folder


def attacked_likeness(saved: Path, *, made_on: str | None, eps: float, steps: int) -> float:
    """CKA of gacd's features and the teacher's, of images attacked on one model or on its own."""
    test = load_splits("digits", seed=0, test_limit=40).test
    models = {name: load_model(saved / f"{name}.safetensors")[0] for name in ("teacher", "gacd")}
    features = []
    for name, model in models.items():
        x_adv = structure.perturbed(
            models[made_on or name], test.float_images(), test.labels,
            threat=ThreatModel(eps=eps), steps=steps, show_progress=False,
        )  # fmt: skip
        features.append(structure.outputs(model, x_adv).features)
    return structure.linear_cka(*features)


def analyze(saved: Path, out: Path, *more: str) -> int:
    students = [f"{name}={saved / name}.safetensors" for name in ("ard", "gacd")]
    teacher = str(saved / "teacher.safetensors")
    return cli.main(
        ["analyze", "--teacher", teacher, "--students", *students, "--out", str(out), *SMALL,
         "--steps", "2", *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def analyzed(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("analyzed") / "out"
    assert analyze(saved, out, "--classes", "3", "8", "--images", "30") == 0
    return out


def test_the_record_holds_what_the_models_say(saved: Path, analyzed: Path) -> None:
    record = read_json(analyzed / "analysis.json")
    test = load_splits("digits", seed=0, test_limit=40).test
    models = {
        name: load_model(saved / f"{name}.safetensors")[0].eval() for name in ("teacher", "gacd")
    }
    with torch.no_grad():
        logits = {n: m(test.float_images()).double().numpy() for n, m in models.items()}
        features = [m.forward_features(test.float_images()).numpy() for m in models.values()]
    found = record["correlations"]["gacd"]["natural"]
    expected = abs(np.corrcoef(logits["teacher"].T) - np.corrcoef(logits["gacd"].T))
    np.testing.assert_allclose(found["matrix"], expected, atol=1e-4)
    assert found["mean"] == pytest.approx(expected.mean(), abs=1e-4)
    assert found != record["correlations"]["gacd"]["attacked"]
    assert record["cka"]["gacd"]["natural"] == pytest.approx(
        structure.linear_cka(*(z.astype(np.float64) for z in features)), abs=1e-4
    )
    expected = attacked_likeness(saved, made_on=None, eps=0.1, steps=2)
    assert record["cka"]["gacd"]["attacked"] == pytest.approx(expected, abs=1e-4)
    classes = []
    for k in (3, 8):
        rows = (test.labels == k).nonzero().flatten()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        classes.append(test.float_images(rows[order]))
    aim = torch.full((len(classes[1]),), 3)
    threat = ThreatModel(eps=0.1)
    for name, model in models.items():
        pushed = structure.perturbed(
            model, classes[1], aim, targeted=True, threat=threat, steps=2, show_progress=False
        )
        shape = structure.geometry(
            *(structure.outputs(model, x).features for x in (*classes, pushed))
        )
        assert record["geometry"][name] == pytest.approx(asdict(shape), abs=1e-3)
    assert list(record["geometry"]) == ["teacher", "ard", "gacd"]
    assert record["pair"] == {"target": "3", "source": "8", "n_target": 4, "n_source": 4}
    sizes = {group: len(p) for group, p in record["embedding"]["points"]["ard"].items()}
    assert sizes == {"3": 4, "8": 4, "8, attacked": 4}
    assert record["embedding"]["perplexity"] == pytest.approx(11 / 3)  # 30 is too much for 12
    assert record["attack"]["step_size"] == pytest.approx(0.025)
    assert str(saved) not in (analyzed / "analysis.json").read_text()
    page = (analyzed / "report.html").read_text()
    assert page.count("<img ") == 2
    assert (analyzed / "figures" / "embedding.svg").is_file()


def test_images_made_on_the_teacher_and_one_embedding(saved: Path, tmp_path: Path) -> None:
    """The student that is the teacher itself differs from it in nothing, under any attack."""
    out = tmp_path / "out"
    teacher = saved / "teacher.safetensors"
    arguments = ["--attacked", "teacher", "--embedding", "joint", "--steps", "1", *SMALL]
    arguments += ["--threat.eps", "8/255"]
    command = ["analyze", "--teacher", str(teacher), "--students", f"twin={teacher}"]
    command.append(f"gacd={saved / 'gacd.safetensors'}")
    assert cli.main([*command, *arguments, "--out", str(out)]) == 0
    record = read_json(out / "analysis.json")
    assert "PGD-1 at linf ε = 8/255, made against" in (out / "report.html").read_text()
    assert record["correlations"]["twin"]["attacked"]["mean"] == 0
    assert record["cka"]["twin"]["attacked"] == pytest.approx(1)
    expected = attacked_likeness(saved, made_on="teacher", eps=8 / 255, steps=1)
    assert record["cka"]["gacd"]["attacked"] == pytest.approx(expected, abs=1e-5)
    own = attacked_likeness(saved, made_on=None, eps=8 / 255, steps=1)
    assert abs(own - expected) > 1e-4  # which it could be mistaken for
    assert record["embedding"]["kind"] == "joint"
    count = 3 * sum(map(len, record["embedding"]["points"]["twin"].values()))
    assert record["embedding"]["perplexity"] == pytest.approx(min(30, (count - 1) / 3))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--students", "gacd"], "NAME=FILE"),
        (["--students", "gacd=nothing.pt"], "nothing.pt: no such file"),
        (["--teacher", "nothing.pt"], "nothing.pt: no such file"),
        (["--classes", "3", "nine"], "unknown class of digits 'nine'"),
        (["--classes", "3"], "two different"),
        (["--embedding", "joint"], "one width"),
        (["--classes", "3", "3", "8"], "two different"),
    ],
)
def test_refusals_of_analyze(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    assert analyze(saved, tmp_path / "out", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_overwritten(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("run.json", "thesis.tex"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text("{}")
        assert analyze(saved, out) == 2
        assert "choose another --out" in capsys.readouterr().err
        assert [file.name for file in out.iterdir()] == [name]


def test_transfer_to_other_classes(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = saved / "gacd.safetensors"
    command = ["transfer", "--checkpoint", str(source), "--out", str(out), *SMALL]
    command += ["--data.classes", "[5, 6, 7]", "--data.train_limit", "150"]
    command += ["--linear_select", "natural"]
    assert cli.main(command) == 0
    network, meta = load_model(out / "transfer" / "model.safetensors")
    original = load_model(source)[0].eval()
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(network.eval().forward_features(x), original.forward_features(x))
    assert network.num_classes == 3 and meta["method"] == "gacd"

    record = read_json(out / "transfer" / "record.json")
    assert record["dataset"] == "digits (3 of 10 classes)"
    assert record["natural"] > 60 > 100 / 3
    assert record["pgd7"] < record["natural"]
    assert record["intervals"]["pgd7"][0] < record["pgd7"] < record["intervals"]["pgd7"][1]
    fit = read_json(out / "transfer" / "linear.json")
    assert fit["val_natural"] and not fit["val_robust"]  # no attack had a say
    assert record["train_seconds"] == round(fit["seconds"], 3) and fit["seconds"] > 0
    assert (
        read_json(out / "report.json")["title"]
        == "Features of gacd (digits-cnn-4) on digits (3 of 10 classes)"
    )
    before = (out / "transfer" / "record.json").read_bytes()
    assert cli.main(command) == 0  # nothing is done twice
    assert (out / "transfer" / "record.json").read_bytes() == before


def test_an_interrupted_transfer_goes_on(
    saved: Path, tmp_path: Path, attacked: Callable[..., int]
) -> None:
    command = ["transfer", "--checkpoint", str(saved / "gacd.safetensors"), *SMALL]
    command += ["--data.classes", "[5, 6, 7]", "--data.train_limit", "150", "--attacks", "natural"]
    assert cli.main([*command, "--out", str(tmp_path / "whole")]) == 0
    assert attacked(3) == 6
    again = [*command, "--out", str(tmp_path / "again")]
    assert cli.main(again) == 130
    attacked()
    assert cli.main(again) == 0
    assert attacked() == 4
    whole, resumed = (tmp_path / name / "transfer" for name in ("whole", "again"))
    files = [{file.name for file in folder.iterdir()} for folder in (whole, resumed)]
    assert files[0] == files[1] and "linear" not in files[0]
    networks = [(folder / "model.safetensors").read_bytes() for folder in (whole, resumed)]
    assert networks[0] == networks[1]
    fits = [read_json(folder / "linear.json") | {"seconds": 0} for folder in (whole, resumed)]
    assert fits[0] == fits[1] and len(fits[0]["val_robust"]) == 6


def test_a_public_checkpoint_needs_its_network_and_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "public.pt"
    torch.save(create_model("digits-cnn-2", num_classes=4, channels=1, seed=0).state_dict(), path)
    command = ["transfer", "--checkpoint", str(path), "--model", "digits-cnn-2", *SMALL]
    command += ["--data.train_limit", "60", "--data.classes", "0", "1", "--attacks", "natural"]
    assert cli.main([*command, "--out", str(tmp_path / "a")]) == 2
    assert "--num_classes" in capsys.readouterr().err
    assert cli.main([*command, "--num_classes", "4", "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "transfer" / "record.json").is_file()


def test_what_is_said_of_an_analysis_reaches_it(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, drawn = [], {}

    def perturbed(model, images, labels, *, targeted=False, **how):
        asked.append((len(images), how["seed"], how["step_size"], how["batch_size"]))
        return images

    def embed(rows, **how):
        drawn.update(how)
        return {name: each[:, :2] for name, each in rows.items()}

    monkeypatch.setattr(command, "perturbed", perturbed)
    monkeypatch.setattr(command, "embed", embed)
    said = "--classes 3 8 --images 3 --seed 5 --step_size 0.01 --batch_size 7 --perplexity 2"
    assert analyze(saved, tmp_path / "out", *said.split()) == 0
    assert asked == [(n, 5, 0.01, 7) for n in [3] * 3 + [40] * 3]
    assert drawn == {"joint": False, "perplexity": 2.0, "seed": 5}

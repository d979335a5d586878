"""Runs from end to end, in miniature: a teacher, students, their records, and coming back later."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from shutil import copy, copytree
from typing import Any

import pyautoattack
import pytest
import torch

from commands.conftest import DISTILL, METHODS, distill
from evaluation.conftest import QuickAutoAttack
from gacd import cli
from gacd.anchors import AnchorBank
from gacd.build import Given, from_checkpoint
from gacd.commands import training
from gacd.data.load import load_splits
from gacd.errors import UserError
from gacd.models import create_model
from gacd.models.checkpoints import load_model
from gacd.models.projection import Projection
from gacd.storage import load_meta, load_tensors, read_json


def test_results_have_a_row_for_every_model(finished: Path) -> None:
    results = read_json(finished / "results.json")
    assert [row["method"] for row in results] == ["pgd-at", *METHODS]
    assert [row["role"] for row in results] == ["teacher", "undefended", *["student"] * 14]
    for row in results:
        assert {"model", "method", "dataset", "seed", "n", "natural", "pgd2"} <= row.keys()
        assert (row["dataset"], row["seed"], row["n"]) == ("digits", 0, 40)
        assert (row["norm"], row["eps"]) == ("linf", 0.1)
        assert 0 <= row["pgd2"] <= row["natural"] <= 100
        assert row["natural"] * 40 / 100 == pytest.approx(round(row["natural"] * 40 / 100))
        low, high = row["intervals"]["natural"]
        assert low <= row["natural"] <= high
        assert row["model"] == ("digits-cnn-4" if row["role"] == "teacher" else "digits-cnn-2")
        assert row["train_seconds"] > 0
    teacher, student = results[0]["parameters"], results[1]["parameters"]
    assert student < teacher / 2
    assert (finished / "report.html").stat().st_size > 1000


def test_every_record_has_its_cost(finished: Path) -> None:
    """One step of attack: passes known by hand; two stages: the mean image, and the sum."""
    rows = {row["method"]: row for row in read_json(finished / "results.json")[1:]}
    passes = {name: list(row["cost"].values())[:5] for name, row in rows.items()}
    assert passes["natural"] == [1, 1, 0, 0, 0]
    assert passes["pgd-at"] == [2, 2, 1, 0, 0]
    assert passes["kd"] == passes["crd+kd"] == [1, 1, 0, 1, 0]
    assert passes["adaad"] == [2, 2, 1, 2, 1]
    assert passes["gacd"] == [3, 2, 1, 1, 0]
    for name in METHODS:
        stages = [read_json(path) for path in (finished / name).glob("**/done.json")]
        images = sum(stage["images"] for stage in stages)
        clocked = [*stages, *map(read_json, (finished / name).glob("linear.json"))]
        seconds = sum(stage["seconds"] for stage in clocked)
        if name == "gacd+aft":  # shares its features with gacd
            images += rows["gacd"]["train_images"]
            seconds += rows["gacd"]["train_seconds"]
        row = rows[name]
        assert row["train_images"] == images > 0
        assert row["train_seconds"] == pytest.approx(seconds, abs=2e-3)  # milliseconds, rounded
        assert row["cost"]["flops"] * images == pytest.approx(row["train_flops"], rel=1e-3)
    first, tuned = rows["gacd"], rows["gacd+aft"]
    fine_tuning = rows["pgd-at"]["cost"]["flops"]
    assert tuned["train_flops"] == pytest.approx(
        first["train_flops"] + fine_tuning * (tuned["train_images"] - first["train_images"])
    )


def test_every_stage_folder_is_whole(finished: Path) -> None:
    for name in ("teacher", *METHODS):
        folder = finished / name
        files = {file.name for file in folder.iterdir()}
        expected = {"record.json", "outcomes.safetensors", "model.safetensors"}
        if name in ("gacd", "regression"):
            assert (folder / "features" / "done.json").is_file()
            chosen = read_json(folder / "linear.json")  # by clean and attacked images
            assert len(chosen["val_robust"]) == len(chosen["val_natural"])
        else:
            expected |= {"best.safetensors", "done.json", "log.jsonl"}
        assert expected <= files, name
        assert not any(file.endswith(".tmp") or file.startswith("checkpoint") for file in files)
        record = read_json(folder / "record.json")
        assert {"evaluation", "config", "environment"} <= record.keys()
        assert record["eps_curve"][0][0] == 0.05
    assert (finished / "gacd+rslad+aft" / "distillation" / "done.json").is_file()
    text = "".join(file.read_text() for file in finished.rglob("*.json"))
    assert str(finished.parent) not in text  # records name no path of this machine


def test_the_saved_model_is_the_one_that_was_measured(finished: Path) -> None:
    test = load_splits("digits", test_limit=40, seed=0).test
    for name in ("teacher", "pgd-at", "gacd", "gacd+aft"):
        model, meta = load_model(finished / name / "model.safetensors")
        with torch.no_grad():
            right = (model.eval()(test.float_images()).argmax(1) == test.labels).float().mean()
        record = read_json(finished / name / "record.json")
        assert 100 * right.item() == pytest.approx(record["natural"]), name
        assert meta["architecture"] == record["model"]
        assert meta["classes"] == list("0123456789")
    stages = [finished / "gacd" / file for file in ("features/done.json", "linear.json")]
    spent = load_meta(finished / "gacd" / "model.safetensors")["spent"]["seconds"]
    assert spent == pytest.approx(sum(read_json(stage)["seconds"] for stage in stages))


def test_features_alone_do_not_classify(finished: Path, tmp_path: Path) -> None:
    """A classifier that nobody trained is neither measured nor asked; its features serve."""
    test = load_splits("digits", test_limit=40, seed=0).test
    features = finished / "gacd" / "features" / "model.safetensors"
    with pytest.raises(UserError, match=r"features alone.*network is .*/gacd/model\.safetensors"):
        from_checkpoint(features, Given(), test)
    alone = Path(copy(features, tmp_path))
    with pytest.raises(UserError, match=r"features alone.*; finish its run, or fit one"):
        from_checkpoint(alone, Given(), test)
    files, images = (alone, finished / "gacd" / "model.safetensors"), test.float_images()
    with torch.no_grad():
        own, fitted = (load_model(file)[0].eval().forward_features(images) for file in files)
    assert torch.equal(own, fitted)


@pytest.mark.usefixtures("no_page")
def test_what_is_said_of_a_stage_reaches_it_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, starts, fit = {}, {}, training.fit

    def noted(fabric: Any, method: Any, splits: Any, plan: Any, *, out: Path, name: str) -> Any:
        fitted[name] = method, splits, plan
        starts[name] = deepcopy(method.state_dict())
        return fit(fabric, method, splits, plan, out=out, name=name)

    monkeypatch.setattr(training, "fit", noted)
    stages = ("teacher.training", "training", "distillation", "finetune")
    said = [f"--{stage}.lr=0.0{n}" for n, stage in enumerate(stages, 1)]
    said += ["--seed", "3", "--data.val_fraction", "0.2", "--weights.ard", "0.5"]
    said += ["--kd.alpha", "0.25", "--gacd.anchors", "float16", "--finetune.awp_warmup", "0.5"]
    methods = ["--methods", "kd+ard", "kd+aft", "gacd+aft", "--out", str(tmp_path)]
    assert cli.main([*DISTILL, *said, *methods]) == 0

    assert {name: plan.lr for name, (_, _, plan) in fitted.items()} == {
        "teacher": 0.01, "kd+ard": 0.02, "kd+aft/distillation": 0.03, "kd+aft": 0.04,
        "gacd/features": 0.03, "gacd+aft": 0.04,
    }  # fmt: skip
    data = load_splits("digits", val_fraction=0.2, train_limit=200, test_limit=40, seed=3)
    images = data.train.float_images()
    for name, (method, splits, plan) in fitted.items():
        for part in ("train", "val", "test"):
            assert getattr(splits, part).fingerprint() == getattr(data, part).fingerprint()
        assert plan.seed == 3 and method.awp.warmup == (0.5 if name.endswith("+aft") else 0)
        assert method.student.mean.item() == pytest.approx(images.mean().item(), rel=1e-4)
        deviation = images.std(correction=0).item()
        assert method.student.std.item() == pytest.approx(deviation, rel=1e-4)
    fresh = ("teacher", "digits-cnn-4", 3), ("kd+ard", "digits-cnn-2", 4)
    for name, net, seed in (*fresh, ("gacd/features", "digits-cnn-2", 4)):
        for key, p in create_model(net, num_classes=10, channels=1, seed=seed).named_parameters():
            assert torch.equal(starts[name][f"student.{key}"], p), (name, key)
    projection = Projection(method.student.num_features, 128, seed=3).linear.weight
    begun = starts["gacd/features"]["terms.gacd.student_projection.linear.weight"]
    assert torch.equal(begun, projection)

    both, gacd = fitted["kd+ard"][0], fitted["gacd/features"][0].terms["gacd"]
    assert both.weights == {"kd": 1.0, "ard": 0.5} and both.terms["kd"].alpha == 0.25
    assert gacd.bank.features_MD.dtype == torch.float16 and gacd.anchors.negatives == 64
    tuned, head = fitted["gacd+aft"][0].student, starts["gacd+aft"]
    weight = tuned.get_classifier().weight
    assert not any(torch.equal(weight, value) for value in head.values())  # it trained, too


@pytest.mark.usefixtures("no_page")
def test_fine_tuning_may_have_another_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted, fit = {}, training.fit

    def noted(fabric: Any, method: Any, *rest: Any, name: str, **more: Any) -> Any:
        fitted[name] = method.weights
        return fit(fabric, method, *rest, name=name, **more)

    monkeypatch.setattr(training, "fit", noted)
    asked = [*DISTILL, "--methods", "kd+aft", "--out", str(tmp_path), "--finetune_method"]
    for wrong in ("gacd", "regression", "ard+aft", "kd"):
        assert cli.main([*asked, wrong]) == 2
        assert "does not train the whole student adversarially" in capsys.readouterr().err
    assert cli.main([*asked, "trades+rslad", "--weights.rslad", "0.5"]) == 0
    assert fitted["kd+aft/distillation"] == {"kd": 1.0}
    assert fitted["kd+aft"] == {"trades": 1.0, "rslad": 0.5}
    only = ["--methods", "kd", "--finetune.attack.objective", "teacher-kl"]  # which nobody reads
    assert cli.main([*DISTILL, *only, "--out", str(tmp_path / "kd")]) == 0


@pytest.mark.usefixtures("no_page")
def test_an_anchor_bank_of_another_run_is_taken_only_if_it_fits(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = tmp_path / "bank"
    bank.mkdir()
    copy(finished / "anchors.safetensors", bank)
    teacher = ["--teacher.checkpoint", str(finished / "teacher" / "model.safetensors")]
    shared = [*DISTILL, *teacher, "--teacher.evaluate", "false", "--bank", str(bank)]
    out = ["--methods", "gacd", "--out", str(tmp_path / "run")]
    assert cli.main([*shared, "--seed", "1", *out]) == 2
    said = capsys.readouterr()
    assert "another data" in said.err
    assert "is of seed 0: if it trained on these images" in said.out
    assert cli.main([*shared, *out[:-1], str(tmp_path / "same")]) == 0
    assert "is of seed 0" not in capsys.readouterr().out
    assert not (tmp_path / "same" / "anchors.safetensors").exists()
    other = ["--teacher.checkpoint", str(finished / "pgd-at" / "model.safetensors")]
    assert cli.main([*shared, *other, *out[:-1], str(tmp_path / "other")]) == 2
    assert "another teacher" in capsys.readouterr().err
    wide = ["--gacd.anchors", "float32"]  # both kinds may lie in one folder
    assert cli.main([*shared, *wide, *out[:-1], str(tmp_path / "wide")]) == 0
    assert AnchorBank.load(bank / "anchors-float32.safetensors").features_MD.dtype == torch.float32
    assert AnchorBank.load(bank / "anchors.safetensors").features_MD.dtype == torch.bfloat16


@pytest.mark.usefixtures("no_page")
def test_the_teacher_makes_images_for_its_students_and_not_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyautoattack, "AutoAttack", QuickAutoAttack)
    attacks = ["--attacks", "transfer", "autoattack", "--evaluation.autoattack_limit", "20"]
    assert cli.main([*DISTILL, *attacks, "--out", str(tmp_path), "--methods", "kd"]) == 0
    teacher, student = read_json(tmp_path / "results.json")
    assert "transfer" not in teacher and "transfer" in student
    assert teacher["autoattack_n"] == student["autoattack_n"] == 20
    checks = {
        name: [check["name"] for check in read_json(tmp_path / name / "diagnosis.json")]
        for name in ("teacher", "kd")
    }
    (more,) = set(checks["kd"]) - set(checks["teacher"])
    assert "transfer" in more and len(checks["teacher"]) == 6


@pytest.mark.usefixtures("no_page")
def test_the_second_call_does_nothing_and_new_methods_add_rows(
    tmp_path: Path, watched: Callable[[], list[str]]
) -> None:
    out = tmp_path / "run"
    assert distill(out, "kd") == 0
    assert watched() == ["fit teacher", "measure_row", "fit kd", "measure_row"]
    results = (out / "results.json").read_text()
    records = {path: path.stat().st_mtime_ns for path in out.glob("*/record.json")}

    watched().clear()
    assert distill(out, "kd") == 0
    assert not watched()
    assert (out / "results.json").read_text() == results

    assert distill(out, "kd", "gacd+aft") == 0
    assert watched() == ["fit gacd/features", "fit_head", "fit gacd+aft", "measure_row"]
    rows = [row["method"] for row in json.loads((out / "results.json").read_text())]
    assert rows == ["pgd-at", "kd", "gacd+aft"]
    assert all(path.stat().st_mtime_ns == time for path, time in records.items())

    watched().clear()
    assert distill(out, "gacd") == 0  # its features and its head are there already
    assert watched() == ["measure_row"]


@pytest.mark.usefixtures("no_page")
def test_the_order_of_the_methods_does_not_matter(finished: Path, tmp_path: Path) -> None:
    assert distill(tmp_path, "gacd+aft") == 0
    again = read_json(tmp_path / "results.json")[1]
    before = next(r for r in read_json(finished / "results.json") if r["method"] == "gacd+aft")
    for row in (again, before):
        del row["train_seconds"], row["timestamp"]
    assert again == before


@pytest.mark.usefixtures("no_page")
def test_an_interrupted_linear_layer_goes_on(
    finished: Path, tmp_path: Path, attacked: Callable[..., int]
) -> None:
    out = tmp_path / "run"
    row = copytree(finished, out) / "gacd"
    for name in ("linear.json", "model.safetensors"):
        (row / name).unlink()
    attacked(3)
    assert distill(out, "gacd") == 130
    assert len(list((row / "linear").iterdir())) == 2
    attacked()
    assert distill(out, "gacd") == 0
    assert attacked() == 4
    whole = finished / "gacd"
    files = [{file.name for file in folder.iterdir()} for folder in (row, whole)]
    assert files[0] == files[1] and "linear" not in files[0]
    now, before = (read_json(folder / "linear.json") for folder in (row, whole))
    assert now | {"seconds": 0} == before | {"seconds": 0}
    now, before = (load_tensors(folder / "model.safetensors")[0] for folder in (row, whole))
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], value) for key, value in before.items())

    (row / "linear").mkdir()  # killed between the network and its removal
    assert distill(out, "gacd") == 0
    assert not (row / "linear").exists() and not attacked()

"""What becomes of a finished network, and what a run may begin with instead of training one."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from commands.conftest import COMMON, DISTILL, METHODS, STAGES
from gacd import cli
from gacd.anchors import AnchorBank
from gacd.commands import run
from gacd.commands.rows import Spent
from gacd.data.load import load_splits
from gacd.errors import UserError
from gacd.models import create_model
from gacd.models.checkpoints import load_model, method_of, save_model
from gacd.storage import load_tensors, read_json, save_tensors


@pytest.mark.usefixtures("no_page")
def test_a_model_is_evaluated_and_a_later_one_of_the_same_name_is_not_mistaken_for_it(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(name: str) -> int:
        path = finished / name / "model.safetensors"
        return cli.main(
            ["evaluate", "--checkpoint", str(path), "--out", str(tmp_path / "out"), *COMMON]
        )

    assert evaluate("pgd-at") == evaluate("pgd-at") == 0
    (row,) = read_json(tmp_path / "out" / "results.json")
    record = read_json(finished / "pgd-at" / "record.json")
    assert (row["natural"], row["pgd2"], row["n"]) == (record["natural"], record["pgd2"], 40)
    assert (row["model"], row["method"]) == ("digits-cnn-2", "pgd-at")
    capsys.readouterr()
    assert evaluate("trades") == 2
    assert "holds another run (checkpoint is model.safetensors" in capsys.readouterr().err


def test_files_are_called_by_the_row_that_they_are_of(finished: Path) -> None:
    for method in METHODS:
        assert method_of(finished / method / "model.safetensors") == method
    assert method_of(finished / "teacher" / "model.safetensors") == "pgd-at"
    assert method_of(Path("somebody's.pt")) == "somebody's"


@pytest.mark.usefixtures("no_page")
def test_a_state_of_training_is_evaluated_as_its_network_is(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says its normalisation, but not which network it is of; the finished one does."""
    path, whole = (finished / "pgd-at" / f"{name}.safetensors" for name in ("best", "model"))
    asked = ["evaluate", "--checkpoint", str(path), *COMMON, "--out", str(tmp_path / "out")]
    assert cli.main(asked) == 2
    assert f"a state of training; the finished network is {whole}" in capsys.readouterr().err
    assert cli.main([*asked, "--model", "digits-cnn-2"]) == 0
    (row,) = read_json(tmp_path / "out" / "results.json")
    record = read_json(finished / "pgd-at" / "record.json")
    assert (row["natural"], row["pgd2"]) == (record["natural"], record["pgd2"])


@pytest.mark.usefixtures("no_page")
def test_a_public_checkpoint_is_evaluated(finished: Path, tmp_path: Path) -> None:
    model, _ = load_model(finished / "natural" / "model.safetensors")
    mean, std = model.mean.item(), model.std.item()
    with torch.no_grad():  # such files know nothing of our normalisation: its scale is folded in
        model.body[0].weight.div_(std)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "public.pt")
    public = ["--checkpoint", str(tmp_path / "public.pt"), "--model", "digits-cnn-2"]
    assert cli.main(["evaluate", *public, "--out", str(tmp_path / "out"), *COMMON]) == 0
    (row,) = read_json(tmp_path / "out" / "results.json")
    assert (row["model"], row["method"], row["n"]) == ("digits-cnn-2", "public", 40)
    test = load_splits("digits", test_limit=40, seed=0).test
    original, _ = load_model(finished / "natural" / "model.safetensors")
    with torch.no_grad():  # (x + mean - mean) / std is what the folded network computes
        answers = original.eval()(test.float_images() + mean).argmax(1)
    right = (answers == test.labels).float().mean()
    assert row["natural"] == pytest.approx(100 * right.item())


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("method", ["pgd-at", "trades"])
def test_a_model_is_fine_tuned(finished: Path, tmp_path: Path, method: str) -> None:
    path = finished / "natural" / "model.safetensors"
    stage = ["--training.epochs", "1", "--training.attack.steps", "1", "--method", method]
    stage += ["--source", str(finished / "teacher" / "model.safetensors")]
    command = ["finetune", "--checkpoint", str(path), "--out", str(tmp_path), *stage, *COMMON]
    assert cli.main(command) == 0
    assert method_of(tmp_path / "source" / "model.safetensors") == "pgd-at"
    (row,) = read_json(tmp_path / "results.json")
    assert row["method"] == f"{method} fine-tuned"
    before = read_json(finished / "natural" / "record.json")
    assert all(row[what] > before[what] for what in ("train_images", "train_flops"))
    tuned, _ = load_model(tmp_path / "finetuned" / "model.safetensors")
    start, _ = load_model(path)
    moved = [
        (tuned.state_dict()[name] - value).abs().max().item()
        for name, value in start.state_dict().items()
        if value.is_floating_point()
    ]
    assert all(0 < distance < 1 for distance in moved)


@pytest.mark.parametrize(("method", "awp", "forward"), [("natural", 0, 1), ("mart", 0.005, 14)])
def test_one_network_is_trained_and_reported(
    tmp_path: Path, method: str, awp: float, forward: int
) -> None:
    stage = ["--training.epochs", "1", "--training.batch_size", "32", "--method", method]
    stage += ["--training.awp", str(awp)]
    command = ["train", "--model", "digits-cnn-2", "--out", str(tmp_path), *stage, *COMMON]
    assert cli.main(command) == 0
    (row,) = read_json(tmp_path / "results.json")
    assert (row["model"], row["method"]) == ("digits-cnn-2", method)
    assert row["cost"]["student_forward"] == forward
    page = tmp_path / "report.html"
    page.unlink()
    assert cli.main(["report", "--out", str(tmp_path)]) == 0
    assert page.stat().st_size > 1000


@pytest.mark.usefixtures("no_page")
def test_a_teacher_from_a_file_is_not_trained(
    finished: Path, tmp_path: Path, watched: Callable[[], list[str]]
) -> None:
    path = finished / "teacher" / "model.safetensors"
    flags = ["--teacher.checkpoint", str(path), "--out", str(tmp_path), "--methods", "kd"]
    assert cli.main([*DISTILL, *flags]) == 0
    assert watched() == ["measure_row", "fit kd", "measure_row"]
    rows = {row["method"]: row for row in read_json(tmp_path / "results.json")}
    assert list(rows) == ["pgd-at", "kd"]
    results = read_json(finished / "results.json")
    before = {row["method"]: row for row in results if row["role"] != "teacher"}
    assert rows["kd"]["natural"] == before["kd"]["natural"]
    assert rows["kd"]["pgd2"] == before["kd"]["pgd2"]


@pytest.mark.usefixtures("no_page")
def test_a_teacher_from_a_file_is_called_by_what_the_file_says(
    finished: Path, tmp_path: Path
) -> None:
    path = finished / "natural" / "model.safetensors"
    flags = ["--teacher.checkpoint", str(path), "--out", str(tmp_path), "--methods", "kd"]
    assert cli.main([*DISTILL, *flags]) == 0
    teacher, _ = read_json(tmp_path / "results.json")
    assert (teacher["method"], teacher["role"]) == ("natural", "teacher")


@pytest.mark.usefixtures("no_page")
def test_evaluation_in_another_process_gives_the_same_figures(
    finished: Path, tmp_path: Path
) -> None:
    arguments = [*DISTILL, "--out", str(tmp_path), "--methods", "kd", "--evaluation.workers", "1"]
    assert cli.main(arguments) == 0
    for name in ("teacher", "kd"):
        ours, theirs = (read_json(out / name / "record.json") for out in (tmp_path, finished))
        assert ours["evaluation"] == theirs["evaluation"]
        assert ours["eps_curve"] == theirs["eps_curve"]


def dies(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("no_page")
def test_an_evaluating_process_that_is_killed_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by a system whose memory is short; the pool itself would wait for ever."""
    arguments = [*DISTILL, "--out", str(tmp_path), "--methods", "kd", "--evaluation.workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(run, "measure_row_elsewhere", dies)
        assert cli.main(arguments) == 2
    assert "a process that evaluates was killed" in capsys.readouterr().err
    assert cli.main(arguments) == 0


BUSY = """
import os, time
from multiprocessing import get_context
from gacd.commands.rows import begin_worker

pool = get_context("spawn").Pool(1, initializer=begin_worker)
pool.apply(os.getpid)
pool.apply_async(time.sleep, (600,))
print("busy", flush=True)
time.sleep(600)
"""


def test_an_evaluating_process_ends_with_the_command_that_was_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"busy\n"
        process.kill()
        process.communicate(timeout=30)  # the worker holds the pipe open until it ends


def test_the_speedrun_in_miniature(tmp_path: Path, no_page: None) -> None:
    """The command with its own recipe, on the digits: the schedule's shape, other sizes."""
    sizes = ["--data.name", "digits", "--fabric.compile", "false", "--gacd.negatives", "64"]
    models = ["--teacher.model", "digits-cnn-4", "--student", "digits-cnn-2"]
    out = tmp_path / "run"
    assert cli.main(["speedrun", *sizes, *models, *COMMON, *STAGES, "--out", str(out)]) == 0
    rows = {row["method"]: row for row in read_json(out / "results.json")}
    assert list(rows) == ["gacd+aft"]
    recipe = read_json(out / "run.json")
    assert recipe["teacher"]["method"] == "trades"
    for stage in ("distillation", "finetune"):
        assert recipe[stage]["schedule"] == "one-cycle"


def test_streamed_training_is_that_of_memory(
    tmp_path: Path, no_page: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights to the bit, from class folders on disk and from memory; bank mapped."""
    data = load_splits("digits", seed=0).test
    for part, rows in (("train", range(90)), ("test", range(90, 120))):
        for row in rows:
            path = tmp_path / "data" / part / str(int(data.labels[row])) / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.images[row, 0].numpy()).save(path)
    moved, to = [], AnchorBank.to
    monkeypatch.setattr(AnchorBank, "to", lambda *a: moved.append(a) or to(*a))

    def run(stream: str, workers: str = "1") -> dict[str, torch.Tensor]:
        arguments = [
            *DISTILL, "--data.name", "folder", "--data.root", str(tmp_path / "data"),
            "--data.stream", stream, "--data.workers", workers, "--gacd.estimator", "sampled",
            "--data.train_limit", "80", "--data.test_limit", "20", "--methods", "gacd",
            "--out", str(tmp_path / stream),
        ]  # fmt: skip
        assert cli.main(arguments) == 0
        return load_tensors(tmp_path / stream / "gacd" / "model.safetensors")[0]

    streamed = run("true")
    assert not moved
    held = run("false")
    assert moved
    assert streamed.keys() == held.keys()
    for name, value in streamed.items():
        assert torch.equal(value, held[name]), name
    run("true", workers="0")  # the same run, read by another number of processes


def test_streamed_data_needs_sampled_anchors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*DISTILL, "--data.name", "folder", "--data.root", str(tmp_path)]
    assert cli.main([*arguments, "--data.stream", "true", "--out", str(tmp_path / "run")]) == 2
    assert "say --gacd.estimator sampled" in capsys.readouterr().err
    crd = ["--methods", "crd", "--data.stream", "true", "--out", str(tmp_path / "crd")]
    assert cli.main([*arguments, *crd]) == 2  # there are no images; it draws its anchors anyway
    assert "estimator" not in capsys.readouterr().err


@pytest.mark.parametrize("spent", [3, {"seconds": 1.0}, {"seconds": "x", "images": 1, "cost": {}}])
def test_what_a_network_cost_must_be_figures(tmp_path: Path, spent: object) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, {}, {"spent": spent})
    with pytest.raises(UserError, match=r"model\.safetensors: not written by .* \(.*spent"):
        Spent.read(path)


@pytest.mark.parametrize(
    ("words", "flag", "row"),
    [
        ("evaluate --checkpoint", "", "model"),
        ("finetune --training.epochs=1 --training.attack.steps=1 --checkpoint", "", "finetuned"),
        ("transfer --num_classes 10 --checkpoint", "", "transfer"),
        ("distill --methods natural --teacher.checkpoint", "teacher.", "teacher"),
        ("evaluate --checkpoint own.safetensors --source", "source_", "source"),
    ],
)
def test_what_a_public_network_is_normalised_by_reaches_it(
    words: str, flag: str, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "write_run_report", lambda *_, **__: None)
    net = create_model("digits-cnn-2", num_classes=10, channels=1, mean=(0.3,), std=(0.4,), seed=0)
    save_model("own.safetensors", net, {"architecture": "digits-cnn-2"})
    torch.save(net.state_dict(), "theirs.pt")
    said = f"--{flag}model digits-cnn-2 --{flag}mean 0.3 --{flag}std 0.4".split()
    student = [*STAGES, "--student", "digits-cnn-2"]
    stages = student if words.startswith("distill") else []
    assert cli.main([*words.split(), "theirs.pt", *said, *COMMON, *stages, "--out", "run"]) == 0
    found = load_model(Path(f"run/{row}/model.safetensors"))[0]
    assert found.mean is not None and found.std is not None
    assert (found.mean.item(), found.std.item()) == pytest.approx((0.3, 0.4))

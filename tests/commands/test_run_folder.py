"""Whose a run folder is: other runs, other processes, damaged files, full disks."""

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError

from command_line import TINY, TRAIN, folders, refusal
from gacd import build, cli
from gacd.storage import read_json, write_json

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_a_folder_of_another_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    said = refusal(capsys, *TRAIN, "--out", "mine", "--seed", "1")
    assert said == (
        "mine holds another run (seed is 0 there and 1 here): "
        "choose another --out, or delete that folder"
    )
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    said = refusal(capsys, *TRAIN, "--out", "thesis")
    assert said == "thesis holds files of something else (no run.json): choose another --out"
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".run.json.7.tmp").touch()
    assert cli.main([*TRAIN, "--out", "killed"]) == 0  # what a kill left of the first file
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_a_start_that_is_gone_is_not_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Also in a folder that began with it, and before any image is read."""
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    file = Path("mine/pgd-at/model.safetensors")
    flags = ["--checkpoint", str(file), *TINY]
    assert cli.main(["evaluate", *flags, "--out", "found"]) == 0
    file.unlink()
    assert refusal(capsys, "evaluate", *flags, "--out", "found") == f"{file}: no such file"
    folder = ["--data.name", "folder", "--data.root", "nowhere"]
    for command, flag in (("finetune", "--source"), ("distill", "--teacher.checkpoint")):
        assert refusal(capsys, command, flag, "gone.pt", *folder) == "gone.pt: no such file"
    Path("public.pt").touch()
    said = refusal(capsys, "evaluate", "--checkpoint", "public.pt", "--out", "public")
    assert said.startswith("public.pt: say which network it is with --model, such as")


def test_data_that_changed_are_another_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Also where only a test image did: half of the verdicts would be of the other one."""
    folders(tmp_path / "pets")
    pets = ["--data.name", "folder", "--data.root", "pets", "--training.batch_size", "4"]
    start = [*TRAIN, *pets, "--out", "mine"]
    assert cli.main(start) == 0
    Image.new("RGB", (8, 8), (9, 200, 9)).save(tmp_path / "pets" / "test" / "cat" / "0.png")
    assert "mine holds another run (images is " in refusal(capsys, *start)


def test_validation_images_that_changed_are_another_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They choose the checkpoint. A folder of before they were noted goes on."""
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    path = Path("mine/run.json")
    settings = read_json(path)
    write_json(path, {k: v for k, v in settings.items() if k != "val_images"})
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    assert read_json(path) == settings
    write_json(path, settings | {"val_images": "1f"})
    assert "mine holds another run (val_images is 1f there" in refusal(
        capsys, *TRAIN, "--out", "mine"
    )


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A run does without: a file that says "locked" would outlive a killed process."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    message = refusal(capsys, "study", "run", "figure5", "--scale", "tiny", "--out", "study")
    assert "this file system has no locks" in message


def test_a_finished_network_whose_training_is_gone_is_taken_as_it_is() -> None:
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    network = Path("mine/pgd-at/model.safetensors")
    before = network.stat().st_mtime_ns
    Path("mine/pgd-at/best.safetensors").unlink()
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    assert network.stat().st_mtime_ns == before
    assert not Path("mine/pgd-at/best.safetensors").exists()


def test_a_folder_that_another_process_has_just_begun_stays_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    for path in Path("mine").iterdir():  # as it is before the first stage
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "run.json":
            path.unlink()
    begun = Path("mine/run.json").read_text()
    with FileLock("mine/.lock"):
        said = refusal(capsys, *TRAIN, "--out", "mine", "--seed", "1")
    assert "another process is at work there" in said
    assert Path("mine/run.json").read_text() == begun
    assert cli.main([*TRAIN, "--out", "mine", "--seed", "1"]) == 0  # nobody is any more


def test_one_process_at_a_time_in_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--training.epochs", "100000", "--out", "mine"]
    first = subprocess.Popen(
        [sys.executable, "-m", "gacd.cli", *TRAIN, *more], stderr=subprocess.DEVNULL
    )
    try:
        while not Path("mine/pgd-at/log.jsonl").is_file():
            assert first.poll() is None
            time.sleep(0.1)
        said = refusal(capsys, *TRAIN, *more)
        assert (
            said == "mine: another process is at work there; wait for it, or choose another --out"
        )
    finally:
        first.kill()
        first.wait()
    (Path("mine/run.json")).unlink()  # of a run that would never end
    shutil.rmtree("mine/pgd-at")
    assert cli.main([*TRAIN, "--out", "mine"]) == 0  # the dead process holds nothing


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "[]", "run.json is damaged, .*: choose another --out, or delete that folder"),
        ("run.json", '{"seed"', "run.json is damaged"),
        ("run.json", '{"seed": 0, "data": {}, "methods": null}', "run.json is damaged"),
        ("pgd-at/done.json", '{"seconds": "x"}', "done.json: not written by this package; delete"),
        ("pgd-at/record.json", "{}", "record.json: not written by this package; delete it and run"),
        ("report.json", "[]", "report.json: not written by this package"),
        ("pgd-at/done.json", "3", "done.json: not written by this package; delete it and run"),
        ("pgd-at/best.safetensors", "x", "best.safetensors: trunc.* delete it and run the same co"),
    ],
)
def test_damaged_files_of_a_run(
    capsys: pytest.CaptureFixture[str], file: str, content: str, message: str
) -> None:
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    (Path("mine") / file).write_text(content)
    if file == "report.json":
        assert re.search(message, refusal(capsys, "report", "mine"))
        return
    assert re.search(message, refusal(capsys, *TRAIN, "--out", "mine"))
    if "delete it" in message:
        (Path("mine") / file).unlink()
        assert cli.main([*TRAIN, "--out", "mine"]) == 0


def test_a_network_cut_short_is_made_again_as_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    model = Path("mine/pgd-at/model.safetensors")
    model.write_bytes(model.read_bytes()[:100])
    Path("mine/pgd-at/record.json").unlink()
    said = "(in a run's folder: delete it and run that command again)"
    assert refusal(capsys, *TRAIN, "--out", "mine").endswith(said)
    model.unlink()
    assert cli.main([*TRAIN, "--out", "mine"]) == 0


def test_a_mistyped_command_does_not_occupy_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown model" in refusal(capsys, *TRAIN, "--model", "digit-cnn", "--out", "mine")
    assert cli.main([*TRAIN, "--out", "mine"]) == 0


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


@pytest.mark.parametrize(
    ("where", "what", "named"),
    [
        ("pathlib.Path.replace", full, "run.json: "),
        ("safetensors.torch.save_file", full_in_rust, r"\.safetensors: "),
        ("torch.utils.tensorboard.SummaryWriter", full, ""),  # of no writer of ours
    ],
)
def test_no_disk_space(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    what: object,
    named: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, what)
        said = refusal(capsys, *TRAIN, "--out", "mine")
    assert re.search(named + "no space left on the disk; free some and run the same command", said)
    assert cli.main([*TRAIN, "--out", "mine"]) == 0


def test_a_run_goes_on_in_the_precision_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine for which another one would be faster."""
    at = TRAIN.index("--fabric.precision")
    command = [*TRAIN[:at], *TRAIN[at + 2 :], "--out", str(tmp_path / "run")]
    kept = []
    for fast in (True, False):
        monkeypatch.setattr(build, "fast_bf16", lambda device, fast=fast: fast)
        assert cli.main(command) == 0
        kept.append(read_json(tmp_path / "run" / "run.json")["fabric"]["precision"])
    assert kept == ["bf16-mixed", "bf16-mixed"]
    record = read_json(tmp_path / "run" / "pgd-at" / "record.json")
    assert record["config"]["fabric"]["precision"] == "bf16-mixed"
    assert cli.main([*command[:-1], str(tmp_path / "anew")]) == 0
    assert read_json(tmp_path / "anew" / "run.json")["fabric"]["precision"] == "32-true"
    said = refusal(capsys, *command, "--fabric.precision", "32-true")
    assert "fabric.precision is bf16-mixed there and 32-true here" in said

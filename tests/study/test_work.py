"""Studies in miniature, in real processes: each cell once, whatever happens to the workers."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from gacd import cli
from gacd import config as c
from gacd.storage import write_json
from gacd.study import work
from gacd.study.status import status
from made_up import parsed

BEGUN = re.compile(r"\[\d+/\d+\] ")
STAGE = {"epochs": 1, "batch_size": 32, "lr": 0.1, "attack": {"steps": 1, "step_size": 0.05}}
MINIATURE: dict[str, Any] = {
    "data": {"name": "digits", "pad": 1, "flip": False, "train_limit": 100, "test_limit": 20},
    "second_data": None,
    "main_pair": ["digits-cnn-4", "digits-cnn-2"],
    "table1_pairs": [["digits-cnn-4", "digits-cnn-2"]],
    "rivals": ["pgd-at", "gacd+aft"],
    "epochs": {},
    "gacd": {"negatives": 64},
    "evaluation": {"attacks": ["natural", "pgd2"]},
    **dict.fromkeys(("teacher", "training", "distillation", "finetune"), STAGE),
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "miniature.yaml"
    path.write_text(yaml.safe_dump(MINIATURE))
    return path


def arguments(recipe: Path, out: Path, study: str, *flags: str) -> list[str]:
    return ["study", "run", study, "--config", str(recipe), "--out", str(out), *flags]


def configured(recipe: Path, out: Path, study: str, *flags: str) -> c.Study:
    return parsed(*arguments(recipe, out, study, *flags)[1:])


def command(recipe: Path, out: Path, study: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "gacd.cli", *arguments(recipe, out, study, *flags)]


def records(out: Path) -> dict[str, Any]:
    return {
        p.parent.parent.name: json.loads(p.read_text()) for p in out.glob("cells/*/*/record.json")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A study done by two workers at once, its recipe, and what they said."""
    out = tmp_path_factory.mktemp("study")
    recipe = out / "miniature.yaml"
    recipe.write_text(yaml.safe_dump(MINIATURE))
    run = command(recipe, out / "study", "rivals", "--workers", "2")
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "study", recipe, done.stdout


@pytest.fixture
def copied(finished: tuple[Path, Path, str], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of that study, to be spoilt, and its recipe."""
    out, recipe, _ = finished
    return Path(shutil.copytree(out, tmp_path / "copy")), recipe


def test_two_workers_do_every_cell_once(finished: tuple[Path, Path, str]) -> None:
    out, recipe, said = finished
    cells = {result.key: result for result in work.results(configured(recipe, out, "rivals"))}
    assert len(cells) == 3
    begun = [line for line in said.splitlines() if BEGUN.match(line)]
    assert (
        len(begun) == len({line.split("(")[-1] for line in begun}) == 4
    )  # and gacd, to start from
    for result in cells.values():
        assert result.record is not None and result.record["seed"] == 0
        assert 0 <= result.record["pgd2"] <= result.record["natural"] <= 100
        assert (result.folder / "outcomes.safetensors").is_file()


def test_what_is_done_is_not_done_again(
    finished: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe, _ = finished
    before = {
        p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".json", ".safetensors")
    }
    assert cli.main(arguments(recipe, out, "rivals")) == 0
    assert not any(BEGUN.match(line) for line in capsys.readouterr().out.splitlines())
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_study_goes_on_elsewhere_from_its_records_and_teachers(
    finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    out, recipe, _ = finished
    committed = tmp_path / "repository"
    shutil.copytree(out, committed)
    subprocess.run(["git", "init", "-q"], cwd=committed, check=True)
    subprocess.run(["git", "add", "-A"], cwd=committed, check=True)
    subprocess.run(["git", "clean", "-qfdX"], cwd=committed, check=True)  # what git does not keep
    kept = list(committed.rglob("*.safetensors"))
    assert {p.name for p in kept} == {"model.safetensors", "outcomes.safetensors"}
    assert sum(p.name == "model.safetensors" for p in kept) == 2  # the teacher, and pgd-at
    before = records(committed)
    cfg = configured(recipe, committed, "figure5")
    work.run(cfg)
    assert {key: records(committed)[key] for key in before} == before
    assert all(result.record is not None for result in work.results(cfg))


def test_a_killed_workers_cell_is_taken_up_again(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    longer = ["--teacher.epochs", "60", "--rivals", "[pgd-at]"]
    worker = subprocess.Popen(command(recipe, out, "rivals", *longer), stdout=subprocess.DEVNULL)
    try:
        cfg = configured(recipe, out, "rivals", *longer)
        deadline = time.monotonic() + 120
        while not list(out.rglob("checkpoint.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.05)
        counts = status(cfg).counts["rivals"]
        assert (counts["running"], counts["waiting"]) == (1, 1)
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    counts = status(cfg).counts["rivals"]
    assert (counts["running"], counts["waiting"]) == (0, 2)
    [log] = out.rglob("log.jsonl")
    begun = log.read_text().splitlines()
    work.run(cfg)
    assert log.read_text().splitlines()[: len(begun) - 1] == begun[:-1]  # resumed, not begun anew
    assert status(cfg).counts["rivals"]["done"] == 2


def test_workers_do_not_outlive_the_process_that_started_them(recipe: Path, tmp_path: Path) -> None:
    run = command(recipe, tmp_path / "study", "rivals", "--workers", "2")
    study = subprocess.Popen(run, stdout=subprocess.PIPE, text=True)
    assert study.stdout is not None
    while not BEGUN.match(study.stdout.readline()):
        assert study.poll() is None
    study.kill()  # it alone
    study.communicate(timeout=120)  # until nobody holds the pipe
    assert len(records(tmp_path / "study")) < 2  # what was begun, at most


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_of_one_process_stops_all(recipe: Path, tmp_path: Path, number: int) -> None:
    # A shell starts what it puts into the background with interrupts ignored: not so in this test.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = command(recipe, tmp_path / "study", "rivals", "--workers", "2", "--seeds", *"01234567")
    study = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert study.stdout is not None
    begun = 0
    while begun < 2:
        begun += bool(BEGUN.match(study.stdout.readline()))
        assert study.poll() is None
    study.send_signal(number)  # to it alone, as `kill` does
    _, said = study.communicate(timeout=240)
    assert study.returncode == 130
    assert "Traceback" not in said
    assert len(records(tmp_path / "study")) < 12  # of 24


def test_a_scale_in_a_file_of_ones_own_is_that_scale(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("scale: small\nseeds: [0, 1]\n")
    cfg = cli.parse("study", ["list", "--config", str(path)])
    assert cfg == cli.parse("study", ["list", "--scale", "small", "--seeds", "0", "1"])
    assert cfg.main_pair == ["wrn-10-2", "wrn-10-1"]
    assert cli.parse("study", ["list", f"--config={path}", "--scale", "tiny"]).scale == "tiny"


def test_a_cell_that_fails_says_why_and_holds_up_only_what_starts_from_it(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    broken = ["--rivals", "[pgd-at, kd]", "--teacher.lr", "1e30"]
    assert cli.main(arguments(recipe, out, "rivals", *broken)) == 2
    said = capsys.readouterr()
    assert "gacd: cells that failed: 1, that could not begin: 1" in said.err
    assert "Traceback" not in said.err
    cfg = configured(recipe, out, "rivals", *broken)
    found = status(cfg)
    assert found.counts["rivals"] == {"done": 1, "running": 0, "failed": 1, "waiting": 1}
    [reason] = found.reasons.values()
    assert "infinite or NaN" in reason
    assert found.hours is not None and found.hours > 0
    asked = arguments(recipe, out, "rivals", *broken)
    assert cli.main(["study", "status", *asked[2:]]) == 0
    assert "infinite or NaN" in capsys.readouterr().out


def test_the_hours_left_are_those_of_finished_cells_of_the_kind(
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    copy, recipe = copied
    cfg = configured(recipe, copy, "rivals", "--seeds", "0", "1")
    folder, cells = work.Folder(copy), [entry.cell for entry in work.chosen(cfg)]
    assert len(list(copy.glob("cells/*.json"))) == 4  # gacd, from which gacd+aft starts, is one
    for cell, seconds in zip(cells[:3], (3600, 360, 36), strict=True):
        write_json(folder.about(cell), {**cell.identity, "seconds": seconds})
    unknown = (1 + 0.1 + 0.01) / 3  # the other seed's gacd: such cells are not listed
    assert status(cfg).hours == pytest.approx(1 + 0.1 + 0.01 + unknown)

    said = []
    for seeds in (["0"], ["0", "1"]):
        words = ["rivals", "--config", str(recipe), "--seeds", *seeds]
        assert cli.main(["study", "list", *words]) == 0
        said.append(capsys.readouterr().out.splitlines()[0])
    assert said[0] == said[1] and "  3 cells a seed" in said[0]


def test_what_only_others_start_from_fails_aloud(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher is no entry of Figure 5, but nothing there can begin without it."""
    out = tmp_path / "study"
    broken = ["--teacher.lr", "1e30"]
    assert cli.main(arguments(recipe, out, "figure5", *broken)) == 2
    assert "cells that failed: 1, that could not begin: 4" in capsys.readouterr().err
    found = status(configured(recipe, out, "figure5", *broken))
    assert found.counts["figure5"] == {"done": 0, "running": 0, "failed": 0, "waiting": 1}
    [reason] = found.reasons.values()
    assert "infinite or NaN" in reason


def test_cells_measured_in_processes_of_their_own(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    flags = ["--rivals", "[pgd-at]", "--evaluation.workers", "1"]
    cfg = configured(recipe, out, "rivals", *flags)
    work.run(cfg)
    assert all(result.record is not None for result in work.results(cfg))
    assert not list(out.rglob("*.failed.json"))


def test_status_of_nothing_makes_nothing(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "mistyped"
    assert status(configured(recipe, out, "rivals")).counts["rivals"]["waiting"] == 3
    assert not out.exists()


def test_status_only_looks(copied: tuple[Path, Path]) -> None:
    """Also where cells are left to do: who looks may not be allowed to write."""
    copy, recipe = copied
    for lock in copy.glob("cells/*.lock"):
        lock.unlink()
    before = sorted(copy.rglob("*"))
    assert status(configured(recipe, copy, "rivals", "--seeds", "0", "1")).counts["rivals"] == {
        "done": 3, "running": 0, "failed": 0, "waiting": 3,
    }  # fmt: skip
    assert sorted(copy.rglob("*")) == before


def test_a_report_of_cells_that_nobody_ran_is_refused(
    finished: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe, _ = finished
    asked = arguments(recipe, out, "rivals", "--seeds", "7")
    assert cli.main(["study", "report", *asked[2:]]) == 2
    assert "has no finished cell of this study" in capsys.readouterr().err
    assert not (out / "report.html").exists()


def test_cells_run_under_other_defaults_are_refused(
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    copy, recipe = copied
    for path in copy.glob("cells/*.json"):
        about = json.loads(path.read_text())
        about["settings"]["threat"]["norm"] = "l2"
        path.write_text(json.dumps(about))
    assert cli.main(arguments(recipe, copy, "rivals")) == 2
    assert "threat.norm was l2 by default, now it is linf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["run", "tabel1"], "unknown study 'tabel1': did you mean 'table1'?"),
        (["rnu"], "unknown action 'rnu'"),
        (["run", "--scale", "huge"], "unknown scale 'huge'"),
        (["run", "--seeds", "[]"], "seeds are [], but must be different numbers, such as 0 1"),
        (["run", "--transfer_to", "[{rooot: x}]"], "'rooot' is no setting of data"),
        (["list", "figure3", "--correlations_pair", "[wrn-10-1]"], "a pair is a teacher and a"),
        (["list", "--negatives", "0"], "each of negatives and temperatures is 0"),
        (["list", "--transfer_to", "[{size: abc}]"], "are no settings of data (size is 'abc')"),
        (["list", "--second_data", "{train_limit: many}"], "(train_limit is 'many')"),
        (["list", "--seeds", "0", "0"], "seeds are [0, 0], but must be different"),
        (["list", "figure3", "--correlations_pair", "[]"], "correlations_pair is empty"),
        (["list", "figure5", "--analyzed_images", "1"], "images is 1, but must be at least 2"),
        (["list", "table3", "--evaluation.attacks", "transfer"], "'transfer' needs a model"),
        (["run", "--main_pair", "a", "b"], "unknown model 'a'"),
        (["run", "figure2", "--main_pair", "digits-cnn-4", "b"], "unknown model 'b'"),
        (["run", "--main_pair", "wrn-11-2", "wrn-10-1"], "no WideResNet has depth 11"),
        (["run", "table4", "--transfer_to", "[{name: digit}]"], "did you mean 'digits'?"),
        (["run", "--evaluation.attacks", "pdg20"], "unknown attack 'pdg20'"),
        (["list", "--epochs.rslda", "3"], "unknown method 'rslda': did you mean 'rslad'?"),
    ],
)
def test_refusals(
    given: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["study", *given]) == 2
    assert message in capsys.readouterr().err


def test_files_that_are_not_ours_are_named_and_reasons_that_are_lost_are_not_missed(
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    copy, recipe = copied
    cfg = configured(recipe, copy, "rivals")
    cell, other = (entry.cell for entry in work.chosen(cfg)[:2])
    folder = work.Folder(copy)
    (folder.of(other) / other.record).unlink()
    folder.failure(other).write_text("{")
    assert status(cfg).reasons == {other.key: "unknown"}
    folder.failure(other).unlink()
    for path in (folder.about(cell), folder.of(cell) / cell.record):
        before = path.read_text()
        path.write_text("{}")
        for action in ("status", "run") if path == folder.about(cell) else ("report",):
            asked = arguments(recipe, copy, "rivals")
            assert cli.main(["study", action, *asked[2:]]) == 2
            assert f"{path}: not written by this package" in capsys.readouterr().err
        path.write_text(before)


def test_a_cell_on_several_processes_goes_as_far_as_is_asked_and_says_why_it_fails(
    recipe: Path, tmp_path: Path
) -> None:
    ranks = ["--fabric.devices", "2", "--fabric.strategy", "ddp", "--fabric.accelerator", "cpu"]
    out = tmp_path / "study"
    cfg = configured(recipe, out, "figure2", "--negatives", "[8]", *ranks)
    folder, entry = work.Folder(out), work.chosen(cfg)[0]
    folder.root.mkdir(parents=True)
    teacher = entry.cell.parents["source"]
    assert work._do(folder, work.Task(teacher, "model"), cfg.fabric)
    assert (folder.of(teacher) / teacher.model).is_file()
    assert not (folder.of(teacher) / teacher.record).exists()
    broken = configured(
        recipe, out, "rivals", "--rivals", "[pgd-at]", "--teacher.lr", "1e30", *ranks
    )
    cell = work.chosen(broken)[0].cell
    assert not work._do(folder, work.Task(cell, "record"), broken.fabric)
    reason = json.loads(folder.failure(cell).read_text())["reason"]
    assert "ended with exit code 2: pgd-at: the loss or its gradient became infinite" in reason

"""A finished run under other evaluation settings: nothing trains, every row is measured again."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyautoattack
import pytest

from command_line import TRAIN, refusal
from commands.conftest import DISTILL, distill
from evaluation.conftest import QuickAutoAttack
from gacd import cli
from gacd import config as c
from gacd.commands.identity import claim
from gacd.errors import UserError
from gacd.storage import read_json

MORE = ["--attacks", "natural", "pgd2", "pgd3"]
MADE_ANEW = ("timestamp", "seconds", "train_seconds")


def compared(record: Path) -> dict[str, Any]:
    """All of a record that another run of the same settings has, too."""
    kept = {k: v for k, v in read_json(record).items() if k not in MADE_ANEW}
    for key in ("out", "methods"):
        kept["config"].pop(key, None)
    del kept["config"]["evaluation"]["workers"]
    return kept


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("workers", ["0", "1"])
def test_attacks_are_added_to_every_row_of_a_finished_run(
    tmp_path: Path, watched: Callable[[], list[str]], capsys: pytest.CaptureFixture[str],
    workers: str,
) -> None:  # fmt: skip
    """Also to a row that this command does not name; as if all had been asked for at once."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    assert distill(out, "kd", "rslad") == 0
    before = {path.parent.name: path.read_bytes() for path in out.glob("*/record.json")}
    found = {path: path.stat().st_mtime_ns for path in out.glob("*/evaluation/pgd2-*/*.json")}
    watched().clear()
    capsys.readouterr()

    more = [*DISTILL, *MORE, "--methods", "kd", "--evaluation.workers", workers, "--out", str(out)]
    assert cli.main(more) == 0
    assert watched() == ["measure_row"] * (0 if workers == "1" else 3)  # and no stage
    said = "measured again, as the evaluation settings are others than before: kd, rslad, teacher"
    assert f"note: {said}" in capsys.readouterr().out
    rows = read_json(out / "results.json")
    assert [(row["method"], row["role"]) for row in rows] == [
        ("pgd-at", "teacher"), ("kd", "student"), ("rslad", "student"),
    ]  # fmt: skip
    assert all("pgd3" in row for row in rows)
    assert read_json(out / "run.json")["evaluation"]["attacks"] == MORE[1:]
    assert read_json(out / "run.json")["methods"] == ["kd", "rslad"]
    assert len(found) == 3
    assert {path: path.stat().st_mtime_ns for path in found} == found  # the same attack: known
    assert before == {path.parent.name: path.read_bytes() for path in out.glob("*/earlier.json")}

    assert cli.main([*more[:-1], str(whole), "--methods", "kd", "rslad"]) == 0
    for name in before:
        assert compared(out / name / "record.json") == compared(whole / name / "record.json")
    watched().clear()
    assert cli.main(more) == 0
    assert not watched()


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(
    "setting",
    [
        ["--evaluation.batch_size", "16"], ["--evaluation.step_size", "0.01"],
        ["--evaluation.eps_curve", "[0.02]"], ["--evaluation.cascade", "true"],
    ],
)  # fmt: skip
def test_every_setting_of_evaluation_may_change(
    setting: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*TRAIN, "--out", "mine"]) == 0
    model = Path("mine/pgd-at/model.safetensors")
    trained = model.stat().st_mtime_ns
    assert cli.main([*TRAIN, *setting, "--attacks", "pgd3", "--out", "mine"]) == 0
    assert cli.main([*TRAIN, *setting, "--attacks", "pgd3", "--out", "whole"]) == 0
    ours, theirs = (compared(Path(out) / "pgd-at/record.json") for out in ("mine", "whole"))
    assert ours == theirs
    assert model.stat().st_mtime_ns == trained
    flags = ["evaluate", "--checkpoint", str(model), *TRAIN[-10:], "--out", "found"]
    assert cli.main(flags) == cli.main([*flags, *setting, "--attacks", "pgd3"]) == 0
    (row,) = read_json(Path("found/results.json"))
    assert row["pgd3"] == theirs["pgd3"]


@pytest.mark.usefixtures("no_page")
def test_no_diagnosis_is_left_of_an_autoattack_that_is_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pyautoattack, "AutoAttack", QuickAutoAttack)
    diagnosis = Path("mine/pgd-at/diagnosis.json")
    for attacks, diagnosed in (("natural", False), ("autoattack", True), ("natural", False)):
        assert cli.main([*TRAIN, "--attacks", attacks, "--out", "mine"]) == 0
        assert diagnosis.is_file() is diagnosed


@pytest.mark.usefixtures("no_page")
def test_killed_while_a_row_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9: until the row has its new record it has none, and both commands go on from there."""
    monkeypatch.chdir(tmp_path)
    known = [*TRAIN, "--evaluation.batch_size", "4", "--out", "mine"]
    assert cli.main(known) == 0
    record = Path("mine/pgd-at/record.json")
    before = compared(record)
    more = [*known, "--attacks", "natural", "pgd2000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gacd.cli", *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while not list(Path("mine").glob("pgd-at/evaluation/pgd2000-*/*.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not record.exists()
    assert "no evaluated model in this folder" in refusal(capsys, "report", "mine")
    assert cli.main(known) == 0
    assert compared(record) == before
    assert cli.main(more) == 0
    assert "pgd2000" in read_json(record)
    assert "pgd2000" in read_json(Path("mine/results.json"))[0]


def test_a_cell_of_a_study_is_another_cell_by_another_evaluation(tmp_path: Path) -> None:
    cfg, more = c.Train(), c.Train(evaluation=c.Evaluation(attacks=["fgsm"]))
    claim(tmp_path, cfg, goal="record")
    (tmp_path / "pgd-at").mkdir()
    with pytest.raises(UserError, match=re.escape("evaluation.attacks is ['natural', 'fgsm'")):
        claim(tmp_path, more, goal="record")
    assert claim(tmp_path, more) == []

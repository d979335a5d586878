"""Who does what, when, and what is told of it: the commands made up, so that nothing is trained."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gacd import config as c
from gacd.errors import UserError
from gacd.storage import write_json
from gacd.study import work
from gacd.study.cells import Cell, Config
from gacd.study.status import status
from made_up import parsed


def configured(out: Path, *words: str) -> c.Study:
    return parsed("run", *words, "--out", str(out))


def rivals(out: Path, methods: str, *words: str) -> tuple[c.Study, work.Folder, list[Cell]]:
    """The study of a teacher and these methods, its folder and its cells."""
    cfg = configured(out, "rivals", "--rivals", methods, *words)
    return cfg, work.Folder(out), [entry.cell for entry in work.chosen(cfg)]


def finish(config: Config, goal: str = "record") -> None:
    """What a command leaves."""
    cell = Cell(config=config)
    for file in [cell.model, cell.record][: 2 if goal == "record" else 1]:
        write_json(config.out / file, {"seed": 0})


def replace_commands(monkeypatch: pytest.MonkeyPatch, does: Callable[[Config, str], None]) -> None:
    for command in work._COMMANDS:
        monkeypatch.setitem(work._COMMANDS, command, lambda config, goal: does(config, goal))


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells that were begun, by address; all go well."""
    keys = []

    def does(config: Config, goal: str) -> None:
        keys.append(config.out.name)
        finish(config, goal)

    replace_commands(monkeypatch, does)
    return keys


def test_models_that_are_missing_are_made_again_for_those_alone_that_need_them(
    tmp_path: Path,
) -> None:
    """Git keeps the records, and few models."""
    _, folder, cells = rivals(tmp_path, "[gacd, gacd+aft]")
    teacher, started, tuned = cells

    def left() -> list[tuple[str, str]]:
        return [(task.cell.key, task.goal) for task in work.tasks(folder, cells)]

    for cell in cells:
        write_json(folder.of(cell) / cell.record, {"seed": 0})
    assert left() == []
    (folder.of(tuned) / tuned.record).unlink()
    goals = [(teacher.key, "model"), (started.key, "model"), (tuned.key, "record")]
    assert left() == goals
    write_json(folder.of(started) / started.model, {})
    assert left() == [goals[0], goals[2]]


def test_cells_may_be_of_a_package_that_had_other_settings(
    tmp_path: Path, begun: list[str]
) -> None:
    cfg, folder, cells = rivals(tmp_path, "[pgd-at]")
    work.run(cfg)
    for cell in cells:
        settings = {k: v for k, v in cell.identity["settings"].items() if k != "threat"}
        write_json(folder.about(cell), {"settings": {**settings, "gone": 1}})
    work.run(cfg)
    assert sorted(begun) == sorted(cell.key for cell in cells)


def test_what_only_others_start_from_is_held_to_its_defaults_too(
    tmp_path: Path, begun: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = "figure2", "--negatives", "[8]", "--temperatures", "[]"
    cfg = configured(tmp_path, *words)
    folder, [tuned] = work.Folder(tmp_path), [entry.cell for entry in work.chosen(cfg)]
    work.run(cfg)
    student = tuned.parents["student"]
    assert begun == [student.parents["teacher"].key, student.key, tuned.key]
    settings = student.identity["settings"]
    write_json(folder.about(student), {"settings": settings | {"seed": 7}, "seconds": 1.0})
    with pytest.raises(UserError, match=f"{student.key}.json was run when seed was 7 by default"):
        work.run(cfg)


def test_seconds_are_of_training_and_measuring(tmp_path: Path, begun: list[str]) -> None:
    _, folder, (teacher, _) = rivals(tmp_path, "[pgd-at]")
    seconds = []
    for goal in ("model", "record", "model"):
        assert work._do(folder, work.Task(teacher, goal), c.Fabric())
        about = json.loads(folder.about(teacher).read_text())
        seconds.append(about["seconds"])
        write_json(folder.about(teacher), about | {"seconds": about["seconds"] + 100})
    assert [round(s, -2) for s in seconds] == [0, 100, 200]


def test_a_failed_cell_is_tried_once_a_sitting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the sitting's own account: the clock of the folder's machine may be another."""
    cfg, _, _ = rivals(tmp_path, "[pgd-at]")
    tries, do = [], work._do

    def fails(config: c.Train, goal: str) -> None:
        raise UserError("no luck")

    def does(config: c.Train, goal: str) -> None:
        write_json(config.out / "pgd-at" / "record.json", {"seed": 0})

    def from_another_clock(folder: work.Folder, task: work.Task, fabric: c.Fabric) -> bool:
        tries.append(task.cell.key)
        assert tries.count(task.cell.key) == (len(tries) + 1) // 2
        done = do(folder, task, fabric)
        if not done:
            os.utime(folder.failure(task.cell), (0, 0))
        return done

    monkeypatch.setattr(work, "_do", from_another_clock)
    monkeypatch.setitem(work._COMMANDS, "train", fails)
    for sitting in (1, 2):
        with pytest.raises(UserError, match="cells that failed: 2, that could not begin: 0"):
            work.run(cfg)
        assert len(tries) == 2 * sitting
    monkeypatch.setitem(work._COMMANDS, "train", does)
    work.run(cfg)
    assert len(tries) == 6 and status(cfg).counts["rivals"]["done"] == 2
    assert not list(tmp_path.rglob("*.failed.json"))


def test_a_failure_of_this_sitting_is_not_tried_again_by_another_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, folder, cells = rivals(tmp_path, "[pgd-at]")
    monkeypatch.setattr(work, "_do", lambda *_: pytest.fail("tried again"))
    for cell in cells:
        write_json(folder.failure(cell), {"reason": "no luck"})
    work._work(cfg, time.time() - 60)


def test_a_cell_that_another_starts_from_is_done_once_whichever_is_named_first(
    tmp_path: Path,
) -> None:
    words = ["--rivals", "[gacd+aft, gacd]", "--table1_pairs", "[[digits-cnn-16, digits-cnn-8]]"]
    words += ["--second_data", "null", "--seeds", "0", "1"]
    entries = work.chosen(configured(tmp_path, "rivals", "table3", *words))
    assert [entry.seed for entry in entries] == [0] * 4 + [1] * 4  # seed by seed
    teacher, tuned, begun = (entry.cell for entry in entries[:3])
    left = work.tasks(work.Folder(tmp_path), [tuned, begun, teacher])
    order = [teacher.key, begun.key, tuned.key]
    assert [(task.cell.key, task.goal) for task in left] == [(key, "record") for key in order]


def test_what_another_has_just_finished_is_not_begun(
    tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, _, _ = rivals(tmp_path, "[pgd-at]")

    class Late(work.Folder):
        def lock(self, cell: Cell) -> Any:
            finish(cell.resolved(self.of(cell), {}, cfg.fabric))
            return super().lock(cell)

    monkeypatch.setattr(work, "Folder", Late)
    work._work(cfg, time.time())
    assert begun == []


def test_a_cell_that_another_is_at_is_passed_over_and_then_waited_for(
    tmp_path: Path,
    begun: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg, folder, (theirs, ours) = rivals(tmp_path, "[pgd-at]")
    lock, tasks, looks, waits = folder.lock(theirs), work.tasks, [], []

    def looked(*args: Any) -> list[work.Task]:
        looks.append(args)
        assert len(looks) < 9
        return tasks(*args)

    def they_finish(seconds: float) -> None:
        waits.append(seconds)
        finish(theirs.resolved(folder.of(theirs), {}, cfg.fabric))
        lock.release()

    lock.acquire()
    monkeypatch.setattr(work, "tasks", looked)
    monkeypatch.setattr(work.time, "sleep", they_finish)
    work._work(cfg, time.time())
    assert begun == [ours.key] and len(waits) == 1
    said = f"[1/2] rivals: pgd-at (digits-cnn-16 to digits-cnn-8), seed 0  ({ours.key})\n"
    assert capsys.readouterr().out == said


def test_a_teacher_that_is_trained_has_students_though_its_record_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, folder, (teacher, student) = rivals(tmp_path, "[kd]")

    def does(config: Config, goal: str) -> None:
        finish(config, "model" if isinstance(config, c.Train) else goal)
        if isinstance(config, c.Train):
            raise UserError("no luck")

    replace_commands(monkeypatch, does)
    with pytest.raises(UserError, match="that failed: 1, that could not begin: 0"):
        work.run(cfg)
    assert [task.cell.key for task in work.tasks(folder, [teacher, student])] == [teacher.key]


def test_an_error_that_nobody_foresaw_is_named_and_can_be_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, folder, (teacher, student) = rivals(tmp_path, "[pgd-at]")

    def does(config: Config, goal: str) -> None:
        raise KeyError if config.out.name == teacher.key else UserError("no luck")

    replace_commands(monkeypatch, does)
    with pytest.raises(UserError, match="that failed: 2"):
        work.run(cfg)
    found = [json.loads(folder.failure(cell).read_text()) for cell in (teacher, student)]
    assert [about["reason"] for about in found] == ["KeyError()", "no luck"]
    assert all("in does" in about["traceback"] for about in found)
    assert [about["settings"] for about in found] == [
        cell.identity["settings"] for cell in (teacher, student)
    ]


def test_a_reason_that_cannot_be_written_holds_up_no_other_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, folder, (teacher, student) = rivals(tmp_path, "[pgd-at]")
    folder.failure(teacher).mkdir(parents=True)  # as a full disk: it is not written

    def does(config: Config, goal: str) -> None:
        if config.out.name == teacher.key:
            raise UserError("no luck")
        finish(config, goal)

    replace_commands(monkeypatch, does)
    with pytest.raises(UserError, match="could not begin: 1"):
        work.run(cfg)
    assert folder.has(work.Task(student, "record"))
    assert capsys.readouterr().out.count("failed: no luck") == 1


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command of its own that ends as it is told to: its ends, and the signals it was sent."""

    class Process:
        ends: list[int | type[BaseException]] = []  # noqa: RUF012
        signals: list[int] = []  # noqa: RUF012

        def __init__(self, args: list[str], env: dict[str, str]) -> None:
            self.args, self.env = args, env

        def wait(self) -> int:
            end = self.ends.pop(0)
            if isinstance(end, int):
                return end
            raise end

        def send_signal(self, number: int) -> None:
            self.signals.append(number)

    monkeypatch.setattr(work.subprocess, "Popen", Process)
    return Process


@pytest.mark.parametrize(
    ("ends", "signals"), [([KeyboardInterrupt, 130], [signal.SIGINT]), ([130], [])]
)
def test_an_interrupt_of_a_cell_on_several_processes_is_no_failure_of_it(
    tmp_path: Path, process: Any, ends: list[Any], signals: list[int]
) -> None:
    """Whichever of them it reaches: the cell is told, and waited for until it has saved."""
    _, folder, (teacher, _) = rivals(tmp_path, "[pgd-at]")
    folder.root.mkdir()
    process.ends += ends
    with pytest.raises(KeyboardInterrupt):
        work._do(folder, work.Task(teacher, "record"), c.Fabric(devices=2))
    assert (process.signals, process.ends) == (signals, [])
    assert not folder.failure(teacher).exists()


def test_the_reason_of_another_try_is_not_given_for_this_one(tmp_path: Path, process: Any) -> None:
    _, folder, (teacher, _) = rivals(tmp_path, "[pgd-at]")
    folder.root.mkdir()
    (folder.root / f"{teacher.key}.refusal").write_text("of yesterday")
    process.ends.append(-9)
    assert not work._do(folder, work.Task(teacher, "record"), c.Fabric(devices=2))
    reason = json.loads(folder.failure(teacher).read_text())["reason"]
    assert reason.endswith("ended with exit code -9")


@pytest.mark.parametrize(
    ("study", "fabric", "alone"),
    [
        ("table3", c.Fabric(devices=1), True),
        ("table3", c.Fabric(devices=1, num_nodes=2), False),
        ("figure5", c.Fabric(devices=2), True),
    ],
)
def test_all_but_an_analysis_is_run_on_all_devices_and_nodes(
    tmp_path: Path, begun: list[str], process: Any, study: str, fabric: c.Fabric, alone: bool
) -> None:
    folder, cell = work.Folder(tmp_path), work.chosen(configured(tmp_path, study))[0].cell
    folder.root.mkdir()
    process.ends.append(0)
    assert work._do(folder, work.Task(cell, "record"), fabric)
    assert (bool(begun), bool(process.ends)) == (alone, alone)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")
def test_git_keeps_records_and_teachers(tmp_path: Path, begun: list[str]) -> None:
    cfg, folder, (teacher, student) = rivals(tmp_path, "[kd]")
    work.run(cfg)
    kept = {
        *(f"{cell.key}.json" for cell in (teacher, student)),
        f"{teacher.key}/pgd-at/model.safetensors",
        *(f"{teacher.key}/pgd-at/{name}" for name in ("record.json", "outcomes.safetensors")),
        f"{student.key}/kd/record.json",
    }
    names = ("best.safetensors", "events.out.tfevents.1", ".record.json.9.tmp", "evaluation/a.json")
    for name in (*names, "outcomes.safetensors"):
        write_json(folder.of(teacher) / "pgd-at" / name, {})
    assert (folder.root / f"{teacher.key}.lock").is_file()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    ls = subprocess.run(["git", "ls-files"], cwd=tmp_path, check=True, capture_output=True)
    assert set(ls.stdout.decode().split()) == {".gitignore", *(f"cells/{name}" for name in kept)}
    (tmp_path / ".gitignore").write_text("# ours\n")
    work.run(cfg)
    assert (tmp_path / ".gitignore").read_text() == "# ours\n" and len(begun) == 2

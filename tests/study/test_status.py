"""What a study's folder says of its cells, which nobody has run: files made up."""

from pathlib import Path
from typing import Any

import pytest

from gacd import config as c
from gacd.errors import UserError
from gacd.storage import write_json
from gacd.study import work
from gacd.study.cells import Cell
from gacd.study.status import status
from made_up import parsed

PAIR = ["--main_pair", "digits-cnn-4", "digits-cnn-2"]
PAIRS = "[[digits-cnn-4, digits-cnn-2], [digits-cnn-4, digits-cnn-8]]"


def configured(out: Path, *words: str) -> tuple[c.Study, dict[int, list[Cell]]]:
    """A study, and its cells by seed."""
    cfg = parsed("status", *words, "--out", str(out), "--second_data", "null")
    entries = work.chosen(cfg)
    return cfg, {seed: [e.cell for e in entries if e.seed == seed] for seed in cfg.seeds}


def finish(folder: work.Folder, cell: Cell, seconds: float) -> None:
    write_json(folder.of(cell) / cell.record, {"seed": 0})
    write_json(folder.of(cell) / cell.model, {})
    write_json(folder.about(cell), {**cell.identity, "seconds": seconds})


def test_a_cell_that_failed_and_is_tried_again_is_running(tmp_path: Path) -> None:
    cfg, cells = configured(tmp_path, "rivals", "--rivals", "[pgd-at]")
    folder, (teacher, student) = work.Folder(tmp_path), cells[0]
    for cell in (teacher, student):
        write_json(folder.failure(cell), {"reason": "no luck"})
    with folder.lock(teacher):
        found = status(cfg)
    assert found.counts["rivals"] == {"done": 0, "running": 1, "failed": 1, "waiting": 0}
    assert found.reasons == {student.key: "no luck"}


def test_whoever_may_not_lock_a_cell_sees_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, cells = configured(tmp_path, "rivals", "--rivals", "[pgd-at]")
    folder, (teacher, _) = work.Folder(tmp_path), cells[0]
    folder.root.mkdir()
    Path(folder.lock(teacher).lock_file).touch()

    def refuses(*_: Any, **__: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(work.FileLock, "acquire", refuses)
    assert status(cfg).counts["rivals"]["waiting"] == 2


def test_the_hours_left_are_those_of_every_cell_that_is_not_done_once(tmp_path: Path) -> None:
    words = "rivals", "table3", "--rivals", "[pgd-at]", "--table1_pairs", "[[digits-cnn-4, x]]"
    cfg, cells = configured(tmp_path, *words, *PAIR, "--seeds", "0", "1", "2")
    folder, (teacher, student, same) = work.Folder(tmp_path), cells[0]
    assert teacher.key == same.key
    finish(folder, teacher, 3600)
    finish(folder, student, 360)
    write_json(folder.failure(cells[1][0]), {"reason": "no luck"})
    finish(folder, cells[1][1], 1080)
    with folder.lock(cells[2][1]):
        found = status(cfg)
    assert found.counts["rivals"] == {"done": 3, "running": 1, "failed": 1, "waiting": 1}
    assert found.hours == pytest.approx(2 * 1 + (360 + 1080) / 2 / 3600)


def test_the_hours_left_are_also_of_what_the_cells_start_from(tmp_path: Path) -> None:
    words = "figure2", "--negatives", "[8]", "--temperatures", "[]"
    cfg, cells = configured(tmp_path, *words, "--seeds", "0", "1")
    assert status(cfg).hours is None
    folder, [tuned] = work.Folder(tmp_path), cells[0]
    finish(folder, tuned, 36)
    assert status(cfg).hours == pytest.approx(0.03)  # a teacher, its student, and that one tuned


def test_a_model_that_is_not_measured_yet_says_nothing_of_hours(tmp_path: Path) -> None:
    cfg, cells = configured(tmp_path, "rivals", "--rivals", "[pgd-at]", "--seeds", "0", "1")
    folder, (teacher, student) = work.Folder(tmp_path), cells[0]
    finish(folder, teacher, 7200)
    finish(folder, student, 36)
    (folder.of(student) / student.record).unlink()
    assert status(cfg).hours == pytest.approx(3 * 2)


def test_large_networks_take_their_own_time(tmp_path: Path) -> None:
    words = "table1", "--table1_pairs", PAIRS, "--seeds", "0", "1"
    cfg, cells = configured(tmp_path, *words)
    folder, half = work.Folder(tmp_path), len(cells[0]) // 2
    for cell in cells[0][:half] + cells[1][:half]:
        finish(folder, cell, 36)
    for cell in cells[0][half + 1 :]:
        finish(folder, cell, 3600)
    left = len(cells[1][half + 1 :])
    assert status(cfg).hours == pytest.approx(left)


def test_seconds_that_are_no_number_are_named(tmp_path: Path) -> None:
    cfg, cells = configured(tmp_path, "rivals", "--rivals", "[pgd-at]")
    folder, (teacher, _) = work.Folder(tmp_path), cells[0]
    finish(folder, teacher, 7200)
    write_json(folder.about(teacher), {**teacher.identity, "seconds": "long"})
    with pytest.raises(UserError, match=r"json: not written by .* \(seconds is \"long\"\)"):
        status(cfg)


def test_a_model_that_cannot_be_made_again_is_told_of_though_its_cell_is_done(
    tmp_path: Path,
) -> None:
    """The records travel without students' weights; what starts from these trains them anew."""
    cfg, cells = configured(tmp_path, "rivals", "--rivals", "[gacd+aft]")
    folder, every = work.Folder(tmp_path), cells[0]
    tuned = next(cell for cell in every if "student" in cell.parents)
    start = tuned.parents["student"]
    finish(folder, start.parents["teacher"], 1.0)
    write_json(folder.of(start) / start.record, {"seed": 0})  # measured, and its weights are gone
    write_json(folder.failure(start), {"reason": "other images"})
    assert status(cfg).reasons[start.key] == "other images"


def test_data_that_differ_in_their_root_alone_are_refused(tmp_path: Path) -> None:
    """A cell's address does not know where its data lie: two sets would be taken for one."""
    words = ["table4", "--transfer_to"]
    where = ["--data.name", "folder", "--data.root", "here", "--scale", "tiny"]
    roots = "[{root: pets, classes: null}, {root: cars, classes: null}]"
    with pytest.raises(UserError, match="cars and pets would be one data set"):
        work.distinct(work.chosen(parsed("list", *words, roots, *where)))
    titled = roots.replace("cars,", "cars, title: cars,")
    assert work.distinct(work.chosen(parsed("list", *words, titled, *where)))

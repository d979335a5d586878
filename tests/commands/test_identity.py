"""What makes a run folder this run's: what may differ when a run goes on, and what may not."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gacd import config as c
from gacd.commands.identity import claim
from gacd.errors import UserError
from gacd.methods import METHODS
from gacd.storage import read_json, write_json


def test_a_run_older_than_a_setting_is_still_this_run(tmp_path: Path) -> None:
    cfg = c.Evaluate(checkpoint=Path("a.pt"))
    claim(tmp_path, cfg)
    (tmp_path / "model").mkdir()
    older = read_json(tmp_path / "run.json")
    del older["evaluation"]["cascade"], older["source"]
    write_json(tmp_path / "run.json", older)
    claim(tmp_path, cfg)
    for other in (
        c.Evaluate(checkpoint=Path("a.pt"), source=Path("b.pt")),
        c.Train(),
        c.Distill(),
    ):
        with pytest.raises(UserError, match="holds another run"):
            claim(tmp_path, other)


def test_data_may_move_but_not_change(tmp_path: Path) -> None:
    here, there = (
        c.Evaluate(data=c.Data(name="folder", root=Path(root))) for root in ("/a/data", "/b/other")
    )
    claim(tmp_path, here, images={"images": "1f"})
    (tmp_path / "model").mkdir()
    claim(tmp_path, there, images={"images": "1f"})
    with pytest.raises(UserError, match="images is 1f there and 2e here"):
        claim(tmp_path, there, images={"images": "2e"})


@pytest.mark.parametrize("part", ["checkpoint", "source", "teacher.checkpoint"])
def test_a_file_of_the_same_name_and_other_content_is_another_run(
    tmp_path: Path, part: str
) -> None:
    def starting_from(folder: str, content: str) -> c.Evaluate | c.Distill:
        path = tmp_path / folder / "model.safetensors"
        path.parent.mkdir()
        path.write_text(content)
        if part == "teacher.checkpoint":
            return c.Distill(teacher=c.Teacher(checkpoint=path))
        return c.Evaluate(**{"checkpoint": Path("a.pt"), part: path})

    out = tmp_path / "out"
    claim(out, starting_from("here", "weights"))
    (out / "model").mkdir()
    claim(out, starting_from("there", "weights"))
    moved = tmp_path / "there" / "renamed.safetensors"
    shutil.copy(tmp_path / "there" / "model.safetensors", moved)
    renamed = starting_from("again", "weights")
    if part == "teacher.checkpoint":
        claim(out, replace(renamed, teacher=c.Teacher(checkpoint=moved)))
    else:
        claim(out, replace(renamed, **{part: moved}))
    with pytest.raises(UserError, match=rf"holds another run \({part} is model.safetensors "):
        claim(out, starting_from("elsewhere", "other weights"))


def test_a_run_goes_on_with_other_hardware_and_not_with_other_arithmetic(tmp_path: Path) -> None:
    cfg = c.Distill()
    claim(tmp_path, cfg)
    (tmp_path / "teacher").mkdir()
    machine = c.Fabric(
        accelerator="gpu", devices=4, num_nodes=2, strategy="ddp", threads=3, compile=True
    )
    evaluation, data = c.Evaluation(workers=2), c.Data(workers=5)
    elsewhere = replace(cfg, fabric=machine, evaluation=evaluation, data=data, bank=Path("banks"))
    claim(tmp_path, elsewhere)
    for setting in ({"precision": "32-true"}, {"batch_norm": "synchronised"}):
        with pytest.raises(UserError, match=f"holds another run .fabric.{min(setting)} is"):
            claim(tmp_path, replace(cfg, fabric=c.Fabric(**setting)))


def test_one_setting_may_be_written_in_two_ways(tmp_path: Path) -> None:
    for number, (data, same) in enumerate(
        [
            (c.Data(classes=[0, 1]), c.Data(classes=["0", "1"])),
            (c.Data(title="nan"), c.Data(title="nan")),
        ]
    ):
        claim(tmp_path / str(number), c.Distill(data=data))
        (tmp_path / str(number) / "teacher").mkdir()
        claim(tmp_path / str(number), c.Distill(data=same))
    with pytest.raises(UserError, match=r"holds another run \(data.classes"):
        claim(tmp_path / "0", c.Distill(data=c.Data(classes=["0", "2"])))


def test_stages_that_have_not_begun_may_be_set_anew(tmp_path: Path) -> None:
    cfg = c.Distill(methods=["ard"])
    claim(tmp_path, cfg)
    for folder in ("teacher", "ard"):
        (tmp_path / folder).mkdir()
    stage = c.Training(epochs=2)
    more = replace(
        cfg, methods=["gacd+rslad+aft"], distillation=stage, finetune=stage,
        finetune_method="trades", weights={"gacd": 0.5},
    )  # fmt: skip
    claim(tmp_path, more)
    (tmp_path / "gacd+rslad+aft" / "distillation").mkdir(parents=True)
    claim(tmp_path, more)
    changed = {
        "distillation": c.Training(), "finetune": c.Training(), "finetune_method": "pgd-at",
        "weights": {"gacd": 1.0}, "training": stage,
    }  # fmt: skip
    for name, value in changed.items():
        with pytest.raises(UserError, match=rf"holds another run \({name}"):
            claim(tmp_path, replace(more, **{name: value}))


def test_the_weights_of_what_fine_tuned_are_fixed(tmp_path: Path) -> None:
    cfg = c.Distill(methods=["ard+aft"], finetune_method="rslad+igdm", weights={"igdm": 2.0})
    claim(tmp_path, cfg)
    (tmp_path / "ard+aft").mkdir()
    with pytest.raises(UserError, match=r"holds another run \(weights"):
        claim(tmp_path, replace(cfg, weights={"igdm": 50.0}))


def test_methods_may_be_added_with_their_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "mine", METHODS["kd"])
    cfg = c.Distill(methods=["ard"], finetune_method="trades")
    claim(tmp_path, cfg)
    for folder in ("teacher", "ard"):
        (tmp_path / folder).mkdir()
    more = replace(cfg, methods=["gacd+aft"], gacd=c.GACD(negatives=9), extra={"mine": {"T": 2.0}})
    claim(tmp_path, more)
    run = read_json(tmp_path / "run.json")
    assert run["methods"] == ["ard", "gacd+aft"] and run["gacd"]["negatives"] == 9
    assert run["extra"] == {"mine": {"T": 2.0}}
    claim(tmp_path, cfg)  # gacd has not begun: nothing of it is fixed
    claim(tmp_path, more)
    (tmp_path / "gacd+aft").mkdir()
    claim(tmp_path, replace(more, extra={}))
    for key, other in {
        "gacd.negatives": replace(more, gacd=c.GACD(negatives=8)),
        "ard.temperature": replace(cfg, ard=c.ARD(temperature=2.0)),
        "trades.beta": replace(cfg, trades=c.TRADES(beta=2.0)),  # of +aft
    }.items():
        with pytest.raises(UserError, match=f"holds another run .{key} is"):
            claim(tmp_path, other)


def test_one_budget_may_be_written_in_two_ways(tmp_path: Path) -> None:
    claim(tmp_path, c.Evaluate(threat=c.Threat(eps="8/255")))
    (tmp_path / "model").mkdir()
    claim(tmp_path, c.Evaluate(threat=c.Threat(eps=8 / 255)))
    with pytest.raises(UserError, match=r"threat\.eps is 8/255 there and 0\.03 here"):
        claim(tmp_path, c.Evaluate(threat=c.Threat(eps=0.03)))

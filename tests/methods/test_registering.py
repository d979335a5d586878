"""A method from outside the package: the example of docs/methods.md, run as its reader would."""

import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from command_line import TRAIN, refusal
from gacd import cli, models
from gacd import config as c
from gacd.commands import run
from gacd.errors import UserError
from gacd.methods import METHODS, Step, Term, register_method
from gacd.models import create_model, register_model
from gacd.shapes import PerSample
from gacd.storage import read_json
from methods.world import World, attacked, known_attack, total

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
_STAGES = ("teacher.training", "training", "distillation", "finetune")
FLAGS = [
    *("--teacher.model", "digits-cnn-4", "--student", "digits-cnn-2", "--threat.eps", "0.1"),
    *("--data.train_limit", "200", "--data.test_limit", "40", "--attacks", "natural"),
    *("--fabric.accelerator", "cpu", "--fabric.precision", "32-true"),
    *(f"--{stage}.{flag}" for stage in _STAGES for flag in ("epochs=1", "batch_size=32")),
]


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test leaves a method behind, or draws a page."""
    monkeypatch.setattr(run, "write_run_report", lambda *_, **__: None)
    kept = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(kept)


class Brightness(Term):
    """Outputs that do not depend on how bright an image is."""

    needs_teacher = True

    def losses(self, step: Step) -> PerSample:
        return (step.student_adv_logits - step.teacher_logits).square().mean(1)


def test_the_example_in_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(# mine\.py\n.*?)```", DOCS.read_text(), re.DOTALL)
    script = tmp_path / "mine.py"
    script.write_text(code)
    methods = ["--methods", "mine", "gacd+mine", "mine+aft", "--extra.mine", "{margin: 0.5}"]
    arguments = ["distill", *methods, "--weights.mine", "2", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, *FLAGS, "--gacd.negatives", "64"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0, capsys.readouterr().err
    results = read_json(tmp_path / "run" / "results.json")
    assert [row["method"] for row in results] == ["pgd-at", "gacd+mine", "mine", "mine+aft"]
    assert all(row["cost"]["teacher_forward"] > 0 for row in results[1:])
    record = read_json(tmp_path / "run" / "mine" / "record.json")
    assert record["config"]["extra"] == {"mine": {"margin": 0.5}}


def test_a_registered_method_is_one_like_the_others(world: World) -> None:
    register_method("brightness", Brightness)
    method, batch = world.method("brightness", reweight="teacher"), world.batch()
    known_attack(method)
    with torch.no_grad():
        weights = world.teacher.module(batch.images).softmax(1).gather(1, batch.labels[:, None])
        difference = method.student(attacked(batch)) - world.teacher.module(batch.images)
        expected = (weights[:, 0] * difference.square().mean(1)).mean()
    assert total(method, batch).item() == pytest.approx(expected.item(), rel=1e-4)
    assert list(world.method("gacd+brightness").terms) == ["gacd", "brightness"]


class Column(Brightness):
    """One number an image, as a column: it would be broadcast against the weights."""

    def losses(self, step: Step) -> PerSample:
        return super().losses(step)[:, None]


def test_losses_of_another_shape_are_refused(world: World) -> None:
    register_method("column", Column)
    for name in ("column", "ard+column"):
        method, batch = world.method(name), world.batch()
        known_attack(method)
        n = len(batch.labels)
        said = (
            rf"losses of Column have the shape \({n}, 1\), but must be one number for each of {n}"
        )
        with pytest.raises(UserError, match=said):
            total(method, batch)


class Idle(Brightness):
    """Without a gradient: beside another term nobody would notice."""

    def losses(self, step: Step) -> PerSample:
        return super().losses(step).detach()


def test_losses_without_a_gradient_are_refused_in_a_combination_too(world: World) -> None:
    register_method("idle", Idle)
    for name in ("idle", "ard+idle"):
        method, batch = world.method(name), world.batch()
        known_attack(method)
        with pytest.raises(UserError, match="the losses of idle have no gradient: compute them"):
            total(method, batch)
        with torch.no_grad():
            assert total(method, batch) > 0  # where none is asked for


def _nothing(losses: Tensor) -> None:
    """Of a function that forgets to return."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_nothing, "the losses of Changed are of type NoneType, but must be a tensor of floats"),
        (lambda x: x.mean().item(), "the losses of Changed are of type float, but must be"),
        (lambda x: x.argmax(1), "the losses of Changed are of type torch.int64, but must be"),
        (lambda x: x, "the losses of Changed have the shape (2, 10), but must be one number for"),
        (lambda x: x.mean(), "the losses of Changed have the shape (), but must be one number for"),
        (lambda x: x.sum(1).detach(), "the losses of changed have no gradient: compute them of"),
        (lambda x: x.sum(1) / 0, "NaN in epoch 1: lower this stage's lr, or set fabric.precision "
         "to 32-true, or mend the losses of changed"),
    ],
)  # fmt: skip
def test_losses_that_cannot_train_are_refused_in_one_line(
    change: Callable[[Tensor], Any], message: str,
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Changed(Term):
        objective = None

        def losses(self, step: Step) -> PerSample:
            return change(step.student_logits.square())  # type: ignore[no-any-return]

    monkeypatch.chdir(tmp_path)
    register_method("changed", Changed)
    assert message in refusal(capsys, *TRAIN, "--method", "changed")


def test_losses_may_have_another_precision(world: World) -> None:
    class Double(Brightness):
        def losses(self, step: Step) -> PerSample:
            return super().losses(step).double()

    register_method("precise", Double)
    for name in ("precise", "ard+precise"):
        method = world.method(name)
        total(method, world.batch()).backward()
        assert all(p.grad is not None for p in method.student.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ard", "the method 'ard' exists already: register yours under another name"),
        ("aft", "the method 'aft' exists already"),
        ("my+method", "'my\\+method' cannot name a method: use letters, digits, - and _ alone"),
        ("", "'' cannot name a method"),
        *((name, f"'{name}' is a name of PyTorch's own") for name in ("half", "values")),
        *((name, f"'{name}' is a setting, or a folder") for name in ("teacher", "source")),
    ],
)
def test_names_that_are_taken_or_unfit_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        register_method(name, Brightness)


def test_a_bank_without_a_teacher_is_refused() -> None:
    class Anchored(Term):
        needs_bank = True

        def losses(self, step: Step) -> PerSample:
            return step.student_logits.square().mean(1)

    with pytest.raises(UserError, match="a bank is the teacher's features: say needs_teacher"):
        register_method("anchored", Anchored)


def test_no_section_of_the_configuration_can_be_a_methods_name() -> None:
    configs = (c.Distill, c.Train, c.Finetune, c.Evaluate, c.Transfer)
    sections = {field.name for config in configs for field in fields(config)}
    for name in sections - METHODS.keys():
        with pytest.raises(UserError):
            register_method(name, Brightness)


def test_a_log_of_the_loops_own_name_is_refused(world: World) -> None:
    class Logs(Brightness):
        def losses(self, step: Step) -> PerSample:
            step.logs |= {"loss": step.student_adv_logits.detach().mean()}
            return super().losses(step)

    register_method("logs", Logs)
    with pytest.raises(UserError, match="'loss' is a column of every log: log yours by another"):
        total(world.method("logs"), world.batch())


def test_a_misspelt_reweight_is_not_taken_for_the_teachers() -> None:
    program = (  # a process of its own: here the annotation would refuse it already
        "from gacd.methods.ard import ARD; from gacd.methods.base import Given; "
        "ARD(Given(None), reweight='normalized')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "UserError: unknown reweight 'normalized': did you mean 'normalised'" in done.stderr


def test_a_setting_that_it_does_not_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_method("brightness", Brightness)
    line = ["distill", "--methods", "brightness", "--extra.brightness", "{reweigh: teacher}"]
    assert cli.main([*line, "--out", str(tmp_path / "run"), *FLAGS]) == 2
    assert "unknown setting of brightness 'reweigh': did you mean 'reweight'" in (
        capsys.readouterr().err
    )


def test_a_cell_of_a_notebook_may_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What registers a class or a function under a name may do so again with its next self."""
    monkeypatch.setattr(models, "_REGISTERED", {})
    cell = """
class Again(Term):
    objective = "ce"
    def losses(self, step):
        return {factor} * step.adv_logits.logsumexp(1)
register_method("again", Again)

def build_again(num_classes, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, {factor}), nn.Linear({factor}, num_classes))
register_model("again", build_again, classifier="2")
"""
    scope = {"__name__": "__main__", "Term": Term, "nn": nn}
    scope |= {"register_method": register_method, "register_model": register_model}
    for factor in (1, 2):
        exec(cell.format(factor=factor), scope)
    assert METHODS["again"] is scope["Again"]
    made = create_model("again", num_classes=10, channels=1, seed=0)
    assert made.num_features == 2
    for factor in (4, 5):  # of one place, but not of one name
        made = type("Made", (Term,), {"objective": "ce", "__qualname__": "make.<locals>.Made"})
        if factor == 4:
            register_method("made", made)
    with pytest.raises(UserError, match="the method 'made' exists already"):
        register_method("made", made)
    scope["__name__"] = "another"
    with pytest.raises(UserError, match="the method 'again' exists already"):
        exec(cell.format(factor=3), scope)

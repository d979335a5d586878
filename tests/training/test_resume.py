"""Stopped anywhere, by Ctrl-C or a kill, and run again: the bits of a run that never stopped."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gacd.errors import UserError
from gacd.methods import Method, create_method
from gacd.methods.awp import AWP
from gacd.models import create_model
from gacd.shapes import Batch
from gacd.storage import load_meta, load_tensors, read_json_lines, save_tensors
from gacd.training import loop
from training.conftest import ATTACK
from training.states import assert_same


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Killed(Exception):
    """Stands for the end of the process: nothing after it runs."""


def killed() -> None:
    raise Killed


def after(steps: int, method: Method, do: Callable[[], None]) -> Method:
    """The method, with `do` done in its step of that number."""
    forward, count = method.forward, 0

    def counted(batch: Batch, generator: torch.Generator, progress: float, **more: Any) -> Any:
        nonlocal count
        count += not more  # AWP's passes are of the same step
        if count == steps and not more:
            do()
        return forward(batch, generator, progress, **more)

    method.forward = counted  # type: ignore[method-assign]
    return method


CASES = [
    *((name, "32-true") for name in ("pgd-at", "gacd", "crd", "rslad+igdm")),
    ("pgd-at", "bf16-mixed"),
]


@pytest.fixture(scope="module")
def whole(stage: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Runs that were never stopped."""
    runs = {}
    for name, precision in CASES:
        runs[name, precision] = tmp_path_factory.mktemp("whole")
        stage.fit(runs[name, precision], name, precision=precision)
    return runs


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_ctrl_c_in_the_middle_of_an_epoch(
    stage: Any, whole: Any, tmp_path: Path, name: str, precision: str
) -> None:
    for steps, where in ((6, (1, 2)), (4, (2, 2))):  # 4 steps an epoch; twice interrupted
        with pytest.raises(KeyboardInterrupt):
            stage.fit(tmp_path, after(steps, stage.method(name), ctrl_c), precision=precision)
        meta = load_meta(tmp_path / "checkpoint.safetensors")
        assert (meta["epoch"], meta["step"]) == where
    stage.fit(tmp_path, name, precision=precision)
    assert_same(tmp_path, whole[name, precision])


def test_what_a_method_logs_may_be_no_number(stage: Any, tmp_path: Path) -> None:
    """A state of training that holds it is its own, and goes on."""

    def logging(method: Method) -> Method:
        forward = method.forward

        def odd(*arguments: Any, **more: Any) -> Any:
            loss = forward(*arguments, **more)
            return loss._replace(parts={**loss.parts, "odd": loss.total.detach() * torch.nan})

        method.forward = odd  # type: ignore[method-assign]
        return method

    with pytest.raises(KeyboardInterrupt):
        stage.fit(tmp_path, after(6, logging(stage.method("pgd-at")), ctrl_c))
    stage.fit(tmp_path, logging(stage.method("pgd-at")))
    assert [str(row["odd"]) for row in read_json_lines(tmp_path / "log.jsonl")] == ["nan"] * 3


def test_the_seconds_and_images_before_an_interrupt_count(stage: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stage.fit(tmp_path, after(6, stage.method("pgd-at"), ctrl_c))
    checkpoint = tmp_path / "checkpoint.safetensors"
    tensors, meta = load_tensors(checkpoint)
    assert meta["seconds"] > 0
    save_tensors(checkpoint, tensors, {**meta, "seconds": 5000.0})
    _, summary = stage.fit(tmp_path, "pgd-at")
    assert 5000 < read_json_lines(tmp_path / "log.jsonl")[1]["seconds"] < summary.seconds < 5600
    assert summary.images == 3 * 4 * 16  # epochs, steps, a batch


@pytest.mark.parametrize("epoch", [1, 3])
def test_ctrl_c_in_validation(
    stage: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    """It stops at the end of that epoch, also of the last one."""
    validate, count = loop.validate, 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == epoch:
            ctrl_c()
        return validate(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "validate", interrupted)
        stage.fit(tmp_path, "pgd-at")
    meta = load_meta(tmp_path / "checkpoint.safetensors")
    assert (meta["epoch"], meta["step"]) == (epoch, 0)
    assert not (tmp_path / "done.json").exists()
    stage.fit(tmp_path, "pgd-at")
    assert_same(tmp_path, whole["pgd-at", "32-true"])


@pytest.mark.parametrize("steps", [2, 4, 7, 12])
def test_killed_in_a_step(stage: Any, whole: Any, tmp_path: Path, steps: int) -> None:
    with pytest.raises(Killed):
        stage.fit(tmp_path, after(steps, stage.method("pgd-at"), killed))
    assert (tmp_path / "checkpoint.safetensors").exists() == (steps > 4)
    stage.fit(tmp_path, "pgd-at")
    assert_same(tmp_path, whole["pgd-at", "32-true"])


@pytest.mark.parametrize("write", ["save_state", "save_tensors", "append_json_line", "write_json"])
@pytest.mark.parametrize("torn", [False, True])
def test_killed_between_two_files(
    stage: Any,
    whole: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: str,
    torn: bool,
) -> None:
    """Whichever of an epoch's files is the first not to be written; a log line may be torn."""
    original, count = getattr(loop, write), 0

    def fails(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == (1 if write == "write_json" else 2):
            if torn:
                with (tmp_path / "log.jsonl").open("a") as log:
                    log.write('{"epoch": 7, "lo')
            raise Killed
        original(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, write, fails)
        stage.fit(tmp_path, "pgd-at", select="last")
    stage.fit(tmp_path, "pgd-at", select="last")
    stage.fit(tmp_path.with_name("last"), "pgd-at", select="last")
    assert_same(tmp_path, tmp_path.with_name("last"))
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in board.Scalars("val_natural")] == [1, 2, 3]


def test_the_first_ctrl_c_waits_and_the_handler_is_put_back(stage: Any, tmp_path: Path) -> None:
    # A shell starts what it puts into the background with interrupts ignored: not so in this test.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stage.fit(tmp_path, after(3, stage.method("pgd-at"), ctrl_c))
    assert signal.getsignal(signal.SIGINT) is before

    def twice() -> None:
        ctrl_c()
        ctrl_c()

    checkpoint = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        stage.fit(tmp_path, after(1, stage.method("pgd-at"), twice))
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == checkpoint  # stopped at once


def test_a_ctrl_c_after_the_last_look_is_not_lost(
    stage: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    compiled = loop.compiled

    @contextlib.contextmanager
    def leaving(*given: Any, **more: Any) -> Any:
        with compiled(*given, **more):
            yield
        ctrl_c()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "compiled", leaving)
        stage.fit(tmp_path, "pgd-at")
    stage.fit(tmp_path, "pgd-at")
    assert_same(tmp_path, whole["pgd-at", "32-true"])


def test_killed_while_training_again_what_had_lost_its_weights(
    stage: Any, whole: Any, tmp_path: Path
) -> None:
    """A folder that came without its weights, as from git, is not done once it has some."""
    stage.fit(tmp_path, "pgd-at")
    (tmp_path / "best.safetensors").unlink()
    with pytest.raises(Killed):
        stage.fit(tmp_path, after(6, stage.method("pgd-at"), killed))
    stage.fit(tmp_path, "pgd-at")
    assert_same(tmp_path, whole["pgd-at", "32-true"])


def test_the_summary_is_of_the_weights_that_are_there(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between an epoch's weights and its state; and the epoch then comes out otherwise."""
    scores = iter([50.0, 60.0, 55.0, 52.0])  # epochs 1 and 2, then 2 again, and 3

    def validate(*_: Any, **__: Any) -> dict[str, float]:
        score = next(scores)
        return {"val_natural": score, "val_robust": score}

    monkeypatch.setattr(loop, "validate", validate)
    save, count = loop.save_state, 0

    def fails(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise Killed
        save(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "save_state", fails)
        stage.fit(tmp_path, "pgd-at")
    _, summary = stage.fit(tmp_path, "pgd-at")
    assert (summary.selected_epoch, summary.val_robust) == (2, 60.0)
    assert load_meta(tmp_path / "best.safetensors")["epoch"] == 2


@pytest.mark.parametrize("file", ["best", "checkpoint"])
def test_another_stages_networks_are_refused(stage: Any, tmp_path: Path, file: str) -> None:
    """Put into its folder by hand, of a run whose plan was the same."""
    path = tmp_path / f"{file}.safetensors"
    with pytest.raises(Killed):
        stage.fit(tmp_path, after(6, stage.method("pgd-at"), killed))
    if file == "best":
        stage.fit(tmp_path, "pgd-at")
    tensors, meta = load_tensors(path)
    save_tensors(path, {name: tensor.flatten()[:1] for name, tensor in tensors.items()}, meta)
    with pytest.raises(UserError, match=rf"{file}\.safetensors: not of this stage's networks; put"):
        stage.fit(tmp_path, "pgd-at")
    path.unlink()
    stage.fit(tmp_path, "pgd-at")


@pytest.mark.parametrize(
    ("file", "misfit"), [("best", "it has no score"), ("checkpoint", "it has no epoch")]
)
def test_a_state_that_lacks_its_figures_is_named(
    stage: Any, tmp_path: Path, file: str, misfit: str
) -> None:
    with pytest.raises(Killed):
        stage.fit(tmp_path, after(6, stage.method("pgd-at"), killed))
    path = tmp_path / f"{file}.safetensors"
    save_tensors(path, load_tensors(path)[0], {})
    with pytest.raises(UserError, match=rf"not written by this package; delete it .*{misfit}"):
        stage.fit(tmp_path, "pgd-at")


def test_a_refreshed_projection_under_awp(stage: Any, tmp_path: Path) -> None:
    """Both passes of a step see the projection of that step, also the first after a kill."""
    settings = {"negatives": 8, "dim": 5, "teacher_projection": "refreshed", "refresh": 3}

    def method() -> Method:
        student = create_model("digits-cnn-2", num_classes=3, channels=1, seed=3)
        return create_method(
            "gacd", student, ATTACK, teacher=stage.teacher, bank=stage.bank,
            options={"gacd": settings}, awp=AWP(gamma=0.01),
        )  # fmt: skip

    stage.fit(tmp_path / "whole", method())
    with pytest.raises(Killed):
        stage.fit(tmp_path / "killed", after(7, method(), killed))
    stage.fit(tmp_path / "killed", method())
    assert_same(tmp_path / "killed", tmp_path / "whole")

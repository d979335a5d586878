"""Stopped anywhere, by Ctrl-C or a kill, and run again: the bits of a run that never stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gacd import cli, runs
from gacd.methods import Method
from gacd.shapes import Batch
from gacd.storage import load_meta, load_tensors, read_json_lines
from gacd.training import loop


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Killed(Exception):
    """Stands for the end of the process: nothing after it runs."""


def killed() -> None:
    raise Killed


def after(steps: int, method: Method, do: Callable[[], None]) -> Method:
    """The method, with `do` done in its step of that number."""
    forward, count = method.forward, 0

    def counted(batch: Batch, generator: torch.Generator) -> Any:
        nonlocal count
        count += 1
        if count == steps:
            do()
        return forward(batch, generator)

    method.forward = counted  # type: ignore[method-assign]
    return method


def left(out: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]], dict[str, Any]]:
    """Everything a stage leaves, without the seconds it took."""
    rows = [{**row, "seconds": 0} for row in read_json_lines(out / "log.jsonl")]
    return *load_tensors(out / "best.safetensors"), rows  # type: ignore[return-value]


def assert_same(a: Path, b: Path) -> None:
    (weights, *rest), (others, *other_rest) = left(a), left(b)
    assert rest == other_rest
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


CASES = [("pgd-at", "32-true"), ("gacd", "32-true"), ("pgd-at", "bf16-mixed")]


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


def test_the_first_ctrl_c_waits_and_the_handler_is_put_back(stage: Any, tmp_path: Path) -> None:
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


COMMAND = (
    "train --model digits-cnn-4 --data.train_limit 300 --data.test_limit 50 --attacks natural "
    "--threat.eps 0.2 --training.attack.step_size 0.06 --training.attack.steps 4 "
    "--training.epochs 6 --training.ema 0.9 --training.batch_size 32 "
    "--fabric.precision 32-true --fabric.accelerator cpu"
)


def test_processes_stopped_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C (exit code 130), then kill -9, each in a real process; then the same bits as ever."""
    stopped = tmp_path / "stopped"
    arguments = COMMAND.split()
    state = stopped / "pgd-at" / "checkpoint.safetensors"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "gacd.cli", *arguments, "--out", str(stopped)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def wait_for_epoch(process: subprocess.Popen[str], epoch: int) -> None:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if state.is_file() and load_meta(state)["epoch"] >= epoch:
                return
            time.sleep(0.02)
        raise AssertionError(f"no epoch {epoch}: {process.communicate()[1]}")

    with start() as process:
        wait_for_epoch(process, 1)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        *_, last = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert last == "gacd: stopped; run the same command again to resume"
    reached = load_meta(state)["epoch"]
    assert not (state.parent / "done.json").exists()

    with start() as process:
        wait_for_epoch(process, reached + 1)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert load_meta(state)["epoch"] > reached
    assert not (state.parent / "done.json").exists()

    monkeypatch.setattr(runs, "write_run_report", lambda *_, **__: None)
    assert cli.main([*arguments, "--out", str(stopped)]) == 0
    assert cli.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    for name in ("model.safetensors", "best.safetensors"):
        assert_equal_files(stopped / "pgd-at" / name, tmp_path / "whole" / "pgd-at" / name)
    assert_same(stopped / "pgd-at", tmp_path / "whole" / "pgd-at")


def assert_equal_files(a: Path, b: Path) -> None:
    (tensors, meta), (others, other_meta) = load_tensors(a), load_tensors(b)
    assert meta == other_meta and tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert torch.equal(value, others[name]), name

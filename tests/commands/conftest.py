"""A miniature of every method, which the tests of the commands share."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gacd import cli
from gacd.commands import distill as command
from gacd.commands import run, training

COMMON = [
    "--data.train_limit",
    "200",
    "--data.test_limit",
    "40",
    "--data.pad",
    "1",
    "--data.flip",
    "false",
    "--threat.eps",
    "0.1",
    "--fabric.accelerator",
    "cpu",
    "--fabric.precision",
    "32-true",
    "--attacks",
    "natural",
    "pgd2",
]
STAGES = [
    f"--{stage}.{key}={value}"
    for stage in ("teacher.training", "training", "distillation", "finetune")
    for key, value in (("epochs", 1), ("batch_size", 32), ("attack.steps", 1))
]
DISTILL = [
    *("distill", "--teacher.model", "digits-cnn-4", "--student", "digits-cnn-2"),
    *(
        "--gacd.negatives",
        "64",
        "--crd.negatives",
        "64",
        "--evaluation.eps_curve",
        "[0.05]",
        *COMMON,
        *STAGES,
    ),
]
METHODS = (
    *("natural", "pgd-at", "trades", "mart", "kd", "ard", "rslad+igdm", "iad", "adaad"),
    *("regression", "crd+kd", "gacd", "gacd+aft", "gacd+rslad", "gacd+rslad+aft"),
)


def distill(out: Path, *methods: str) -> int:
    return cli.main([*DISTILL, "--out", str(out), "--methods", *methods])


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every method."""
    out = tmp_path_factory.mktemp("runs") / "all"
    assert distill(out, *METHODS) == 0
    return out


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """No report.html: drawing it takes longer than a miniature run."""
    monkeypatch.setattr(run, "write_run_report", lambda *_, **__: None)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The names of the stages that are trained and of the models that are attacked."""
    done: list[str] = []

    def note(where: ModuleType, what: str, key: str) -> None:
        original = getattr(where, what)

        def noted(*args: Any, **kwargs: Any) -> Any:
            done.append(f"{what} {kwargs[key]}" if key in kwargs else what)
            return original(*args, **kwargs)

        monkeypatch.setattr(where, what, noted)

    note(run, "measure_row", "")
    note(command, "fit_head", "")
    original = training.fit

    def fit(fabric: Any, method: Any, splits: Any, plan: Any, *, out: Path, name: str) -> Any:
        if not (out / "done.json").is_file():
            done.append(f"fit {name}")
        return original(fabric, method, splits, plan, out=out, name=name)

    monkeypatch.setattr(training, "fit", fit)
    return lambda: done

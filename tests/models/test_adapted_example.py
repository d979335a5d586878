"""A network from outside the package: the example of docs/methods.md, run as its reader would."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import gacd.models as models
from gacd import cli
from gacd.commands import run
from gacd.models.adapted import Adapted
from gacd.models.checkpoints import load_model
from gacd.storage import read_json

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_example_in_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "write_run_report", lambda *_, **__: None)
    monkeypatch.setattr(models, "_REGISTERED", {})
    (code,) = re.findall(r"```python\n(# networks\.py\n.*?)```", DOCS.read_text(), re.DOTALL)
    script, out = tmp_path / "networks.py", tmp_path / "run"
    script.write_text(code)
    stages = ("teacher.training", "training", "distillation", "finetune")
    arguments = [
        *("distill", "--teacher.model", "small-stem", "--student", "digits-cnn-2"),
        *("--methods", "gacd+aft", "--gacd.negatives", "8", "--threat.eps", "0.1"),
        *("--data.train_limit", "40", "--data.test_limit", "10", "--attacks", "natural"),
        *("--fabric.accelerator", "cpu", "--fabric.precision", "bf16-mixed"),
        *(f"--{s}.{f}" for s in stages for f in ("epochs=1", "batch_size=20", "attack.steps=1")),
    ]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0, capsys.readouterr().err
    assert [row["method"] for row in read_json(out / "results.json")] == ["pgd-at", "gacd+aft"]
    teacher, _ = load_model(out / "teacher" / "model.safetensors")
    assert isinstance(teacher, Adapted) and teacher.num_features == 512
    evaluate = ["evaluate", "--checkpoint", str(out / "teacher" / "model.safetensors")]
    shape = ["--data.test_limit", "10", "--attacks", "natural", "--out", str(tmp_path / "again")]
    assert cli.main([*evaluate, *shape]) == 0, capsys.readouterr().err
    models._REGISTERED.clear()
    assert cli.main([*evaluate, *shape[:-1], str(tmp_path / "third")]) == 2
    assert "unknown model 'small-stem'" in capsys.readouterr().err

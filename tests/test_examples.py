"""The examples run as a reader would run them, with less training."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from gacd.attacks.threat import ThreatModel
from gacd.data.load import load_splits
from gacd.evaluation.robust import evaluate
from gacd.models.checkpoints import load_model

EXAMPLES = Path(__file__).parents[1] / "examples"
EXAMPLE = EXAMPLES / "plain_pytorch.py"


def test_plain_pytorch_distils_a_student() -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLE), "2"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert out.returncode == 0, out.stderr
    found = re.findall(r"(\w+) ([\d.]+)% natural, ([\d.]+)% robust", out.stdout)
    assert [name for name, *_ in found] == ["teacher", "student"]
    for _, natural, robust in found:
        assert float(robust) <= float(natural)
        assert float(natural) > 60  # of ten digits


def test_plain_pytorch_needs_the_loss_alone() -> None:
    nodes = ast.walk(ast.parse(EXAMPLE.read_text()))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name and name.startswith("gacd")} == {
        "gacd.losses.contrastive"
    }


def test_stages_go_from_a_network_of_ones_own_to_an_attacked_student(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "stages.py"), "2", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert out.returncode == 0, out.stderr
    figures = r"(\w+): natural ([\d.]+)%, pgd20 ([\d.]+)%, autoattack ([\d.]+)%"
    found = re.findall(figures, out.stdout)
    assert [name for name, *_ in found] == ["teacher", "student"]
    assert all(float(natural) > float(pgd20) for _, natural, pgd20, _ in found)
    stages = {path.parent.name for path in tmp_path.glob("*/done.json")}
    assert stages == {"teacher", "gacd", "gacd+aft"}
    student, about = load_model(tmp_path / "student.safetensors")
    test = load_splits("digits", val_fraction=0.15, seed=0).test
    again = evaluate(student, test, attacks=[], threat=ThreatModel(eps=0.2), show_progress=False)
    assert f"{again.accuracy('natural'):.1f}" == found[1][1]
    assert about["architecture"] == "digits-cnn-8"

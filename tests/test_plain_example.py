"""The examples run as a reader would run them, with less training."""

import ast
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "plain_pytorch.py"


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

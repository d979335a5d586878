"""The benchmarks run, at sizes that measure nothing: they are no part of the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gacd.storage import read_json

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name: str, *arguments: object) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_training(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ("--model", "wrn-10-1", "--batch", 2, "--steps", 1, "--anchors", 2048, "--repeats", 2)
    run("training", *sizes, "--threads", 1, "--methods", "ard", "gacd", "--out", out)
    (record,) = read_json(out)
    assert list(record["rows"]) == ["ard", "gacd"]
    for row in record["rows"].values():
        assert sum(row["breakdown"].values()) == pytest.approx(1, abs=1e-3)


def test_streaming(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ("--images", 20_000, "--batch", 4, "--seconds", 0.5)
    run("streaming", "--folder", tmp_path / "shards", *sizes, "--out", out)
    assert read_json(out)["images"] == 20_000 - 20


def test_costs() -> None:
    run("costs", "--student", "wrn-10-1", "--teacher", "wrn-10-1", "--size", 8, "--steps", 1)

"""The benchmarks run, at sizes that measure nothing: they are no part of the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gacd.storage import read_json

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ("--model", "wrn-10-1", "--batch", 2, "--steps", 1, "--anchors", 2048, "--repeats", 2)
    run("training", *sizes, "--threads", 1, "--methods", "ard", "gacd", "--out", out)
    (record,) = read_json(out)
    assert list(record["rows"]) == ["ard", "gacd"]
    for row in record["rows"].values():
        assert sum(row["breakdown"].values()) == pytest.approx(1, abs=1e-3)


def test_precision(tmp_path: Path) -> None:
    printed = run("precision", "--repeats", 1, "--networks", "wrn-10-1", "--out", tmp_path / "o")
    seconds = read_json(tmp_path / "o")["seconds"]["wrn-10-1"]
    assert seconds.keys() == {"float32", "rounded", "native"} and min(seconds.values()) > 0
    assert "wrn-10-1" in printed


def test_streaming(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ("--images", 20_000, "--batch", 4, "--seconds", 0.5)
    run("streaming", "--folder", tmp_path / "shards", *sizes, "--out", out)
    assert read_json(out)["images"] == 20_000 - 20


def test_costs() -> None:
    run("costs", "--student", "wrn-10-1", "--teacher", "wrn-10-1", "--size", 8, "--steps", 1)


def test_objective() -> None:
    printed = run("objective", "--batches", 2, "--repeats", 1, "--threads", 1, "--json")
    record = json.loads(printed.splitlines()[-1])
    rows = record["cpu"]["B2"]
    assert rows.keys() >= {"exact", "exact_frozen", "sampled", "gather"}
    assert all(row["ms"] > 0 for row in rows.values())


def test_normalisers(tmp_path: Path) -> None:
    stages = ("teacher.training", "distillation")
    small = [f"--{s}.{f}" for s in stages for f in ("epochs=1", "batch_size=20", "attack.steps=1")]
    small += ["--teacher.model=digits-cnn-2", "--student=digits-cnn-2", "--data.train_limit=40"]
    small += ["--data.test_limit=10", "--evaluation.autoattack_limit=10"]
    places = ("--runs", tmp_path / "runs", "--out", tmp_path / "out.json")
    printed = run("normalisers", *places, "--seeds", 1, *small)
    rows = {row["normaliser"]: row for row in read_json(tmp_path / "out.json")["rows"]}
    assert set(rows) > {"teacher", "exact", "through-z", "info-nce"}
    assert rows["exact"]["n"] == dict.fromkeys(("natural", "pgd20", "autoattack"), 10)
    assert "Minus exact" in printed

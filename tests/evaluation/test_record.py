"""Records: complete, JSON, and silent about whose machine they come from."""

import json
import platform
import subprocess
from pathlib import Path, PurePosixPath

import pytest
import torch

import gacd
from gacd.evaluation.outcomes import Evaluation
from gacd.evaluation.record import environment, make_record, without_paths


@pytest.fixture
def record() -> dict:
    robust = torch.tensor([True, True, True, False])
    evaluation = Evaluation(
        n=4,
        robust={"natural": robust, "pgd20": robust & False},
        index={"natural": torch.arange(4), "pgd20": torch.arange(4)},
        settings={"eps": 0.1},
        seconds={"natural": 0.1, "pgd20": 2.0},
    )
    return make_record(
        model="digits-cnn-8",
        method="gacd",
        dataset="digits",
        seed=1,
        config={"data": {"root": Path("/home/someone/data/cifar"), "eps": "8/255"}, "lr": 0.1},
        evaluation=evaluation,
        extra={"teacher": "~/models/teacher.safetensors", "train_seconds": 3.5},
    )


def test_top_level_is_flat_and_in_percent(record: dict) -> None:
    wanted = {"model": "digits-cnn-8", "method": "gacd", "dataset": "digits", "seed": 1, "n": 4}
    wanted |= {"natural": 75.0, "pgd20": 0.0, "worst": 0.0, "train_seconds": 3.5}
    assert {key: record[key] for key in wanted} == wanted
    assert record["evaluation"]["natural"]["n"] == 4
    assert record["seconds"] == {"natural": 0.1, "pgd20": 2.0}
    assert record["timestamp"].endswith("+00:00")


def test_json_holds_no_path_and_no_host(record: dict) -> None:
    text = json.dumps(record, allow_nan=False)
    assert record["teacher"] == "teacher.safetensors"
    assert record["config"] == {"data": {"root": "cifar", "eps": "8/255"}, "lr": 0.1}
    assert "someone" not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert str(Path(gacd.__file__).parent) not in text
    assert len(platform.node()) < 4 or platform.node() not in text


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("/home/someone/runs/a.json", "a.json"),
        ("~/runs", "runs"),
        ("../../someone/runs", "runs"),
        (r"C:\Users\someone\a.json", "a.json"),
        ("file:///home/someone/a.json", "a.json"),
        ("--config=/home/someone/tiny.yaml --seed 1", "--config=tiny.yaml --seed 1"),
        (PurePosixPath("data/cifar"), "cifar"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("eps 8/255", "eps 8/255"),
        ("c:d, e/f", "c:d, e/f"),
        ("runs/tiny", "runs/tiny"),
        ({"a": ["/x/y", 1, None, True]}, {"a": ["y", 1, None, True]}),
    ],
)
def test_paths_are_cut_to_their_last_component(value: object, kept: object) -> None:
    assert without_paths(value) == kept


def test_environment_names_code_and_machine() -> None:
    found = environment()
    assert found["gacd"] == gacd.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"] and found["cores"] >= 1 and found["python"].startswith("3.")
    folder = Path(gacd.__file__).parent
    git = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    tracked = subprocess.run(
        ["git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py"],
        capture_output=True,
        check=False,
    )
    if tracked.returncode == 0:
        head = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        assert found["commit"] == head
        assert isinstance(found["dirty"], bool)
    else:
        assert found["commit"] is None


def test_installed_inside_a_strangers_repository_has_no_commit(tmp_path: Path) -> None:
    from gacd.evaluation.record import revision

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "__init__.py").touch()
    assert revision(tmp_path) == {"commit": None, "dirty": None}

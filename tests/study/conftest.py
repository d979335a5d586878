"""Made-up cells of a study, with outcomes files of images that are hard or easy for all models."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gacd.evaluation.outcomes import Evaluation
from gacd.study.results import Result

N = 500
STAND_INS = {"wrn-10-1": "resnet18", "wrn-10-2": "wrn-34-10"}
Maker = Callable[..., Result]


@pytest.fixture
def cell(tmp_path: Path) -> Maker:
    """`cell(study, seed, {metric: accuracy in %} or None, **labels)`."""

    def make(
        study: str,
        seed: int,
        accuracies: Mapping[str, float] | None,
        *,
        outcomes: bool = True,
        n: int = N,
        **labels: Any,
    ) -> Result:
        key = f"{study}-{seed}-" + "-".join(map(str, labels.values()))
        folder = tmp_path / key.replace("/", "_")
        record = None
        if accuracies is not None:
            found = evaluation(accuracies, n, abs(hash(key)) % 2**32)
            record = record_of(found, labels, seed)
            folder.mkdir(parents=True, exist_ok=True)
            if outcomes:
                found.save(folder / "outcomes.safetensors")
        return Result(study=study, labels=labels, seed=seed, key=key, folder=folder, record=record)

    return make


def evaluation(accuracies: Mapping[str, float], n: int, seed: int) -> Evaluation:
    """Right on the easiest images, up to noise of this model's own."""
    easy = np.random.default_rng(0).normal(size=n)
    own = np.random.default_rng(seed).normal(scale=0.3, size=n)
    order = np.argsort(-(easy + own))
    robust = {}
    for metric, accuracy in accuracies.items():
        right = np.zeros(n, dtype=bool)
        right[order[: round(accuracy / 100 * n)]] = True
        robust[metric] = torch.from_numpy(right)
    index = {metric: torch.arange(n) for metric in robust}
    settings = {"test_images": "0123", "dataset": "made up", "eps": 0.1, "norm": "linf"}
    return Evaluation(n=n, robust=robust, index=index, settings=settings)


def record_of(found: Evaluation, labels: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """As `gacd evaluate` would write it, in what a report reads."""
    table = found.to_record()
    return {
        "model": str(labels.get("student") or labels.get("teacher")),
        "method": str(labels.get("method")),
        "role": labels.get("role"),
        "dataset": str(labels.get("dataset", "made up")),
        "seed": seed,
        "n": found.n,
        **{name: row["accuracy"] for name, row in table.items()},
        "intervals": {name: [row["low"], row["high"]] for name, row in table.items()},
        "train_seconds": 100.0,
        "settings": dict(found.settings),
        "timestamp": "2026-11-24T12:00:00+00:00",
        "environment": {
            "gacd": "0.1.0",
            "commit": "0123456789abcdef",
            "dirty": False,
            "python": "3.11.2",
            "versions": {"torch": "2.14.0"},
            "platform": "Linux x86_64",
            "cpu": "a processor",
            "cores": 2,
            "threads": 1,
            "gpus": [],
        },
    }

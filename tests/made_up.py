"""Made-up cells of a study, with outcomes files of images that are hard or easy for all models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gacd import cli
from gacd import config as c
from gacd.evaluation.outcomes import Evaluation
from gacd.storage import fingerprint
from gacd.study.results import Result

N = 500
STAND_INS = {"wrn-10-1": "resnet18", "wrn-10-2": "wrn-34-10"}


def parsed(*words: str) -> c.Study:
    """What `gacd study` makes of its words."""
    cfg = cli.parse("study", list(words))
    assert isinstance(cfg, c.Study)
    return cfg


class Maker:
    """Makes cells in a folder: `maker(study, seed, {metric: accuracy in %} or None, **labels)`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self,
        study: str,
        seed: int,
        accuracies: Mapping[str, float] | None,
        *,
        outcomes: bool = True,
        n: int = N,
        **labels: Any,
    ) -> Result:
        name = "-".join([study, str(seed), *map(str, labels.values())])
        key = fingerprint([name])
        folder = self.folder / key
        record = None
        if accuracies is not None:
            found = evaluation(accuracies, n, int(key, 16) % 2**32)
            record = record_of(found, labels, seed)
            folder.mkdir(parents=True, exist_ok=True)
            if outcomes:
                found.save(folder / "outcomes.safetensors")
        return Result(study=study, labels=labels, seed=seed, key=key, folder=folder, record=record)


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
    return {
        "model": str(labels.get("student") or labels.get("teacher")),
        "method": str(labels.get("method")),
        "role": labels.get("role"),
        "dataset": "CIFAR-10 (JPEG)",
        "seed": seed,
        "n": found.n,
        **{name: found.accuracy(name) for name in found.robust},
        "parameters": 1000,
        "evaluation": found.to_record(),
        "intervals": {name: list(found.interval(name)) for name in found.robust},
        "train_seconds": 100.0,
        "train_flops": 1e9,
        "settings": dict(found.settings),
        "config": {"seed": seed, "threat": {"norm": "linf", "eps": 0.1}},
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


def whole_study(
    maker: Maker, seeds: tuple[int, ...] = (0, 1, 2), gain: float = 12.0
) -> list[Result]:
    """Every study; what the paper claims is true by `gain` points."""
    results = []
    for seed in seeds:
        jitter = 0.4 * (seed % 3 - 1)
        results += _models(maker, seed, gain, jitter)
        results += _figure2(maker, seed, gain, jitter)
        results += _transfers(maker, seed, gain, jitter)
        for name in ("figure3", "figure4", "figure5"):
            results.append(_analysis(maker.folder, name, seed, gain))
    return results


def _three(natural: float, pgd20: float, jitter: float = 0.0) -> dict[str, float]:
    return {
        "natural": natural + jitter,
        "pgd20": pgd20 + jitter,
        "autoattack": max(0.0, pgd20 + jitter - 2),
    }


def _models(cell: Maker, seed: int, gain: float, jitter: float) -> list[Result]:
    data = {"dataset": "cifar10"}
    weak, strong = "wrn-10-1", "wrn-10-2"
    rows = []
    for teacher in (weak, strong):
        labels = {"role": "teacher", "method": "pgd-at", "teacher": teacher, **data}
        for name in ("table1", "table3"):
            rows.append(cell(name, seed, _three(50, 30, jitter), **labels))
        for student in (weak, strong):
            pair = {"role": "student", "teacher": teacher, "student": student, **data}
            kd = _three(50 + gain, 10 - gain / 2, jitter) if teacher == strong else _three(52, 25)
            rows.append(cell("table1", seed, kd, method="kd", **pair))
            rows.append(cell("table1", seed, _three(50, 30, jitter), method="ard", **pair))
            rows.append(cell("table1", seed, _three(51, 24, jitter), method="gacd", **pair))
            better = _three(50 + gain, 30 + gain, jitter)
            rows.append(cell("table1", seed, better, method="gacd+aft", **pair))
    for student in (weak, strong):
        alone = {"role": "baseline", "method": "pgd-at", "student": student, **data}
        rows.append(cell("table1", seed, _three(52, 31, jitter), **alone))
    pair = {"role": "student", "teacher": weak, "student": strong, **data}
    for method in ("gacd+aft", "ard"):
        for reweight, points in (("teacher", gain), ("none", 0.0)):
            found = _three(50 + points, 30 + points, jitter)
            rows.append(cell("ablation", seed, found, method=method, reweight=reweight, **pair))
    pair["student"] = weak
    for index, method in enumerate(("ard", "rslad", "adaad", "gacd+aft", "gacd+rslad")):
        rows.append(
            cell("rivals", seed, _three(48 + index, 29 + index, jitter), method=method, **pair)
        )
    rows.append(
        cell(
            "rivals",
            seed,
            _three(52, 31, jitter),
            role="baseline",
            method="pgd-at",
            student=weak,
            **data,
        )
    )
    return rows


def _figure2(cell: Maker, seed: int, gain: float, jitter: float) -> list[Result]:
    pair = {"role": "student", "method": "gacd+aft", "teacher": "wrn-10-1", "student": "wrn-10-1"}
    rows = []
    for step, k in enumerate((16, 64, 256, 1024)):
        found = _three(50 - gain / 4 * step, 30 + gain / 4 * step, jitter)
        rows.append(cell("figure2", seed, found, negatives=k, **pair))
    for temperature in (0.05, 0.1, 0.2):
        points = gain if temperature == 0.1 else 0.0
        found = _three(50 + points, 30 + points, jitter)
        rows.append(cell("figure2", seed, found, temperature=temperature, **pair))
    return rows


def _transfers(cell: Maker, seed: int, gain: float, jitter: float) -> list[Result]:
    return [
        cell(
            "table4",
            seed,
            {
                k: at + points + jitter
                for k, at in (("natural", 40), ("pgd7", 20), ("autoattack", 15))
            },
            role="transfer",
            method="transfer",
            source=source,
            dataset=dataset,
        )
        for dataset in ("animals", "vehicles")
        for source, points in (("pgd-at (teacher)", 0), ("kd", 0), ("ard", 0), ("gacd", gain))
    ]


def likeness(points: float, seed: int) -> dict[str, Any]:
    """Of a student to its teacher: `points` hundredths closer than another."""
    mean = 0.3 - points / 100 + 0.01 * (seed % 3)
    found = {}
    for view, times in (("natural", 1.0), ("attacked", 2.0)):
        matrix = np.full((3, 3), times * mean * 1.5) * (1 - np.eye(3))
        found[view] = {"mean": float(matrix.mean()), "matrix": matrix.tolist()}
    return found


def _analysis(folder: Path, name: str, seed: int, gain: float) -> Result:
    generator = np.random.default_rng(seed)
    classes = ["bird", "cat", "truck"]

    sizes = {"bird": 20, "truck": 20, "truck, attacked": 20}
    models = ("natural", "teacher", "ard", "gacd")
    shape = {
        "silhouette": 0.2 + seed / 50,
        "inter_intra": 1.4,
        "nearer_true": 80.0,
        "nearer_true_low": 60.0,
    }
    record = {
        "dataset": "CIFAR-10 (JPEG)",
        "n": N,
        "classes": classes,
        "seed": seed,
        "attack": {"name": "PGD-20", "norm": "linf", "eps": 8 / 255, "made_on": "own"},
        "correlations": {"ard": likeness(0.0, seed), "gacd": likeness(gain, seed)},
        "cka": {m: {"natural": 0.8, "attacked": 0.7} for m in ("ard", "gacd")},
        "pair": {"target": "bird", "source": "truck", "n_target": 20, "n_source": 20},
        "geometry": {m: {**shape, "nearer_true_high": 92.0} for m in models},
        "embedding": {
            "kind": "separate",
            "perplexity": 10,
            "points": {
                m: {g: generator.normal(size=(n, 2)).tolist() for g, n in sizes.items()}
                for m in models
            },
        },
        "teacher": {"architecture": "wrn-10-1", "method": "pgd-at"},
        "models": {m: {"architecture": "wrn-10-1", "method": m} for m in models},
        **{
            k: v
            for k, v in record_of(evaluation({"natural": 50}, N, 0), {}, seed).items()
            if k in ("environment", "timestamp")
        },
    }
    return Result(
        study=name,
        labels={"role": "analysis", "teacher": "wrn-10-1", "student": "wrn-10-1"},
        seed=seed,
        key=f"analysis-{seed}",
        folder=folder / f"analysis-{seed}",
        record=record,
    )

"""Frozen features under linear layers of other strengths: what the choice of C costs and buys.

    python benchmarks/heads.py STUDY --out FILE [--methods gacd ard ...] [STUDY FLAGS...]

The study's students of its main pair, with their weights at hand. For every strength C of the last
layer's logistic regression: natural and PGD-20 accuracy on test (AutoAttack for some C), PGD-10 on
validation. `gacd.linear.fit_head` takes the C whose mean of clean and attacked validation accuracy
is best; the test's figures are shown, and choose nothing. Intervals of 95 % are over seeds and test
images.
"""

import argparse
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from gacd import build, cli
from gacd import config as c
from gacd.data.dataset import Splits
from gacd.evaluation.record import environment
from gacd.evaluation.robust import evaluate
from gacd.linear import fit_head
from gacd.models.checkpoints import load_model
from gacd.storage import read_json, write_json
from gacd.study.rule import half_width, over_seeds, over_unpaired_images
from gacd.study.work import results

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
UNDER_AUTOATTACK = (1e-4, 1.0)


def measure(path: Path, cfg: c.Study, splits: Splits) -> list[dict[str, Any]]:
    """A row for every strength: accuracies in %, and of how many images."""
    model, _ = load_model(path)
    shared: dict[str, Any] = {
        "threat": build.threat(cfg.threat), "batch_size": 500, "show_progress": False,
        "autoattack_limit": cfg.evaluation.autoattack_limit,
    }  # fmt: skip
    rows = []
    for strength in STRENGTHS:
        fit_head(model, splits, None, (strength,))
        attacks = ["pgd20", *(["autoattack"] if strength in UNDER_AUTOATTACK else [])]
        test = evaluate(model, splits.test, attacks=attacks, **shared)
        val = evaluate(model, splits.val, attacks=["pgd10"], **shared)
        row: dict[str, Any] = {"C": strength, "n": {}}
        for part, found in (("test", test), ("val", val)):
            for name in found.robust:
                row[f"{part} {name}"] = found.accuracy(name)
                row["n"][f"{part} {name}"] = len(found.outcomes(name)[0])
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Means with their intervals."""
    keys = ["test natural", "test pgd20", "test autoattack", "val natural", "val pgd10"]
    lines = [f"| method | seeds | C | {' | '.join(keys)} |", "|---" * (3 + len(keys)) + "|"]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["C"]), []).append(row)
    for (method, strength), group in groups.items():
        cells = " | ".join(cell(group, key) if key in group[0] else "" for key in keys)
        lines.append(f"| {method} | {len(group)} | {strength:g} | {cells} |")
    return "\n".join(lines)


def cell(group: list[dict[str, Any]], key: str) -> str:
    """The mean over seeds of what is in %, with its interval over seeds and test images."""
    shares = [row[key] / 100 for row in group]
    mean = fmean(shares)
    parts = [over_unpaired_images(mean, group[0]["n"][key]), over_seeds(shares)]
    half = 100 * half_width([part for part in parts if part is not None])
    return f"{100 * mean:.1f} [{max(0, 100 * mean - half):.1f}, {100 * mean + half:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", type=Path, help="a study's folder, with its students' weights")
    parser.add_argument("--out", type=Path, required=True, help="append the record to this file")
    parser.add_argument("--methods", nargs="+", default=["pgd-at", "ard", "regression", "gacd"])
    options, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    cfg = cli.parse("study", ["run", "rivals", "--out", str(options.study), *flags])
    assert isinstance(cfg, c.Study)
    splits = cache(lambda seed: build.splits(cfg.data, seed))
    rows = []
    for result in results(cfg):
        path = result.folder / "model.safetensors"
        method = result.labels.get("method")
        if method in options.methods and result.labels["role"] != "teacher" and path.is_file():
            for row in measure(path, cfg, splits(result.seed)):
                rows.append({"method": method, "seed": result.seed, **row})
                print(rows[-1], flush=True)
    records = read_json(options.out) if options.out.is_file() else []
    records.append({"environment": environment(), "rows": rows})
    print(table([row for record in records for row in record["rows"]]))
    write_json(options.out, records)


if __name__ == "__main__":
    main()

"""Frozen features under linear layers of other strengths: what the choice of C costs and buys.

    python benchmarks/heads.py STUDY --out FILE [--methods gacd ard ...] [STUDY FLAGS...]

The study's students of its main pair, with their weights at hand. For every strength C of the last
layer's logistic regression: natural and PGD-20 accuracy on test, natural and PGD-10 on validation.
`gacd.linear.fit_head` takes the C that is best on clean validation images; the test's figures are
shown, and choose nothing.
"""

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from gacd import build, cli
from gacd import config as c
from gacd.evaluation.record import environment
from gacd.evaluation.robust import evaluate
from gacd.linear import fit_head
from gacd.models.checkpoints import load_model
from gacd.storage import write_json
from gacd.study.work import results

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def measure(path: Path, cfg: c.Study, seed: int) -> list[dict[str, float]]:
    """A row for every strength."""
    splits, threat = build.splits(cfg.data, seed), build.threat(cfg.threat)
    model, _ = load_model(path)
    rows = []
    for strength in STRENGTHS:
        fit_head(model, splits, (strength,))
        row = {"C": strength}
        for part, data, attack in (("test", splits.test, "pgd20"), ("val", splits.val, "pgd10")):
            found = evaluate(
                model, data, attacks=["natural", attack], threat=threat, batch_size=500,
                show_progress=False,
            )  # fmt: skip
            row |= {f"{part} {name}": found.accuracy(name) for name in ("natural", attack)}
        rows.append(row)
    return rows


def table(record: dict[str, Any]) -> str:
    """Means over seeds."""
    keys = [key for key in record["rows"][0] if key not in ("method", "seed")]
    lines = [f"| method | seeds | {' | '.join(keys)} |", "|---" * (2 + len(keys)) + "|"]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        groups.setdefault((row["method"], row["C"]), []).append(row)
    for (method, strength), rows in groups.items():
        means = " | ".join(f"{fmean(row[key] for row in rows):.1f}" for key in keys[1:])
        lines.append(f"| {method} | {len(rows)} | {strength:g} | {means} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", type=Path, help="a study's folder, with its students' weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["pgd-at", "ard", "regression", "gacd"])
    options, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    cfg = cli.parse("study", ["run", "rivals", "--out", str(options.study), *flags])
    assert isinstance(cfg, c.Study)
    rows = []
    for result in results(cfg):
        path = result.folder / "model.safetensors"
        method = result.labels.get("method")
        if method in options.methods and result.labels["role"] != "teacher" and path.is_file():
            for row in measure(path, cfg, result.seed):
                rows.append({"method": method, "seed": result.seed, **row})
                print(rows[-1], flush=True)
    record = {"environment": environment(), "rows": rows}
    print(table(record))
    write_json(options.out, record)


if __name__ == "__main__":
    main()

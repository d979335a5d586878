"""What the normaliser Z does to a student: every choice of it, and InfoNCE, trained on the digits.

    python benchmarks/normalisers.py --out FILE [--runs DIR] [--seeds 0 1 2 ...] [DISTILL FLAGS...]

The recipe quickstart's teacher and its GACD student, without fine-tuning; nothing but the loss
differs between the rows of a seed. Two rows are no setting of the package, and made here: the
gradient through Z, and InfoNCE. The record is written row by row, the runs resume.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from heads import cell

from gacd import cli
from gacd.anchors import Anchors
from gacd.commands.distill import distill
from gacd.evaluation.record import environment
from gacd.losses.pairs import Pairs
from gacd.methods.estimates import OverAnchors
from gacd.methods.gacd import GACD
from gacd.methods.registry import register_method
from gacd.shapes import Batch, PerSample
from gacd.storage import read_json, write_json
from gacd.study.rule import half_width, over_seeds

METRICS = ("natural", "pgd20", "autoattack")
ROWS: dict[str, tuple[str, ...]] = {
    "exact": (),
    "first-batch": ("--gacd.normaliser", "first-batch"),
    "running": ("--gacd.normaliser", "running"),
    "none": ("--gacd.normaliser", "none"),
    "through-z": ("--methods", "through-z", "--extra.through-z", "{negatives: 1024}"),
    "info-nce": ("--methods", "info-nce", "--extra.info-nce", "{negatives: 1024}"),
}


class _ThroughZ(OverAnchors):
    def forward(self, pairs: Pairs, *given: Any, **more: Any) -> PerSample:
        pairs.gacd_loss = partial(pairs.gacd_loss, z_gradient=True)
        return super().forward(pairs, *given, **more)


class _InfoNCE(OverAnchors):
    def forward(
        self, pairs: Pairs, batch: Batch, own: Anchors, anchors: Anchors, *, weighted: bool
    ) -> PerSample:
        loss_B = pairs.log_partition() - pairs.positive_B
        return own.weights_M * loss_B if weighted and own.weights_M is not None else loss_B


class ThroughZ(GACD):
    """GACD, Z no constant of its gradient."""

    estimate: type[OverAnchors] = _ThroughZ

    def __init__(self, given: Any, *, negatives: int = 1024) -> None:
        super().__init__(given, negatives=negatives)
        self.anchors = self.estimate(self.bank, negatives, "exact")


class InfoNCE(ThroughZ):
    """InfoNCE in the place of GACD's loss."""

    estimate = _InfoNCE


def measure(runs: Path, seed: int, flags: list[str]) -> list[dict[str, Any]]:
    """The teacher's row, and one for every choice."""
    bank = runs / f"seed-{seed}"
    rows = []
    for name, said in ROWS.items():
        out = bank / name
        arguments = ["--config", "quickstart", "--methods", "gacd", "--seed", str(seed), *flags]
        arguments += ["--evaluation.workers", "0", "--evaluation.eps_curve", "[]", *said]
        if name != "exact":  # the teacher that the first one trained
            teacher = bank / "exact" / "teacher" / "model.safetensors"
            arguments += ["--teacher.checkpoint", str(teacher), "--teacher.evaluate", "false"]
        cfg = cli.parse("distill", [*arguments, "--bank", str(bank), "--out", str(out)])
        distill(cfg)
        if name == "exact":
            rows.append(_row("teacher", seed, read_json(out / "teacher" / "record.json")))
        rows.append(_row(name, seed, read_json(out / cfg.methods[0] / "record.json")))
    return rows


def _row(name: str, seed: int, record: Mapping[str, Any]) -> dict[str, Any]:
    n = {metric: int(record.get(f"{metric}_n", record["n"])) for metric in METRICS}
    return {"normaliser": name, "seed": seed, **{m: record[m] for m in METRICS}, "n": n}


def table(rows: list[dict[str, Any]]) -> str:
    """Means with their intervals."""
    lines = ["| normaliser | seeds | natural | PGD-20 | AutoAttack |", "|---|---:|---:|---:|---:|"]
    for name in (*ROWS, "teacher"):
        group = [row for row in rows if row["normaliser"] == name]
        cells = " | ".join(cell(group, metric) for metric in METRICS)
        lines.append(f"| {name} | {len(group)} | {cells} |")
    return "\n".join(lines)


def differences(rows: list[dict[str, Any]]) -> str:
    """From the default, seed by seed: the mean, with its 95 % interval over seeds."""
    found = {(row["normaliser"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    lines = ["| minus exact | natural | PGD-20 | AutoAttack |", "|---|---:|---:|---:|"]
    for name in list(ROWS)[1:]:
        cells = []
        for metric in METRICS:
            apart = [found[name, seed][metric] - found["exact", seed][metric] for seed in seeds]
            spread = over_seeds(apart)
            mean, interval = fmean(apart), ""
            if spread is not None:  # one seed has none
                half = half_width([spread])
                interval = f" [{mean - half:.1f}, {mean + half:.1f}]"
            cells.append(f"{mean:+.1f}{interval}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="write the record to this file")
    parser.add_argument("--runs", type=Path, default=Path("runs/normalisers"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options, flags = parser.parse_known_args()
    register_method("through-z", ThroughZ)
    register_method("info-nce", InfoNCE)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        rows += measure(options.runs, seed, flags)
        write_json(options.out, {"environment": environment(), "flags": flags, "rows": rows})
    print(table(rows), differences(rows), sep="\n\n")


if __name__ == "__main__":
    main()

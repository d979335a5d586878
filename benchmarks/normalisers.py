"""What the normaliser Z does to a student: every choice of it, and InfoNCE, trained on the digits.

    python benchmarks/normalisers.py --out FILE [--runs DIR] [--seeds 0 1 2 ...] [DISTILL FLAGS...]

The recipe quickstart's teacher and its GACD student, without fine-tuning; nothing but the loss
differs between the rows of a seed. Two rows are no setting of the package, and made here: the
gradient through Z, and InfoNCE. The record is written row by row, the runs resume.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from gacd import cli
from gacd.anchors import Anchors
from gacd.commands.distill import distill
from gacd.evaluation.record import environment
from gacd.losses.pairs import Pairs
from gacd.methods.estimates import OverAnchors
from gacd.methods.gacd import GACD
from gacd.methods.registry import register_method
from gacd.report.tables import HEADLINES
from gacd.shapes import Batch, PerSample
from gacd.storage import read_json, write_json
from gacd.study.repeats import arm
from gacd.study.seeds import seed_tables

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


def measure(runs: Path, seed: int, flags: list[str]) -> dict[str, Path]:
    """The folder of the teacher's row, and of that of every choice."""
    bank = runs / f"seed-{seed}"
    folders = {}
    for name, said in ROWS.items():
        out = bank / name
        arguments = ["--config", "quickstart", "--methods", "gacd", "--seed", str(seed), *flags]
        arguments += ["--evaluation.workers", "0", "--evaluation.eps_curve", "[]", *said]
        if name != "exact":  # the teacher that the first one trained
            teacher = bank / "exact" / "teacher" / "model.safetensors"
            arguments += ["--teacher.checkpoint", str(teacher), "--teacher.evaluate", "false"]
        cfg = cli.parse("distill", [*arguments, "--bank", str(bank), "--out", str(out)])
        distill(cfg)
        folders[name] = out / cfg.methods[0]
    return folders | {"teacher": bank / "exact" / "teacher"}


def row(name: str, folder: Path) -> dict[str, Any]:
    """What the record keeps."""
    record = read_json(folder / "record.json")
    n = {metric: int(record.get(f"{metric}_n", record["n"])) for metric in HEADLINES}
    return {
        "normaliser": name,
        "seed": record["seed"],
        **{metric: record[metric] for metric in HEADLINES},
        "n": n,
        "masking": [check["name"] for check in _failed(folder / "diagnosis.json")],
    }


def _failed(path: Path) -> list[dict[str, Any]]:
    checks: list[dict[str, Any]] = read_json(path) if path.is_file() else []
    return [check for check in checks if not check["passed"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="write the record to this file")
    parser.add_argument("--runs", type=Path, default=Path("runs/normalisers"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options, flags = parser.parse_known_args()
    register_method("through-z", ThroughZ)
    register_method("info-nce", InfoNCE)
    folders: dict[str, list[Path]] = {}
    for seed in options.seeds:
        for name, folder in measure(options.runs, seed, flags).items():
            folders.setdefault(name, []).append(folder)
        rows = [row(name, folder) for name, each in folders.items() for folder in each]
        arms = {name: arm(name, dict(enumerate(each))) for name, each in folders.items()}
        tables = seed_tables(arms, "exact", max(map(len, folders.values())))
        found = "\n".join(table.markdown() for table in tables)
        record = {"environment": environment(), "flags": flags, "rows": rows}
        write_json(options.out, {**record, "tables": found.splitlines()})
    print(found)


if __name__ == "__main__":
    main()

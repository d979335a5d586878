"""What a training step costs in time and memory as things grow; the exponent of each, and a figure.

    python benchmarks/scaling.py [--threads 1] [--out benchmarks/results/scaling-cpu]

One thing varies at a time: anchors M (estimators exact and sampled), negatives k (sampled), batch
B, attack steps, student width. Time is the least of the repeats; with `--threads 1` processor time.
Memory is the peak above the level before the step. The exponent is the slope of log(cost) against
log(size) between the two largest sizes: 1 is linear, and anything much above it a hidden quadratic
term. Times contain a fixed part, so exponents below 1 are usual. FLOPs are counted by torch.
"""

import argparse
import math
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from contestants import Step, World, ours  # type: ignore[import-not-found]  # beside this file
from objective import peak_bytes  # type: ignore[import-not-found]  # beside this file

from gacd.evaluation.record import environment
from gacd.storage import write_json
from training import flops_of, seconds_of  # type: ignore[import-not-found]

BASE = {"anchors": 16_384, "negatives": 4096, "batch": 32, "steps": 2, "model": "wrn-10-1"}
SWEEPS: dict[str, dict[str, Any]] = {
    "M, exact": {"key": "anchors", "values": [8192, 16_384, 32_768, 65_536]},
    "M, sampled": {
        "key": "anchors", "values": [8192, 16_384, 32_768, 65_536], "estimator": "sampled",
    },
    "k, sampled": {
        "key": "negatives", "values": [2048, 4096, 8192, 16_384], "estimator": "sampled",
        "anchors": 32_768,
    },
    "B": {"key": "batch", "values": [16, 32, 64, 128]},
    "attack steps": {"key": "steps", "values": [1, 2, 4, 8]},
    "student parameters": {
        "key": "model", "values": ["wrn-10-1", "wrn-16-1", "wrn-10-2", "wrn-10-4"],
    },
}  # fmt: skip


def parameters(model: str) -> int:
    from gacd.models import create_model

    return sum(p.numel() for p in create_model(model, num_classes=10, seed=0).parameters())


def sweep(name: str, device: torch.device, repeats: int, threads: int | None) -> dict[str, Any]:
    plan = SWEEPS[name]
    estimator = plan.get("estimator", "exact")
    steps: dict[str, Step] = {}
    worlds, flops, peaks = {}, [], []
    for value in plan["values"]:
        changes = {k: v for k, v in plan.items() if k in BASE} | {plan["key"]: value}
        world = World(device, Namespace(**BASE | changes, threads=threads))
        options = {"estimator": estimator, "negatives": (BASE | changes)["negatives"]}
        worlds[str(value)] = world
        steps[str(value)] = ours("gacd", world, options=options)
        flops.append(flops_of("gacd", world, options=options))
        peaks.append(peak_bytes(steps[str(value)], device))
    times = seconds_of(steps, world, repeats)
    seconds = [min(times[str(value)]) for value in plan["values"]]
    sizes = [parameters(v) if isinstance(v, str) else v for v in plan["values"]]
    return {
        "sizes": sizes,
        "seconds": [round(s, 4) for s in seconds],
        "MB": [None if p is None else round(p / 2**20, 1) for p in peaks],
        "GFLOP": [round(f / 1e9, 2) for f in flops],
        "exponent of time": exponent(sizes, seconds),
        "exponent of memory": None if None in peaks else exponent(sizes, peaks),
        "exponent of FLOPs": exponent(sizes, flops),
    }


def exponent(sizes: list[int], costs: list[Any]) -> float:
    """d log(cost) / d log(size) at the large end."""
    return round(math.log(costs[-1] / costs[-2]) / math.log(sizes[-1] / sizes[-2]), 2)


def draw(record: dict[str, Any], path: Path) -> None:
    """Time, memory and FLOPs over those at the smallest size, all on the same scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    grid = figure.subplots(2, 3, sharey=True)
    for axes, (name, row) in zip(grid.flat, record["sweeps"].items(), strict=True):
        sizes = row["sizes"]
        for key, style in (("seconds", "o-"), ("MB", "s--"), ("GFLOP", "^-")):
            if None not in row[key]:
                axes.plot(sizes, [cost / row[key][0] for cost in row[key]], style, label=key)
        axes.plot(sizes, [size / sizes[0] for size in sizes], ":", color="grey", label="linear")
        axes.set_xscale("log")
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
        axes.minorticks_off()
        axes.set_title(f"{name} (time: exponent {row['exponent of time']})", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("relative to the smallest size")
    grid[0, 0].legend(fontsize=8)
    figure.suptitle("What a training step of GACD costs as one thing grows", fontsize=10)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.png")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {
        "environment": environment(),
        "device": device.type,
        "clock": "processor" if options.threads == 1 and device.type == "cpu" else "wall",
        "base": BASE,
        "repeats": options.repeats,
        "sweeps": {},
    }
    for name in SWEEPS:
        record["sweeps"][name] = sweep(name, device, options.repeats, options.threads)
        print(name, record["sweeps"][name], flush=True)
    record["load"] = round(os.getloadavg()[0], 1)
    if options.out:
        write_json(options.out.with_suffix(".json"), record)
        draw(record, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""A training step: images per second, utilisation and breakdown, beside a plain loop, in one run.

    python benchmarks/training.py [--peer DIR] [--threads N] [--model NAME --batch B] [--out FILE]

Contestants, for every method:

    gacd   this package: bytes on the device, bf16 (float32 on a processor that is slow with it),
           channels-last, folded attack, no look at a value (--compile: and the student by
           torch.compile)
    plain  fp32, DataLoader with torchvision's transforms, eager, attack in evaluation mode,
           `.item()` at each step: the arithmetic of the method and nothing else
    peer   ARD alone: the training function of its own script, from a checkout (--peer DIR)

They take turns within each repeat and the median counts, so that whatever else the machine does
falls on all alike. With `--threads 1` it is processor time (and the loader works in the process),
otherwise time on the wall. FLOPs are those that torch counts in one step; utilisation is their rate
over that of a product of two large matrices in gacd's precision, measured in the same run. A bf16
product's gain over fp32 (on a GPU without TF32, which convolutions take there by default) is all
that a loop of the same arithmetic can gain where the plain one wastes nothing.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from contestants import (  # type: ignore[import-not-found]  # beside this file
    NAMES,
    PARTS,
    Step,
    Watch,
    World,
    ours,
    peer,
    plain,
)

from gacd.evaluation.record import environment
from gacd.methods.cost import Flops
from gacd.processor import fast_bf16, processor
from gacd.storage import write_json
from gacd.training.contexts import fastest_convolutions


def seconds_of(contestants: dict[str, Step], world: World, repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for name, step in contestants.items():
        for _ in range(2 if world.device.type == "cpu" else 10):
            step()
        print(f"  {name} is warm", file=sys.stderr, flush=True)
    inner = 1 if world.device.type == "cpu" else 10
    for _ in range(repeats):
        for name, step in contestants.items():
            _wait(world.device)
            start = world.clock()
            for _ in range(inner):
                step()
            _wait(world.device)
            times[name].append((world.clock() - start) / inner)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_flops(world: World, dtype: torch.dtype) -> float:
    """The best rate of a product of two square matrices, FLOP/s."""
    n = 8192 if world.device.type == "cuda" else 2048 if fast_bf16() else 1024
    a, b = (torch.randn(n, n, device=world.device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        _wait(world.device)
        start = world.clock()
        for _ in range(4):
            a @ b
        _wait(world.device)
        best = min(best, (world.clock() - start) / 4)
    return 2 * n**3 / best


def flops_of(name: str, world: World, options: dict[str, Any] | None = None) -> float:
    step = ours(name, world, options=options)
    step()
    with Flops() as counter:
        step()
    return counter.total


def breakdown(name: str, world: World, repeats: int, compiled: bool) -> dict[str, float]:
    watch = Watch(world.device)
    step = ours(name, world, watch, compiled=compiled)
    step()
    watch.turn()
    watch.seconds.clear()
    for _ in range(repeats):
        step()
    whole = sum(watch.seconds.values())
    return {part: round(watch.seconds[part] / whole, 4) for part in PARTS}


def measure(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    world = World(device, options)
    methods = [name for name in NAMES if name in options.methods]
    contestants = {f"{name} gacd": ours(name, world, compiled=options.compile) for name in methods}
    contestants |= {f"{name} plain": plain(name, world) for name in methods}
    if options.peer is not None and "ard" in methods:
        contestants["ard peer"] = peer(options.peer, world)
    times = seconds_of(contestants, world, options.repeats)
    median = {name: statistics.median(values) for name, values in times.items()}
    mixed = fast_bf16(device.type)
    peak, peak_fp32 = (peak_flops(world, dtype) for dtype in (torch.bfloat16, torch.float32))
    if device.type == "cuda":  # convolutions in float32 are TF32's there, and so is plain's loop
        torch.backends.cuda.matmul.allow_tf32 = True
        peak_fp32 = peak_flops(world, torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = False
    rows = {}
    for name in methods:
        seconds, flops = median[f"{name} gacd"], flops_of(name, world)
        rows[name] = {
            "times plain": round(median[f"{name} plain"] / seconds, 2),
            "times peer": round(median["ard peer"] / seconds, 2)
            if name == "ard" and "ard peer" in median
            else None,
            "times ard's step": round(seconds / median["ard gacd"], 3)
            if "ard" in methods
            else None,
            "images/s": round(world.batch / seconds, 1),
            "plain images/s": round(world.batch / median[f"{name} plain"], 1),
            "utilisation": round(flops / seconds / (peak if mixed else peak_fp32), 3),
            "GFLOP/image": round(flops / world.batch / 1e9, 2),
            "breakdown": breakdown(name, world, max(2, options.repeats // 2), options.compile),
        }
    return {
        "environment": environment(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "clock": "processor" if world.threads == 1 else "wall",
        "load": round(os.getloadavg()[0], 1),
        "model": world.model,
        "batch": world.batch,
        "attack steps": world.steps,
        "anchors": options.anchors,
        "compiled": options.compile,
        "precision": "bf16-mixed" if mixed else "32-true",
        "repeats": options.repeats,
        "peak bf16 TFLOP/s": round(peak / 1e12, 3),
        "peak bf16 / fp32": round(peak / peak_fp32, 2),
        "fp32 is": "TF32" if device.type == "cuda" else "float32",
        "rows": rows,
        "seconds": {name: [round(t, 4) for t in values] for name, values in times.items()},
    }


def table(record: dict[str, Any]) -> str:
    lines = [
        f"{record['model']}, B = {record['batch']}, PGD-{record['attack steps']}, "
        f"{record['device']}, {record['precision']}, {record['threads']} thread(s), "
        f"load {record['load']}, "
        f"peak {record['peak bf16 TFLOP/s']} TFLOP/s in bf16, "
        f"{record['peak bf16 / fp32']} times that in {record['fp32 is']}",
        "| method | times plain | times peer | times ard's step | images/s | plain | utilisation "
        f"| {' | '.join(PARTS)} |",
        "|---" * (7 + len(PARTS)) + "|",
    ]
    for name, row in record["rows"].items():
        shares = " | ".join(f"{100 * row['breakdown'][part]:.1f} %" for part in PARTS)
        lines.append(
            f"| {name} | {row['times plain']} | {row['times peer'] or ''} "
            f"| {row[f'times ard{chr(39)}s step'] or ''} | {row['images/s']} "
            f"| {row['plain images/s']} | {100 * row['utilisation']:.0f} % | {shares} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer", type=Path, help="a checkout of AdversariallyRobustDistillation")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: a GPU where there is one"
    )
    parser.add_argument("--model", default="resnet18", help="resnet18, or wrn-<depth>-<width>")
    parser.add_argument("--batch", type=int, help="default: 128 on a GPU, 16 on a CPU")
    parser.add_argument("--steps", type=int, default=10, help="of the attack")
    parser.add_argument("--anchors", type=int, default=50_000)
    parser.add_argument("--methods", nargs="+", default=list(NAMES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="gacd's student by torch.compile")
    parser.add_argument("--threads", type=int, help="of the CPU; all cores if not given")
    parser.add_argument("--out", type=Path, help="append the record to this JSON file")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch._dynamo.config.recompile_limit = 64  # networks of one class share it
    options.batch = options.batch or (128 if device.type == "cuda" else 16)
    if options.anchors < (least := max(2048, 2 * options.batch)):
        parser.error(f"--anchors must be at least {least}")
    with fastest_convolutions(device):  # as gacd trains and most scripts say: for all alike
        record = measure(device, options)
    print(table(record))
    if options.out:
        before = json.loads(options.out.read_text()) if options.out.is_file() else []
        write_json(options.out, [*before, record])


if __name__ == "__main__":
    main()

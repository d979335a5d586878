"""How long one waits: for `gacd --help`, and for the end of the first training step.

    python benchmarks/startup.py [--repeats 5] [--out FILE]

A fresh process each time, with two threads. Wall is what a user waits; processor is what the
process used, to which other work on the machine adds little.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gacd.evaluation.record import environment
from gacd.storage import write_json

LIMITS = {"help": 0.3, "first step": 10.0}
# The command line, in a process that ends itself once the loop has taken its first step.
FIRST_STEP = """
import os, sys
import gacd.cli
from gacd.training import loop

loop._add = lambda *_: os._exit(0)  # what follows a step
sys.exit(gacd.cli.main(sys.argv[1:]))
"""


def commands(out: str) -> dict[str, list[str]]:
    train = ["train", "--out", out, "--fabric.accelerator", "cpu", "--fabric.threads", "2"]
    return {
        "help": [sys.executable, "-m", "gacd.cli", "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
        "first step": [sys.executable, "-c", FIRST_STEP, *train],
    }


def run(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of a process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, used


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands("")}
    for _ in range(options.repeats + 1):  # the first fills the disk's cache
        for name in times:
            with tempfile.TemporaryDirectory() as folder:
                times[name].append(run(commands(folder + "/run")[name]))
    rows: dict[str, Any] = {}
    for name, values in times.items():
        walls, used = zip(*values[1:], strict=True)
        rows[name] = {
            "wall s (median)": round(statistics.median(walls), 3),
            "wall s (least)": round(min(walls), 3),
            "processor s (median)": round(statistics.median(used), 3),
            "limit s": LIMITS.get(name),
        }
        print(name, json.dumps(rows[name]))
    if options.out:
        load = round(os.getloadavg()[0], 1)
        told = {"environment": environment(), "load": load, "repeats": options.repeats}
        write_json(options.out, {**told, "rows": rows})


if __name__ == "__main__":
    main()

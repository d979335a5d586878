"""A feature-transport PGD step beside a cross-entropy PGD step of ResNet-18: B = 128, D = 512.

    python benchmarks/transport.py [--repeats 3] [--out benchmarks/results/transport-cpu.json]

CPU: one thread, processor time, so that other work on the machine does not count. CUDA, where there
is a device: bf16 autocast and channels-last as in training, the device's own clock.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from objective import devices  # type: ignore[import-not-found]  # beside this file
from torch import Tensor

from gacd.attacks.objectives import Objective, cross_entropy, feature_transport
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel
from gacd.attacks.transport import sinkhorn
from gacd.evaluation.record import environment
from gacd.models import create_model
from gacd.models.frozen import frozen
from gacd.storage import write_json

BATCH = 128
LIMIT = 1.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: all there are")
    parser.add_argument("--repeats", type=int, default=3, help="on a GPU 10 times as many")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = [
        measure(device, options.repeats * (10 if device.type == "cuda" else 1))
        for device in devices(options.device)
    ]
    for record in records:
        print(record)
    if options.out:
        write_json(options.out, records)


def measure(device: torch.device, repeats: int) -> dict[str, object]:
    generator = torch.Generator(device).manual_seed(0)
    model = create_model("resnet18", num_classes=10, seed=0).to(device)
    model = model.to(memory_format=torch.channels_last)  # as in training
    x = torch.rand(BATCH, 3, 32, 32, device=device, generator=generator)
    x = x.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,), device=device, generator=generator)
    threat = ThreatModel(eps=8 / 255)

    def attack(objective: Objective) -> Tensor:
        return pgd(objective, x, threat, steps=1, step_size=2 / 255, generator=generator)

    gpu = device.type == "cuda"
    with torch.autocast(device.type, torch.bfloat16, enabled=gpu), frozen(model, x):
        clean = model.forward_features(x)
        cost = torch.rand(BATCH, BATCH, device=device, generator=generator)
        work = {
            "cross_entropy": partial(attack, cross_entropy(model, labels)),
            "transport": partial(attack, feature_transport(model.forward_features, clean)),
            "sinkhorn": partial(sinkhorn, cost),
        }
        clock = cuda_seconds if gpu else cpu_seconds
        for run in work.values():
            run()
        # Turn and turn about: a machine that slows down slows them all.
        times = [{name: clock(run) for name, run in work.items()} for _ in range(repeats)]
    seconds = {name: median(t[name] for t in times) for name in work}
    ratio = seconds["transport"] / seconds["cross_entropy"]
    return {
        "environment": environment(),
        "device": device.type,
        "batch": BATCH,
        "features": model.num_features,
        "repeats": repeats,
        "seconds": seconds,
        "transport / cross_entropy": ratio,
        "within the limit": ratio <= LIMIT,
    }


def cpu_seconds(run: Callable[[], Tensor]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def cuda_seconds(run: Callable[[], Tensor]) -> float:
    """The time between two events: launches that the device has to wait for are in it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


if __name__ == "__main__":
    main()

"""A step of adversarial training in float32, in rounded products, and in the processor's own bf16.

    python benchmarks/precision.py [--repeats 3] [--out benchmarks/results/precision-cpu.json]

One thread, processor time. What matters is which of the two ways to train in bf16 is the faster one
on a processor (`gacd.training.precision` takes rounded products where `fast_bf16` is false).
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.library import _scoped_library
from torch.nn.functional import cross_entropy as mean_cross_entropy
from transport import cpu_seconds  # type: ignore[import-not-found]  # beside this file

from gacd.attacks.objectives import cross_entropy
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel
from gacd.evaluation.record import environment
from gacd.models import create_model
from gacd.models.frozen import frozen
from gacd.processor import fast_bf16
from gacd.storage import write_json
from gacd.training.precision import register

NETWORKS = {"wrn-10-1": (16, 64, 5), "resnet18": (32, 16, 2)}
"""Pixels a side, images, attack steps."""


native = partial(torch.autocast, "cpu", torch.bfloat16)


@contextmanager
def rounded() -> Iterator[None]:
    with native(), _scoped_library("aten", "IMPL") as library:
        register(library)
        yield


CONTEXTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "float32": nullcontext, "rounded": rounded, "native": native,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: measure(name, *NETWORKS[name], options.repeats) for name in options.networks}
    for name, row in rows.items():
        ratio = ", ".join(f"{row['float32'] / row[arm]:.2f} {arm}" for arm in CONTEXTS)
        images = NETWORKS[name][1] / row["float32"]
        print(f"{name}: {images:.1f} images/s in float32; times its speed: {ratio}")
    if options.out:
        own = {"environment": environment(), "fast_bf16": fast_bf16(), "repeats": options.repeats}
        write_json(options.out, own | {"seconds": rows})


def measure(name: str, pixels: int, batch: int, steps: int, repeats: int) -> dict[str, float]:
    """Seconds of a step in each arithmetic."""
    generator = torch.Generator().manual_seed(0)
    model = create_model(name, num_classes=10, seed=0).to(memory_format=torch.channels_last)
    x = torch.rand(batch, 3, pixels, pixels, generator=generator)
    x = x.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    threat = ThreatModel(eps=8 / 255)

    def step() -> Tensor:
        with frozen(model, x):
            objective = cross_entropy(model, labels)
            x_adv = pgd(objective, x, threat, steps=steps, step_size=2 / 255, generator=generator)
        loss = mean_cross_entropy(model(x_adv).float(), labels)
        model.zero_grad()
        loss.backward()
        return loss

    def seconds(context: Callable[[], AbstractContextManager[None]]) -> float:
        with context():
            return cpu_seconds(step)

    for context in CONTEXTS.values():
        seconds(context)
    # Turn and turn about: a machine that slows down slows them all.
    times = [{arm: seconds(each) for arm, each in CONTEXTS.items()} for _ in range(repeats)]
    return {arm: median(t[arm] for t in times) for arm in CONTEXTS}


if __name__ == "__main__":
    main()

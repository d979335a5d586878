"""What every method costs per training image, as docs/methods.md prints it.

    python benchmarks/costs.py [--student resnet18] [--teacher resnet18] [--size 32] [--steps 10]

Passes and FLOPs are counted by `gacd.methods.cost`, at the methods' default settings, for batches
of `--batch` images and a training set of `--images`; nothing is timed.
"""

import argparse

import torch

from gacd.anchors import AnchorBank, Fingerprint
from gacd.attacks.threat import ThreatModel
from gacd.data.dataset import ArrayDataset
from gacd.methods import METHODS, Teacher, TrainingAttack, create_method
from gacd.methods.awp import AWP
from gacd.methods.cost import Cost, measure
from gacd.models import create_model

NAMES = [
    *(name for name, term in METHODS.items() if not term.is_addition),
    *("rslad+igdm", "adaad+igdm", "crd+kd", "gacd+rslad", "pgd-at, awp"),
]


def costs(
    student: str, teacher: str, *, size: int, steps: int, batch: int, images: int
) -> dict[str, Cost]:
    """The cost of every method by name, and of `pgd-at` with AWP."""
    channels = 1 if student.startswith("digits") else 3
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (8, channels, size, size), generator=generator, dtype=torch.uint8)
    data = ArrayDataset(pixels, torch.arange(8), tuple("abcdefghij"), "noise")
    network = create_model(teacher, num_classes=10, channels=channels, seed=1)
    features = torch.randn(images, network.num_features, generator=generator).bfloat16()
    bank = AnchorBank(
        features, torch.arange(images) % 10, torch.ones(images), Fingerprint("", "", "")
    )
    attack = TrainingAttack(threat=ThreatModel(eps=8 / 255), steps=steps, step_size=2 / 255)
    found = {}
    for name in NAMES:
        method, _, awp = name.partition(", ")
        built = create_method(
            method,
            create_model(student, num_classes=10, channels=channels, seed=0),
            attack,
            teacher=Teacher(network),
            bank=bank,
            awp=AWP(gamma=0.005 if awp else 0.0),
        )
        found[name] = measure(built, data, batch_size=batch)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--teacher", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=50_000)
    options = vars(parser.parse_args())
    print("| method | student forward / backward | teacher forward / backward | GFLOP |")
    print("|---|---:|---:|---:|")
    for name, cost in costs(**options).items():
        print(
            f"| {name} | {cost.student_forward:.0f} / {cost.student_backward:.0f} "
            f"| {cost.teacher_forward:.0f} / {cost.teacher_backward:.0f} | {cost.flops / 1e9:.3g} |"
        )


if __name__ == "__main__":
    main()

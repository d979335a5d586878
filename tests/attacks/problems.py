"""Objectives whose optimum is known, and a network that an attack could disturb."""

import torch
from torch import Tensor, nn

from gacd.attacks.objectives import (
    Objective,
    cross_entropy,
    feature_cosine,
    feature_transport,
    kl,
    margin,
)

SHAPE = (5, 2, 3, 3)


NORMS = ["linf", "l2"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(shape: tuple[int, ...] = SHAPE, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=seeded(1))


def direction() -> Tensor:
    return torch.randn(SHAPE, generator=seeded(2))


def linear(weight: Tensor) -> Objective:
    return lambda x: (weight * x).flatten(1).sum(1)


class Net(nn.Module):
    """A small network with everything that an attack could disturb."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
                nn.Flatten(), nn.Linear(72, 12), nn.ReLU(),
            )  # fmt: skip
            self.head = nn.Linear(12, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.body(8 * (x - 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return 5 * self.head(self.features(x))  # far from the uniform answer


def every_objective(net: Net, x: Tensor, labels: Tensor) -> dict[str, Objective]:
    with torch.no_grad():
        clean, probs = net.features(x), net(x).softmax(1)
    return {
        "ce": cross_entropy(net, labels),
        "margin": margin(net, labels),
        "kl": kl(net, probs),
        "cosine": feature_cosine(net.features, clean),
        "transport": feature_transport(net.features, clean),
    }


def random_labels(size: int) -> Tensor:
    return torch.randint(0, 4, (size,), generator=seeded(3))

"""A tiny network, a robust copy of it on the digits, and an AutoAttack of few iterations."""

from collections.abc import Iterator

import pyautoattack
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gacd.attacks.objectives import cross_entropy
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel
from gacd.data.dataset import ArrayDataset
from gacd.data.load import load_splits
from gacd.data.split import stratified
from gacd.models.base import Backbone


class TinyNet(Backbone):
    """8x8 grey images, one hidden layer, an optional layer in front of it and scale behind."""

    def __init__(
        self, classes: int = 10, front: nn.Module | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.num_classes, self.channels, self.num_features = classes, 1, 64
        self.front = front or nn.Identity()
        self.scale = scale
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Dropout(0.0), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(self.front(x))

    def forward_head(self, features: Tensor) -> Tensor:
        return self.scale * self.head(features)


class LinearNet(Backbone):
    """Logits (w.x + b, 0): its robust accuracy is known in closed form."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.num_classes, self.channels, self.num_features = 2, 1, weight.numel()
        self.weight, self.bias = nn.Parameter(weight.flatten()), bias

    def forward_features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def forward_head(self, features: Tensor) -> Tensor:
        score = features @ self.weight + self.bias
        return torch.stack([score, torch.zeros_like(score)], dim=1)


class QuickAutoAttack(pyautoattack.AutoAttack):
    """All of the standard version's code paths, with fewer iterations."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        for attack, iterations in ((self.apgd, 10), (self.apgd_targeted, 5), (self.fab, 3)):
            attack.n_iter = iterations
        self.square.n_queries = 60


@pytest.fixture(scope="session")
def tiny_net() -> type[TinyNet]:
    return TinyNet


@pytest.fixture(scope="session")
def linear_net() -> type[LinearNet]:
    return LinearNet


@pytest.fixture
def quick_autoattack(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    monkeypatch.setattr(pyautoattack, "AutoAttack", QuickAutoAttack)
    return QuickAutoAttack


@pytest.fixture(scope="session")
def threat() -> ThreatModel:
    return ThreatModel(eps=0.1)


@pytest.fixture(scope="session")
def digits() -> ArrayDataset:
    test = load_splits("digits", seed=0).test
    return test.subset(stratified(test.labels, 100, seed=0))


@pytest.fixture(scope="session")
def honest(threat: ThreatModel) -> TinyNet:
    """A tiny network after a second of adversarial training on the digits."""
    train = load_splits("digits", seed=0).train
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = TinyNet()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    for _ in range(12):
        for rows in torch.randperm(len(train), generator=generator).split(128):
            x, labels = train.float_images(rows), train.labels[rows]
            x = pgd(
                cross_entropy(net, labels), x, threat, steps=2, step_size=0.08, generator=generator
            )
            optimiser.zero_grad()
            F.cross_entropy(net(x), labels).backward()
            optimiser.step()
    return net


@pytest.fixture
def masked(honest: TinyNet):
    """The honest network's weights behind a layer or a scale that hides its gradient."""

    def build(front: nn.Module | None = None, scale: float = 1.0) -> TinyNet:
        net = TinyNet(front=front, scale=scale)
        net.load_state_dict(honest.state_dict())
        return net

    return build

"""PGD-20 against foolbox on two small networks trained on scikit-learn's digits."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gacd.attacks.objectives import cross_entropy, misclassified
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations in what foolbox imports
    import foolbox

EPS, STEP = 0.1, 0.02
Setting = tuple[nn.Module, Tensor, Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


@pytest.fixture(scope="module", params=[mlp, cnn], ids=["mlp", "cnn"])
def trained(request: pytest.FixtureRequest) -> Setting:
    pixels, classes = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    y = torch.from_numpy(classes).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = request.param()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(60):
        rows = torch.arange(step, 1500, 12)
        optimiser.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    assert (model(x[1500:]).argmax(1) == y[1500:]).float().mean() > 0.8
    return model, x[1500:], y[1500:]


def theirs(setting: Setting, norm: str, eps: float, step: float, seed: int | None) -> Tensor:
    model, x, y = setting
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    attack = kind(abs_stepsize=step, steps=20, random_start=seed is not None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        return attack.run(bounded, x, foolbox.criteria.Misclassification(y), epsilon=eps)


def ours(setting: Setting, norm: str, eps: float, step: float, seed: int | None) -> Tensor:
    model, x, y = setting
    return pgd(
        cross_entropy(model, y), x, ThreatModel(norm=norm, eps=eps), steps=20, step_size=step,
        random_start=seed is not None, generator=torch.Generator().manual_seed(seed or 0),
    )  # fmt: skip


@pytest.mark.parametrize(("norm", "eps", "step"), [("linf", EPS, STEP), ("l2", 0.5, 0.1)])
def test_without_a_random_start_the_images_agree(
    trained: Setting, norm: str, eps: float, step: float
) -> None:
    """A sign may flip where a gradient is rounding error alone; nowhere else may they part."""
    difference = ours(trained, norm, eps, step, None) - theirs(trained, norm, eps, step, None)
    assert (difference.abs() < 1e-4).float().mean() > 0.99


def test_with_random_starts_robust_accuracy_agrees_within_its_spread(trained: Setting) -> None:
    model, _, y = trained
    broken = misclassified(model, y)

    def accuracy(attack: object, seed: int) -> Tensor:
        return 1 - broken(attack(trained, "linf", EPS, STEP, seed)).float().mean()

    a, b = (torch.stack([accuracy(attack, s) for s in range(5)]) for attack in (ours, theirs))
    print("ours", a.tolist(), "foolbox", b.tolist())
    assert 0.05 < a.mean() < 0.9
    spread = max(a.std(), b.std(), torch.tensor(1 / len(y)))
    assert (a.mean() - b.mean()).abs() <= 2 * spread

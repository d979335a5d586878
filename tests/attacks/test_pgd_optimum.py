"""PGD on problems whose optimum has a closed form."""

import pytest
import torch

from attacks.problems import direction, images, linear, seeded
from gacd.attacks.pgd import fgsm, pgd
from gacd.attacks.threat import ThreatModel


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_linear_optimum_in_linf(random_start: bool, momentum: float) -> None:
    """max w.(x' - x) is at the corner x + eps sign(w), cut to the box where it is met."""
    x, weight, eps = images(), direction(), 0.2
    x_adv = pgd(
        linear(weight), x, ThreatModel(eps=eps), steps=10, step_size=0.05,
        momentum=momentum, random_start=random_start, generator=seeded(),
    )  # fmt: skip
    assert ((x + eps * weight.sign() > 1) | (x + eps * weight.sign() < 0)).any()
    torch.testing.assert_close(x_adv, (x + eps * weight.sign()).clamp(0, 1))


def test_linear_optimum_in_l2_inside_the_box() -> None:
    """max w.(x' - x) is at x + eps w / |w|."""
    x, weight, eps = images(low=0.4, high=0.6), direction(), 0.3
    x_adv = pgd(
        linear(weight), x, ThreatModel(norm="l2", eps=eps), steps=40, step_size=0.2,
        generator=seeded(),
    )  # fmt: skip
    unit = weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_adv, x + eps * unit, atol=1e-5, rtol=0)


def test_linear_optimum_in_l2_cut_by_the_box() -> None:
    """The optimum is clip(x + t w) with t such that the length is eps (t by bisection).

    Radial projection, then the box, tends to it as the step shrinks.
    """
    x, weight, eps = images(), direction(), 1.0
    low, high = torch.zeros(len(x), 1, 1, 1), torch.full((len(x), 1, 1, 1), 100.0)
    for _ in range(60):
        middle = (low + high) / 2
        long = ((x + middle * weight).clamp(0, 1) - x).flatten(1).norm(dim=1) > eps
        low = torch.where(long.view_as(low), low, middle)
        high = torch.where(long.view_as(low), middle, high)
    optimum = (x + low * weight).clamp(0, 1)
    assert ((optimum == 0) | (optimum == 1)).any()
    x_adv = pgd(
        linear(weight), x, ThreatModel(norm="l2", eps=eps), steps=400, step_size=0.01,
        random_start=False,
    )  # fmt: skip
    value = linear(weight)
    torch.testing.assert_close(value(x_adv), value(optimum), rtol=5e-3, atol=0)


def test_fgsm_is_one_full_step_of_the_sign() -> None:
    x, weight = images(low=0.3, high=0.7), direction()
    x_adv = fgsm(linear(weight), x, ThreatModel(eps=0.1))
    torch.testing.assert_close(x_adv, x + 0.1 * weight.sign())


def test_momentum_is_that_of_its_formula() -> None:
    """Two steps by hand for an objective whose gradient turns round."""
    x = torch.full((1, 1, 1, 2), 0.5)
    wall = torch.tensor([0.52, 10.0]).view_as(x)
    expected = x.clone()
    g = torch.zeros_like(x)
    for _ in range(3):
        grad = -2 * (expected - wall)
        g = 0.7 * g + grad / grad.abs().mean()
        expected = expected + 0.05 * g / g.norm()
    x_adv = pgd(
        lambda x: -(x - wall).square().flatten(1).sum(1), x, ThreatModel(norm="l2", eps=0.4),
        steps=3, step_size=0.05, momentum=0.7, random_start=False,
    )  # fmt: skip
    torch.testing.assert_close(x_adv, expected)

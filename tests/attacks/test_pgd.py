"""PGD on problems whose optimum is known, and all that it must leave alone."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn

from attacks.problems import (
    NORMS,
    SHAPE,
    Net,
    direction,
    every_objective,
    images,
    linear,
    random_labels,
    seeded,
)
from gacd.attacks.objectives import (
    Objective,
    PerImage,
    cross_entropy,
    feature_transport,
    margin,
    misclassified,
)
from gacd.attacks.pgd import fgsm, pgd
from gacd.attacks.threat import ThreatModel
from gacd.errors import UserError
from gacd.models.modes import evaluating


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["ce", "margin", "kl", "cosine", "transport"])
def test_every_objective_rises_within_budget_and_box(norm: str, name: str) -> None:
    x, labels, net = images(), random_labels(5), Net().eval()
    objective = every_objective(net, x, labels)[name]
    threat = ThreatModel(norm=norm, eps=0.2)
    start = pgd(objective, x, threat, steps=0, step_size=0.0, generator=seeded())
    x_adv = pgd(objective, x, threat, steps=10, step_size=0.05, generator=seeded())
    assert objective(x_adv).mean() > objective(start).mean() + 1e-3
    order = float("inf") if norm == "linf" else 2
    assert ((x_adv - x).flatten(1).norm(p=order, dim=1) <= 0.2 + 1e-6).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not x_adv.requires_grad


def test_a_zero_budget_returns_the_image_and_never_the_same_storage() -> None:
    x = images()
    x_adv = pgd(
        linear(direction()), x, ThreatModel(eps=0.0), steps=2, step_size=0.1, generator=seeded()
    )
    assert torch.equal(x_adv, x)
    still = pgd(
        linear(direction()), x, ThreatModel(eps=0.1), steps=0, step_size=0.1, random_start=False
    )
    for result in (x_adv, still):
        result.zero_()
    assert x.sum() > 0


@pytest.mark.parametrize("no_grad", [False, True])
def test_leaves_modes_buffers_gradients_and_the_image_alone(no_grad: bool) -> None:
    x, labels, net = images(), random_labels(5), Net()
    net.body[1].eval()
    net(x).sum().backward()
    net.head.bias.grad = None
    x.requires_grad_()
    before, x_before = copy.deepcopy(net), x.detach().clone()
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    context = torch.no_grad() if no_grad else contextlib.nullcontext()
    with context, evaluating(net):
        for objective in every_objective(net, x, labels).values():
            pgd(
                objective, x, ThreatModel(eps=0.1), steps=2, step_size=0.1, restarts=2,
                generator=seeded(),
            )  # fmt: skip
    assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), before.buffers(), strict=True))
    for p, old, grad in zip(net.parameters(), before.parameters(), grads, strict=True):
        assert torch.equal(p, old)
        assert p.requires_grad
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    assert x.grad is None
    assert torch.equal(x, x_before)


def test_parameter_gradients_are_never_computed() -> None:
    """Even of parameters that require them: the hook of an accumulated gradient would fire."""
    net = Net().eval()
    for p in net.parameters():
        p.register_hook(lambda grad: pytest.fail("a parameter's gradient was computed"))
    objective = cross_entropy(net, random_labels(5))
    pgd(objective, images(), ThreatModel(eps=0.1), steps=1, step_size=0.1, generator=seeded())


def test_the_global_random_state_is_not_used() -> None:
    objective = cross_entropy(Net().eval(), random_labels(5))
    state = torch.random.get_rng_state()
    pgd(objective, images(), ThreatModel(eps=0.1), steps=1, step_size=0.1, generator=seeded())
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(UserError, match="generator"):
        pgd(objective, images(), ThreatModel(eps=0.1), steps=1, step_size=0.1)


def test_same_seed_same_result_other_seed_other_result() -> None:
    objective = cross_entropy(Net().eval(), random_labels(5))

    def attack(seed: int) -> Tensor:
        threat = ThreatModel(norm="l2", eps=0.3)
        return pgd(
            objective, images(), threat, steps=3, step_size=0.05, restarts=2,
            generator=seeded(seed),
        )  # fmt: skip

    assert torch.equal(attack(0), attack(0))
    assert not torch.equal(attack(0), attack(1))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_an_image_does_not_depend_on_its_neighbours(norm: str, early: bool) -> None:
    net, labels, x = Net().eval().double(), random_labels(5), images().double()
    others = images().flip(0).double()
    others[2] = x[2]

    def attack(batch: Tensor) -> Tensor:
        return pgd(
            cross_entropy(net, labels), batch, ThreatModel(norm=norm, eps=0.2), steps=4,
            step_size=0.05, restarts=3, momentum=0.5, generator=seeded(),
            is_broken=misclassified(net, labels) if early else None,
        )  # fmt: skip

    torch.testing.assert_close(attack(x)[2], attack(others)[2])


def test_transport_is_permutation_equivariant() -> None:
    net, x = Net().eval().double(), images((8, 2, 3, 3)).double()
    start = ThreatModel(eps=0.1).random_start(x, seeded())
    order = torch.randperm(8, generator=seeded(5))

    def attack(rows: Tensor) -> Tensor:
        objective = feature_transport(net.features, net.features(x[rows]))
        return pgd(
            objective, start[rows], ThreatModel(eps=0.1), steps=3, step_size=0.05,
            random_start=False,
        )  # fmt: skip

    torch.testing.assert_close(attack(order), attack(torch.arange(8))[order])


def test_restarts_never_hurt() -> None:
    net, labels, x = Net().eval(), random_labels(40), images((40, 2, 3, 3))
    objective = margin(net, labels)

    def value(restarts: int) -> Tensor:
        x_adv = pgd(
            objective, x, ThreatModel(eps=0.15), steps=2, step_size=0.05, restarts=restarts,
            generator=seeded(),
        )  # fmt: skip
        return objective(x_adv)

    values = [value(restarts) for restarts in (1, 2, 5)]
    assert (values[1] >= values[0] - 1e-6).all()
    assert (values[2] >= values[1] - 1e-6).all()
    assert values[2].sum() > values[0].sum()


def test_with_early_stop_a_start_that_breaks_beats_any_value() -> None:
    """The objective leads away from what breaks, so that only luck at the start does."""
    x, threat = images((200, 1, 1, 1), low=0.4, high=0.6), ThreatModel(eps=0.1)
    broken = PerImage(lambda x, y: (x - y).flatten(1).sum(1) > 0.05, x)
    objective = PerImage(lambda x, y: (y - x).flatten(1).sum(1), x)

    def found(restarts: int) -> Tensor:
        x_adv = pgd(
            objective, x, threat, steps=1, step_size=0.01, restarts=restarts, generator=seeded(),
            is_broken=broken,
        )  # fmt: skip
        return broken(x_adv)

    one, three = found(1), found(3)
    assert (three >= one).all()
    # Each start is in the upper quarter of its ball with probability 1/4.
    assert 0.15 < one.float().mean() < 0.35
    assert abs(three.float().mean() - (1 - 0.75**3)) < 0.1


def test_early_stop_breaks_as_many_and_spares_the_broken() -> None:
    net, labels = Net().eval(), random_labels(40)
    x, broken, objective = images((40, 2, 3, 3)), misclassified(net, labels), margin(net, labels)
    threat = ThreatModel(eps=0.03)
    seen: list[int] = []

    def score(x: Tensor, y: Tensor) -> Tensor:
        seen.append(len(x))
        return objective.score(x, y)

    full = pgd(objective, x, threat, steps=8, step_size=0.01, momentum=0.5, random_start=False)
    early = pgd(
        PerImage(score, labels), x, threat, steps=8, step_size=0.01, momentum=0.5,
        random_start=False,
        is_broken=broken,
    )  # fmt: skip
    already, after = broken(x), broken(early)
    assert 0 < already.sum() < after.sum()
    assert (after >= broken(full)).all()
    assert torch.equal(early[already], x[already])
    torch.testing.assert_close(early[~after], full[~after])  # the unbroken notice nothing
    assert seen[0] == (~already).sum()
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < seen[0]


def test_bf16_autocast_keeps_float32_images_and_finds_a_like_optimum() -> None:
    net, labels, x = Net().eval(), random_labels(5), images()
    for name, objective in every_objective(net, x, labels).items():

        def attack(objective: Objective = objective) -> Tensor:
            return pgd(
                objective, x, ThreatModel(eps=0.1), steps=5, step_size=0.03, generator=seeded()
            )

        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = attack()
        assert half.dtype == torch.float32
        assert half.requires_grad is False
        assert objective(half).mean() > 0.9 * objective(attack()).mean() - 1e-3, name


def test_training_after_an_attack_under_autocast_still_has_gradients() -> None:
    """Casts of weights cached while no gradient is recorded would cut the training step off."""
    net, labels, x = Net().eval(), random_labels(5), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective = cross_entropy(net, labels)
        x_adv = pgd(
            objective, x, ThreatModel(eps=0.1), steps=1, step_size=0.1, restarts=2,
            generator=seeded(),
        )  # fmt: skip
        objective(x_adv).mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_memory_format_is_kept() -> None:
    x = images((4, 3, 5, 5)).to(memory_format=torch.channels_last)
    net = nn.Sequential(nn.Flatten(), nn.Linear(75, 4))
    labels = random_labels(4)
    for broken in (None, misclassified(net, labels)):
        x_adv = pgd(
            cross_entropy(net, labels), x, ThreatModel(eps=0.1), steps=2, step_size=0.05,
            restarts=2, generator=seeded(), is_broken=broken,
        )  # fmt: skip
        assert x_adv.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": -1}, "negative"),
        ({"step_size": -0.1}, "negative"),
        ({"momentum": -0.1}, "negative"),
        ({"restarts": 0}, "at least one"),
        ({"x": torch.rand(SHAPE).half()}, "float32"),
        ({"x": 255 * images()}, r"must lie in \[0, 1\], not in .*: divide bytes by 255"),
        ({"x": images() - 0.5}, "normalise inside the model"),
        ({"step_size": 2.0}, "step_size is 2: .* e.g. 2/255"),
        ({"is_broken": PerImage(lambda x, y: y > 0, torch.zeros(5))}, "transport"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, object], message: str) -> None:
    settings = {"x": images(), "steps": 1, "step_size": 0.1, "generator": seeded()} | wrong
    with pytest.raises(UserError, match=message):
        pgd(linear(direction()), threat=ThreatModel(eps=0.1), **settings)


@pytest.mark.parametrize("score", [lambda x: x.flatten(1)[:, :1], lambda x: x.sum()])
def test_an_objective_gives_one_number_an_image(score: Objective) -> None:
    with pytest.raises(UserError, match=r"one number an image, \[5\], not"):
        pgd(score, images(), ThreatModel(eps=0.1), steps=1, step_size=0.1, random_start=False)


def test_inference_mode_is_told_apart_from_no_grad() -> None:
    with torch.inference_mode(), pytest.raises(UserError, match="inference_mode"):
        fgsm(linear(direction()), images(), ThreatModel(eps=0.1))

"""The cost of a method: counts known by hand, FLOPs in closed form; counting moves nothing."""

import re
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

from gacd.methods import METHODS, Teacher, create_method
from gacd.methods.awp import AWP
from gacd.methods.cost import Cost, measure
from gacd.models import create_model
from gacd.models.adapted import Adapted
from methods.world import ATTACK, SETTINGS, World, network

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
TEN = replace(ATTACK, steps=10)


def layers(student: str = "digits-cnn-2") -> list[int]:
    """FLOPs of each layer of the student on one 8x8 image: 2 x multiplications."""
    flops, side = [], 8
    for layer in network(student, seed=0).modules():
        if isinstance(layer, torch.nn.Conv2d):
            side //= layer.stride[0]
            flops.append(2 * layer.weight.numel() * side**2)
        elif isinstance(layer, torch.nn.Linear):
            flops.append(2 * layer.weight.numel())
    return flops


def test_flops_are_those_of_the_layers(world: World) -> None:
    """Forward F; backward F to the weights, and F to the inputs but for the first layer's."""
    first, forward = layers()[0], sum(layers())
    training = 3 * forward - first
    natural = measure(world.method("natural"), world.data, batch_size=12)
    assert natural == Cost(1.0, 1.0, 0.0, 0.0, 0.0, float(training))
    attacked = measure(world.method("pgd-at", TEN), world.data, batch_size=12)
    assert attacked == Cost(11.0, 11.0, 10.0, 0.0, 0.0, 20.0 * forward + training)
    teacher = sum(layers("digits-cnn-3"))
    kd = measure(world.method("kd"), world.data, batch_size=12)
    assert kd == Cost(1.0, 1.0, 0.0, 1.0, 0.0, float(training + teacher))


def test_grouped_convolutions_and_attention_count_as_what_they_are(world: World) -> None:
    """PyTorch's own formulas take one for ungrouped, and the other's kernel has none."""
    student = create_model("mobilenetv2", num_classes=3, channels=1, seed=0)
    flops: list[int] = []
    for layer in student.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(
                lambda of, _, out: flops.append(2 * of.weight.numel() * out[0, 0].numel())
            )
    student.eval()(world.data.float_images()[:1])
    training, counts = 3 * sum(flops) - flops[0], len(flops)
    natural = measure(world.method("natural", student=student), world.data, batch_size=12)
    assert counts > 50 and natural.flops == training

    tokens, width = 4, 8
    attention = 2 * tokens * width * (4 * width + 2 * tokens)  # four projections, two products
    teacher = Teacher(Adapted(Transformer(tokens, width), "fc", channels=1))
    plain, taught = (
        measure(world._replace(teacher=teacher).method(name), world.data, batch_size=12).flops
        for name in ("natural", "kd")
    )
    assert taught - plain == 2 * 64 * tokens * width // tokens + attention + 2 * tokens * width * 3


class Transformer(torch.nn.Module):
    """One layer of attention over the rows of an 8x8 image, two by two."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.into = torch.nn.Linear(64 // tokens, width)
        self.attention = torch.nn.MultiheadAttention(width, 2, batch_first=True)
        self.fc = torch.nn.Linear(tokens * width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.into(x.view(len(x), -1, self.into.in_features))
        out: torch.Tensor = self.fc(self.attention(tokens, tokens, tokens)[0].flatten(1))
        return out


def test_what_does_not_depend_on_the_batch_is_shared_out_over_it(world: World) -> None:
    """GACD projects all 12 anchors once a step, forward and backward, whatever the batch."""
    attack = replace(ATTACK, objective="cosine")  # no product over the batch
    method = world.method("gacd", attack)
    small, large, huge = (
        measure(method, world.data, batch_size=size).flops for size in (4, 8, 10**9)
    )
    projected = 2 * 12 * 12 * 6  # anchors x teacher's features x embedding: one way
    assert small - large == pytest.approx((large - huge) * 1.0, rel=1e-6)
    assert 8 * (large - huge) == pytest.approx(2 * projected, rel=1e-6)


@pytest.mark.parametrize("name", ["pgd-at", "gacd"])
def test_two_training_images_are_enough(world: World, name: str) -> None:
    few, method = world.data.subset(torch.arange(2)), world.method(name)
    assert measure(method, few, batch_size=2) == measure(method, world.data, batch_size=2)


def test_steps_that_differ_count_by_their_mean(world: World) -> None:
    """Of eight steps of a refreshed projection one is live and seven share a projected bank."""
    attack = replace(ATTACK, objective="cosine")
    twelve = 12 * 12 * 6  # anchors x teacher's features x embedding
    flops = {
        kind: measure(
            world.method("gacd", attack, teacher_projection=kind, refresh=8, positive="bank"),
            world.data,
            batch_size=1,
        ).flops
        for kind in ("live", "refreshed", "pca")
    }
    live = 2 * 2 * twelve + 2 * 1 * 12 * 6  # both ways, and the batch's own positive, backward
    held = 2 * twelve / 7  # projected once for seven steps at rest
    assert flops["live"] - flops["pca"] == pytest.approx(live, rel=0.2)
    apart = flops["live"] - flops["refreshed"]
    assert apart == pytest.approx((7 * live - 7 * held) / 8, rel=0.2)
    assert flops["pca"] < flops["refreshed"] < flops["live"]


@pytest.mark.parametrize("name", SETTINGS)
def test_counting_moves_nothing(world: World, name: str) -> None:
    method = world.method(name, awp=AWP(0.01))
    method.student.body[1].eval()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    modes = [part.training for part in method.modules()]
    flags = [p.requires_grad for p in method.parameters()]
    random, teacher = torch.get_rng_state(), world.teacher.module.state_dict()
    teacher = {k: v.clone() for k, v in teacher.items()}
    cost = measure(method, world.data, batch_size=12)
    assert cost == measure(method, world.data, batch_size=12)
    assert all(value >= 0 for value in astuple(cost)) and cost.flops > 0
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert modes == [part.training for part in method.modules()]
    assert flags == [p.requires_grad for p in method.parameters()]
    assert all(p.grad is None for p in method.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, teacher[k]) for k, v in world.teacher.module.state_dict().items())
    for network_ in (method.student, world.teacher.module):
        assert "forward_features" not in vars(network_)  # no counter left behind


def documented() -> dict[str, tuple[float, ...]]:
    """Passes of student and teacher, forward and backward, as docs/methods.md has them."""
    row = re.compile(r"\| `([^`]+)`.*\| (\d+) / (\d+) \| (\d+) / (\d+) \| [\d.]+ \|$", re.MULTILINE)
    return {name: tuple(map(float, n)) for name, *n in row.findall(DOCS.read_text())}


def test_the_documentation_has_every_method() -> None:
    named = {part for name in documented() for part in name.split(", ")[0].split("+")}
    assert named == METHODS.keys()


@pytest.mark.parametrize("name", documented())
def test_the_documentation_tells_what_is_measured(world: World, name: str) -> None:
    """Ten steps of the attack, the default settings."""
    method, _, awp = name.partition(", ")
    built = create_method(
        method,
        network("digits-cnn-2", seed=1),
        TEN,
        teacher=world.teacher,
        bank=world.bank,
        options={"crd": {"negatives": 8}},
        awp=AWP(0.005 if awp else 0.0),
    )
    cost = measure(built, world.data, batch_size=12)
    assert documented()[name] == (
        cost.student_forward,
        cost.student_backward,
        cost.teacher_forward,
        cost.teacher_backward,
    )


@pytest.mark.parametrize("name", ["kd", "ard", "adaad", "rslad+igdm", "gacd"])
def test_the_teacher_answers_no_more_often_under_awp(world: World, name: str) -> None:
    plain, perturbed = (
        measure(world.method(name, awp=awp), world.data, batch_size=4) for awp in (AWP(), AWP(0.01))
    )
    extra = 1 if "igdm" in name else 0  # of images that only it looks at, a pass each time
    assert perturbed.teacher_forward == plain.teacher_forward + extra
    assert perturbed.student_forward > plain.student_forward

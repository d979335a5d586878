"""Folding: the same function and gradient as evaluation mode, everything put back, less work."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gacd.models import create_model
from gacd.models.base import Backbone
from gacd.models.frozen import find_pairs, folds_exactly, frozen
from gacd.models.modes import evaluating

# name -> batch normalisations, and how many of them follow a convolution that nothing else reads
NETWORKS = {
    "digits-cnn-2": (4, 4),
    "resnet20": (21, 21),
    "resnet18": (20, 20),
    "mobilenetv2": (57, 57),
    "wrn-10-1": (7, 3),  # the stem feeds a shortcut too, and so does each later sum
}


def trained(name: str, generator: torch.Generator) -> Backbone:
    """A network in float64 whose batch normalisations have something to say."""
    model = create_model(name, num_classes=5, mean=(0.4,) * 3, std=(0.3,) * 3, seed=1).double()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight.data, part.bias.data, part.running_mean, part.running_var):
                assert tensor is not None
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model.train()


def images(generator: torch.Generator, n: int = 3) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=generator, dtype=torch.float64)


def value_and_slope(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    return out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_and_gradient_of_evaluation_mode(
    name: str, generator: torch.Generator
) -> None:
    model, x = trained(name, generator), images(generator)
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    assert (norms, len(find_pairs(model, x))) == NETWORKS[name]
    with evaluating(model):
        expected = value_and_slope(model, x)
    with frozen(model, x):
        found = value_and_slope(model, x)
        left = sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    assert norms - left == NETWORKS[name][1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails: bool, generator: torch.Generator) -> None:
    model, x = trained("wrn-10-1", generator), images(generator)
    model.fc.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    identities = {name: id(p) for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: part.training for name, part in model.named_modules()}
    try:
        with frozen(model, x):
            assert not model.training
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_weights_are_read_anew_each_time(generator: torch.Generator) -> None:
    model, x = trained("digits-cnn-2", generator), images(generator)
    for _ in range(2):
        with evaluating(model):
            expected = model(x)
        with frozen(model, x):
            torch.testing.assert_close(model(x), expected)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.mul_(1.5)


class Odd(nn.Module):
    """One convolution used twice, one read twice, one biased and followed by a plain norm."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.read_twice, self.plain = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.bare = nn.BatchNorm2d(3, affine=False)
        self.batchwise = nn.BatchNorm2d(3, track_running_stats=False)
        self.last = nn.Conv2d(3, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.twice(self.twice(x)))
        y = self.read_twice(x)
        return self.batchwise(self.last(self.bare(self.plain(self.norms[1](y) + y))))


def test_only_what_may_be_folded_is(generator: torch.Generator) -> None:
    model, x = Odd().double(), images(generator)
    model(x)  # moves the running statistics
    assert find_pairs(model, x) == [("plain", "bare")]
    with evaluating(model):
        expected = value_and_slope(model, x)
    with frozen(model, x):
        found = value_and_slope(model, x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


class Casts(TorchDispatchMode):
    """Counts how often a tensor of four dimensions, a filter or an image, changes its type."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::_to_copy":
            self.count += args[0].ndim == 4 and args[0].dtype != out.dtype
        return out


def test_under_autocast_filters_are_cast_once_and_images_in_each_pass(
    generator: torch.Generator,
) -> None:
    model, x = trained("resnet20", generator).float(), images(generator).float()
    with torch.autocast("cpu", torch.bfloat16):
        find_pairs(model, x)
        with evaluating(model), Casts() as casts:
            expected = model(x)
            assert casts.count > 20
        with frozen(model, x), Casts() as casts:
            found = model(x)
            assert casts.count == 1
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


PROGRAM = """
import torch
from gacd.models import create_model
from gacd.models.frozen import frozen

torch.manual_seed(0)
model = create_model("digits-cnn-2", num_classes=3, seed=0)
x = torch.rand(2, 3, 8, 8)
model.train()(x)  # moves the running statistics
plain = model.forward_features
model.forward_features = torch.compile(plain, backend="aot_eager", fullgraph=True)
for _ in range(3):
    with torch.no_grad():
        model.body[0].weight.mul_(1.1)
    with frozen(model, x):
        torch.testing.assert_close(model.forward_features(x), plain(x))
    torch.testing.assert_close(model.train()(x), model.forward_head(plain(x)), rtol=0.1, atol=0.1)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
"""


def test_a_compiled_network_is_not_compiled_at_every_step() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Read(nn.Module):
    """A convolution and its normalisation, and whatever else reads the convolution's output."""

    def __init__(self, also: Callable[[Tensor], Tensor | float]) -> None:
        super().__init__()
        self.conv, self.bn, self.also = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), also

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return (self.bn(h) + self.also(h)).flatten(1)


@pytest.mark.parametrize(
    ("also", "exact"),
    [
        (lambda h: 0.0, True),
        (lambda h: h, True),  # the graph shows it, so there is no pair
        (lambda h: h.detach(), False),
        (lambda h: h if len(h) > 1 else 0.0, False),
    ],
)
def test_readers_that_the_graph_does_not_show_are_found(
    also: Callable[[Tensor], Tensor | float], exact: bool
) -> None:
    model, x = Read(also), torch.rand(2, 3, 5, 5)
    before = copy.deepcopy(model.state_dict())
    assert folds_exactly(model, x) is exact
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_a_network_that_says_so_is_not_folded() -> None:
    model, x = Read(lambda h: h.detach()).eval(), torch.rand(2, 3, 5, 5)
    model.bn.running_var.fill_(9.0)
    model.folds = False
    with frozen(model, x):
        found = model(x)
    assert torch.equal(found, model(x))


class InFloat32(nn.Module):
    """A layer that computes in float32 under any autocast, as some attention layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.conv(x).mean((2, 3))
        with torch.autocast(x.device.type, enabled=False):
            return self.linear(z.float())


def test_a_layer_kept_in_float32_stays_so() -> None:
    model, x = InFloat32(), torch.rand(2, 3, 8, 8)
    assert not folds_exactly(model, x)
    model.folds = False
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        with frozen(model, x):
            assert torch.equal(model(x), expected)

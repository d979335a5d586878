"""bf16 products where the processor has none: held to float64, and to hardware that has them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gacd.training import precision
from gacd.training.precision import Bf16Autocast, RoundedProducts

ULP = 2.0**-8  # of a bf16 number, at most: 8 bits of significand
NATIVE = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


LAYERS = {
    "convolution": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False),
    "linear": lambda: nn.Linear(10, 5),
}


def pass_through(layer: nn.Module, x: Tensor, toward: Tensor) -> list[Tensor]:
    """Its answer, the gradient of the images, and those of its parameters."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(toward.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("name", LAYERS)
def test_products_are_those_of_rounded_numbers_summed_exactly(name: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(32, 4, 10, 10)
    toward = torch.randn_like(layer(x)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), RoundedProducts():
        found = pass_through(layer, x, toward)
    assert found[0].dtype == torch.bfloat16
    exact = LAYERS[name]().double()
    exact.load_state_dict({k: rounded(v) for k, v in layer.state_dict().items()})
    for ours, theirs in zip(found, pass_through(exact, rounded(x), toward), strict=True):
        sums = 1e-5 * float(theirs.abs().max())  # in float32
        assert torch.allclose(ours.double(), theirs, rtol=ULP, atol=sums)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(layer(x).double(), exact(rounded(x)))  # it is rounded


@pytest.mark.skipif(not NATIVE, reason="this processor has no bf16 products")
@pytest.mark.parametrize("name", LAYERS)
def test_products_are_those_of_hardware(name: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(32, 4, 10, 10)
    toward = torch.randn_like(layer(x)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        native = pass_through(layer, x, toward)
        with RoundedProducts():
            ours = pass_through(layer, x, toward)
    for a, b in zip(native, ours, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=2 * ULP, atol=1e-2 * float(a.abs().max()))


def test_products_in_float32_stay_so() -> None:
    torch.manual_seed(0)
    layer, x = LAYERS["convolution"](), torch.randn(2, 4, 10, 10)
    plain = layer(x)
    with RoundedProducts():
        assert torch.equal(layer(x), plain)
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    layer.float()
    with torch.autocast("cpu", torch.bfloat16), RoundedProducts():
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(F.linear(x, x[0, 0]), x @ x[0, 0].mT)
            assert F.linear(x, x[0, 0]).dtype == torch.float32
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("fast", [True, False])
def test_only_slow_processors_round(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "fast_bf16", lambda: fast)
    entered = []
    monkeypatch.setattr(RoundedProducts, "__enter__", lambda self: entered.append(self))
    monkeypatch.setattr(RoundedProducts, "__exit__", lambda *_: None)
    with Bf16Autocast("cpu").forward_context():
        assert torch.is_autocast_enabled("cpu")
    assert bool(entered) is not fast

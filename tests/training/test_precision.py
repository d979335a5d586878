"""bf16 products where the processor has none: held to float64, and to hardware that has them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.library import _scoped_library
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gacd.training import precision
from gacd.training.precision import Bf16Autocast, register

ULP = 2.0**-8  # of a bf16 number, at most: 8 bits of significand
NATIVE = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def slow() -> Iterator[None]:
    """Autocast as on a processor that is slow at it."""
    with _scoped_library("aten", "IMPL") as library:
        register(library)
        yield


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
def test_products_are_those_of_rounded_numbers_summed_exactly(name: str, slow: None) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(32, 4, 10, 10)
    toward = torch.randn_like(layer(x)).bfloat16()
    with autocast():
        found = pass_through(layer, x, toward)
    assert found[0].dtype == torch.bfloat16
    exact = LAYERS[name]().double()
    exact.load_state_dict({k: rounded(v) for k, v in layer.state_dict().items()})
    for ours, theirs in zip(found, pass_through(exact, rounded(x), toward), strict=True):
        sums = 1e-5 * float(theirs.abs().max())  # in float32
        assert torch.allclose(ours.double(), theirs, rtol=ULP, atol=sums)
    assert not torch.equal(found[0].double(), exact(rounded(x)))  # it is rounded


@pytest.mark.skipif(not NATIVE, reason="this processor has no bf16 products")
@pytest.mark.parametrize("name", LAYERS)
def test_products_are_those_of_hardware(name: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(32, 4, 10, 10)
    toward = torch.randn_like(layer(x)).bfloat16()
    with autocast():
        native = pass_through(layer, x, toward)
        with _scoped_library("aten", "IMPL") as library:
            register(library)
            ours = pass_through(layer, x, toward)
    for a, b in zip(native, ours, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=2 * ULP, atol=1e-2 * float(a.abs().max()))


def test_what_autocast_leaves_alone_stays_so(slow: None) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS["linear"](), torch.randn(2, 10)
    plain = layer(x)
    with autocast():
        assert layer(x).dtype == torch.bfloat16
        wide = LAYERS["linear"]().double()
        assert torch.equal(wide(x.double()), F.linear(x.double(), wide.weight, wide.bias))
        assert wide(x.double()).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(layer(x), plain)
            with pytest.raises(RuntimeError, match="dtype"):
                layer(x.bfloat16())
    with torch.autocast("cpu", torch.float16):
        assert not torch.equal(layer(x), layer(x.bfloat16().float()))  # of 11 bits, not of 8
        assert layer(x).dtype == torch.float16
    assert torch.equal(layer(x), plain)


def test_layers_inside_others_and_passes_made_again_are_rounded_too(slow: None) -> None:
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(16, 1, batch_first=True), torch.randn(3, 5, 16)
    last = attention.out_proj
    with autocast():
        inside = attention(x, x, x, need_weights=False)[0]
        read = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        spelt = F.linear(F.scaled_dot_product_attention(*read), last.weight, last.bias)
    assert inside.dtype == torch.bfloat16
    assert torch.allclose(inside.float(), spelt.float(), atol=ULP)

    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding="same"), nn.ReLU(), nn.Conv2d(4, 4, 3))
    gradients = []
    for once in (True, False):
        net.zero_grad()
        with autocast():
            z = net(x[:, None]) if once else checkpoint(net, x[:, None], use_reentrant=False)
        z.float().sum().backward()  # outside of the context, where checkpoint makes its pass again
        gradients.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fast", [True, False])
def test_only_slow_processors_round(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(precision, "fast_bf16", lambda: fast)
    monkeypatch.setattr(precision, "round_products", lambda: asked.append(True))
    with Bf16Autocast("cpu").forward_context():
        assert torch.is_autocast_enabled("cpu")
    assert bool(asked) is not fast
    Bf16Autocast("cuda")
    assert len(asked) <= 1

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gacd.models.projection import Projection


def test_is_the_normalised_linear_map(generator: torch.Generator) -> None:
    head = Projection(7, 5, seed=0)
    features = torch.randn(4, 7, generator=generator)
    out = head(features)
    for row, f in zip(out, features, strict=True):
        z = (head.linear.weight.double() * f.double()).sum(1) + head.linear.bias.double()
        torch.testing.assert_close(row.double(), z / z.pow(2).sum().sqrt(), rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_rows_have_length_one(rows: int, scale: float, seed: int) -> None:
    head = Projection(6, 8, seed=seed)
    features = scale * torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(head(features).norm(dim=1), torch.ones(rows))


def test_half_precision_features_and_autocast_give_float32(generator: torch.Generator) -> None:
    head = Projection(64, 16, seed=0)
    features = 20 * torch.randn(32, 64, generator=generator)
    exact = head(features)
    stored = head(features.half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head(features)
    for out in (stored, mixed):
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, exact, rtol=0, atol=0.02)
        torch.testing.assert_close(out.norm(dim=1), torch.ones(32))


def test_gradient(generator: torch.Generator) -> None:
    head = Projection(4, 3, seed=0).double()
    features = torch.randn(2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert head(features).dtype == torch.float64
    assert torch.autograd.gradcheck(head, (features,))


def test_a_row_of_zeros_stays_finite() -> None:
    head = Projection(4, 3, seed=0)
    torch.nn.init.zeros_(head.linear.bias)
    features = torch.zeros(2, 4, requires_grad=True)
    out = head(features)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 3))
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()


def test_weights_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first = Projection(100, 128, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second = Projection(100, 128, seed=5).state_dict()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor)
        assert tensor.abs().max() <= 0.1
        assert tensor.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.2)
    assert not torch.equal(Projection(100, 128, seed=6).linear.weight, first["linear.weight"])

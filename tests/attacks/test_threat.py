"""The budget and the box hold for whatever comes in; steps and starts are what they say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gacd.attacks.threat import ThreatModel
from gacd.errors import UserError

NORMS = ["linf", "l2"]


def length(delta: torch.Tensor, norm: str) -> torch.Tensor:
    return torch.linalg.vector_norm(
        delta.double().flatten(1), ord=math.inf if norm == "linf" else 2, dim=1
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    norm=st.sampled_from(NORMS),
    eps=st.floats(0, 1),
    spread=st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 1e4]),
    corners=st.booleans(),
)
def test_projection_holds_budget_and_box(
    seed: int, norm: str, eps: float, spread: float, corners: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, 4, 4, generator=generator)
    if corners:
        x = x.round()
    threat = ThreatModel(norm=norm, eps=eps)
    outside = x + spread * torch.randn(x.shape, generator=generator)

    for inside in (threat.project(outside, x), threat.random_start(x, generator)):
        assert inside.min() >= 0
        assert inside.max() <= 1
        assert (length(inside - x, norm) <= eps + 1e-6).all()


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_the_nearest_point_of_the_ball(norm: str) -> None:
    x = torch.full((2, 1, 2, 2), 0.5)
    delta = torch.tensor([[0.3, -0.4, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]]).view_as(x)
    near = ThreatModel(norm=norm, eps=0.25).project(x + delta, x) - x
    expected = {"linf": [0.25, -0.25, 0.0, 0.0], "l2": [0.15, -0.2, 0.0, 0.0]}[norm]
    torch.testing.assert_close(near.flatten(1)[0], torch.tensor(expected))
    torch.testing.assert_close(near[1], delta[1])  # inside already: left alone


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_a_step_has_its_length_whatever_the_gradients_scale(norm: str, scale: float) -> None:
    x = torch.zeros(3, 2, 4, 4)
    grad = scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    grad[1] = 0
    step = ThreatModel(norm=norm, eps=0.1).ascend(x, grad, 0.05)
    expected = torch.tensor([0.05, 0.0, 0.05], dtype=torch.float64)
    torch.testing.assert_close(length(step, norm), expected, atol=1e-7, rtol=1e-6)
    assert ((step * grad).flatten(1).sum(1) >= 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_fill_the_ball_uniformly(norm: str, generator: torch.Generator) -> None:
    """(|delta| / eps)^d is uniform on [0, 1] for a uniform point of the d-dimensional ball."""
    x = torch.full((4000, 1, 1, 3), 0.5)
    delta = ThreatModel(norm=norm, eps=0.2).random_start(x, generator) - x
    volume = (length(delta, norm) / 0.2) ** 3
    ranks = torch.linspace(0, 1, 4000, dtype=torch.float64)
    assert (volume.sort().values - ranks).abs().max() < 1.63 / math.sqrt(4000)  # KS at 1 %
    assert (delta.mean(0).abs() < 0.01).all()


def test_memory_format_is_kept(generator: torch.Generator) -> None:
    x = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    threat = ThreatModel(norm="l2", eps=0.5)
    for result in (
        threat.random_start(x, generator),
        threat.project(torch.rand(2, 3, 4, 4), x),
        threat.ascend(x, torch.randn(2, 3, 4, 4), 0.1),
    ):
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("eps", [8.0, -0.1, math.nan])
def test_an_impossible_eps_is_refused(eps: float) -> None:
    with pytest.raises(UserError, match="8/255"):
        ThreatModel(eps=eps)


def test_l2_may_be_larger_than_one_but_not_infinite() -> None:
    assert ThreatModel(norm="l2", eps=3.0).eps == 3
    with pytest.raises(UserError, match=r"0\.5"):
        ThreatModel(norm="l2", eps=math.inf)


def test_an_unknown_norm_is_refused() -> None:
    threat = ThreatModel(eps=0.1)
    object.__setattr__(threat, "norm", "linff")  # past the tests' own check of the type
    with pytest.raises(UserError, match="did you mean 'linf'"):
        threat.__post_init__()

"""Sinkhorn against POT, and against what it should mean."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gacd.attacks.objectives import feature_cosine, feature_transport
from gacd.attacks.transport import cosine_cost, sinkhorn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # optional backends of POT that are not installed
    import ot


def features(seed: int, batch: int = 24, noise: float = 0.4) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and perturbed features of the kind a network gives: non-negative, in clusters."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1 + torch.randn(5, 16, generator=generator)
    labels = torch.randint(0, 5, (batch,), generator=generator)
    clean = centres[labels] + 0.6 * torch.randn(batch, 16, generator=generator)
    perturbed = clean + noise * torch.randn(batch, 16, generator=generator)
    return clean.relu(), perturbed.relu()


@pytest.mark.parametrize("reg", [0.01, 0.1])
@pytest.mark.parametrize("iterations", [1, 7, 20, 400])
def test_agrees_with_pots_log_domain_sinkhorn(reg: float, iterations: int) -> None:
    cost = cosine_cost(*features(0))
    weights = torch.full((len(cost),), 1 / len(cost), dtype=torch.float64).numpy()
    expected = ot.sinkhorn(
        weights, weights, cost.double().numpy(), reg, method="sinkhorn_log",
        numItermax=iterations, stopThr=0, warn=False,
    )  # fmt: skip
    actual = sinkhorn(cost, reg=reg, iterations=iterations)
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), noise=st.floats(0, 3))
def test_marginals_distance_and_bounds(seed: int, noise: float) -> None:
    cost = cosine_cost(*features(seed, noise=noise))
    size = len(cost)
    plan = sinkhorn(cost, iterations=300)
    torch.testing.assert_close(plan.sum(1), torch.full((size,), 1 / size), rtol=1e-5, atol=0)
    assert (plan.sum(0) - 1 / size).abs().sum() < 0.02
    # Between the exact optimum and the optimum plus the entropy that was bought for it.
    weights = torch.full((size,), 1 / size, dtype=torch.float64).numpy()
    exact = ot.emd2(weights, weights, cost.double().numpy())
    distance = (plan * cost).sum().item()
    assert exact - 0.005 <= distance <= exact + 0.01 * math.log(size) + 0.005


def test_the_default_iterations_suffice() -> None:
    for seed in range(5):
        cost = cosine_cost(*features(seed, batch=64))
        few = (sinkhorn(cost) * cost).sum()
        many = (sinkhorn(cost.double(), iterations=3000) * cost).sum()
        torch.testing.assert_close(few.double(), many, rtol=0.01, atol=0)


def test_distance_is_symmetric() -> None:
    clean, perturbed = features(0)
    there, back = cosine_cost(clean, perturbed), cosine_cost(perturbed, clean)
    torch.testing.assert_close(
        (sinkhorn(there, iterations=1000) * there).sum(),
        (sinkhorn(back, iterations=1000) * back).sum(),
        rtol=1e-4,
        atol=0,
    )


def test_identical_batches_are_at_distance_zero_up_to_the_entropy() -> None:
    """D <= reg log B always; practically 0 where no two features are closer than 20 reg."""
    apart = torch.eye(32)
    mixed, _ = features(0, batch=32)
    for z, bound in ((apart, 1e-6), (mixed, 0.01 * math.log(32))):
        cost = cosine_cost(z, z)
        assert -1e-6 <= (sinkhorn(cost) * cost).sum() <= bound


def test_a_permuted_batch_is_matched_back() -> None:
    """Unlike the cosine of each image with itself, transport does not mind who became whom."""
    z = torch.eye(16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    cost = cosine_cost(z[order], z)
    torch.testing.assert_close(sinkhorn(cost), F.one_hot(order) / 16)


def test_leading_dimensions_are_independent_sets() -> None:
    costs = torch.stack([cosine_cost(*features(seed)) for seed in range(3)])
    together = sinkhorn(costs)
    alone = torch.stack([sinkhorn(cost) for cost in costs])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("tolerance", [0.1, 0.01, 1e-3])
def test_tolerance_bounds_the_change_of_u(tolerance: float) -> None:
    """u changes by reg log of how far the rows are from 1/B after the columns were set."""
    cost = cosine_cost(*features(0))

    def change(iterations: int) -> float:
        log_plan = sinkhorn(cost, iterations=iterations).log() if iterations else -cost / 0.01
        columns = F.log_softmax(log_plan, dim=0)
        return 0.01 * columns.logsumexp(1).abs().sum().item()

    needed = next(n for n in range(1000) if change(n) < tolerance)
    stopped = sinkhorn(cost, iterations=1000, tolerance=tolerance)
    torch.testing.assert_close(stopped, sinkhorn(cost, iterations=needed + 1))
    never = sinkhorn(cost, iterations=20, tolerance=0.0)
    torch.testing.assert_close(never, sinkhorn(cost, iterations=20))


def test_with_a_tolerance_the_slowest_set_decides() -> None:
    slow = cosine_cost(*features(0))
    both = torch.stack([torch.zeros_like(slow), slow])  # the first is at its plan at once
    alone = sinkhorn(slow, iterations=1000, tolerance=1e-3)
    torch.testing.assert_close(sinkhorn(both, iterations=1000, tolerance=1e-3)[1], alone)
    assert not torch.allclose(sinkhorn(slow, iterations=1), alone, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_near(dtype: torch.dtype) -> None:
    clean, perturbed = features(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = cosine_cost(100 * perturbed.to(dtype), clean.to(dtype))
    assert cost.dtype == torch.float32
    exact = cosine_cost(perturbed, clean)
    torch.testing.assert_close(cost, exact, rtol=0, atol=0.02)
    plan = sinkhorn(cost.to(dtype))
    assert plan.dtype == torch.float32
    assert torch.isfinite(plan).all()
    torch.testing.assert_close(plan.sum(), torch.tensor(1.0))


def test_zero_features_are_harmless() -> None:
    z = torch.zeros(4, 8, requires_grad=True)
    distance = feature_transport(lambda _: z, torch.zeros(4, 8))(torch.zeros(4, 1, 1, 1))
    (grad,) = torch.autograd.grad(distance.sum(), z)
    assert torch.isfinite(distance).all()
    assert torch.isfinite(grad).all()


def images_as_features(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)


def gradient(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(value, x)
    return grad


def test_the_envelope_gradient_is_that_of_the_regularised_distance() -> None:
    """d/dC of min_P sum(P C) - reg H(P) is P: what unrolling all the iterations gives."""
    clean, perturbed = (z.double() for z in features(3, batch=12))
    reg = 0.05
    x = perturbed.view(12, 1, 4, 4).float().requires_grad_()
    objective = feature_transport(images_as_features, clean.float(), reg=reg, iterations=2000)
    envelope = gradient(objective(x).mean(), x)

    x64 = perturbed.requires_grad_()
    cost = 1 - F.normalize(x64) @ F.normalize(clean).T
    plan = sinkhorn(cost, reg=reg, iterations=400)
    unrolled = gradient((plan * cost).sum() + reg * torch.xlogy(plan, plan).sum(), x64)
    torch.testing.assert_close(envelope.flatten(1).double(), unrolled, rtol=1e-3, atol=1e-5)

    # The source differentiates sum(P C) alone, through the iterations: nearly the same direction.
    cost = 1 - F.normalize(x64) @ F.normalize(clean).T
    sharp = gradient((sinkhorn(cost, reg=0.01, iterations=100) * cost).sum(), x64)
    objective = feature_transport(images_as_features, clean.float())
    envelope = gradient(objective(x).mean(), x).flatten(1).double()
    assert F.cosine_similarity(envelope.flatten(), sharp.flatten(), dim=0) > 0.9


def test_the_objective_is_the_distance_and_moves_with_the_batch() -> None:
    clean, perturbed = features(4)
    x = perturbed.view(24, 1, 4, 4)
    objective = feature_transport(images_as_features, clean)
    cost = cosine_cost(perturbed, clean)
    torch.testing.assert_close(objective(x).mean(), (sinkhorn(cost) * cost).sum())
    torch.testing.assert_close(objective(x), 24 * (sinkhorn(cost) * cost).sum(1))

    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    permuted = feature_transport(images_as_features, clean[order])
    torch.testing.assert_close(permuted(x[order]), objective(x)[order], rtol=1e-4, atol=1e-6)


def test_transport_is_at_most_the_cosine_of_each_with_itself() -> None:
    """The identity is one of the plans: its cost is exceeded by reg log B at most."""
    clean, perturbed = features(5)
    x = perturbed.view(24, 1, 4, 4)
    transport = feature_transport(images_as_features, clean)(x).mean()
    itself = feature_cosine(images_as_features, clean)(x).mean()
    assert transport <= itself + 0.01 * math.log(24)

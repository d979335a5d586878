"""Each objective against a loop written from its formula."""

import math

import pytest
import torch

from gacd.attacks import objectives
from gacd.errors import UserError

X = torch.zeros(6, 1, 2, 2)
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(6, 5, generator=GENERATOR)
LABELS = torch.cat([LOGITS[:3].argmax(1), LOGITS[3:].argmin(1)])
TARGET = torch.randn(6, 5, generator=GENERATOR).softmax(1)
TARGET[0] = torch.tensor([1.0, 0, 0, 0, 0])


def model(x: torch.Tensor) -> torch.Tensor:
    return LOGITS[: len(x)]


def softmax(z: list[float]) -> list[float]:
    total = math.fsum(math.exp(a) for a in z)
    return [math.exp(a) / total for a in z]


def margin(z: list[float], y: int) -> float:
    return max(a for j, a in enumerate(z) if j != y) - z[y]


def dlr(z: list[float], y: int) -> float:
    ranked = sorted(z, reverse=True)
    return margin(z, y) / (ranked[0] - ranked[2])


def kl(p: list[float], z: list[float], temperature: float) -> float:
    q = softmax([a / temperature for a in z])
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def assert_rows(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_of_labels() -> None:
    rows = list(zip(LOGITS.double().tolist(), LABELS.tolist(), strict=True))
    assert_rows(
        objectives.cross_entropy(model, LABELS)(X), [-math.log(softmax(z)[y]) for z, y in rows]
    )
    assert_rows(objectives.margin(model, LABELS)(X), [margin(z, y) for z, y in rows])
    assert_rows(objectives.dlr(model, LABELS)(X), [dlr(z, y) for z, y in rows])


def test_margin_and_dlr_are_positive_exactly_where_misclassified() -> None:
    broken = objectives.misclassified(model, LABELS)(X)
    assert 0 < broken.sum() < len(broken)
    assert torch.equal(broken, objectives.margin(model, LABELS)(X) > 0)
    assert torch.equal(broken, objectives.dlr(model, LABELS)(X) > 0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_summed_over_classes(temperature: float) -> None:
    expected = [
        kl(p, z, temperature)
        for p, z in zip(TARGET.double().tolist(), LOGITS.double().tolist(), strict=True)
    ]
    assert_rows(objectives.kl(model, TARGET, temperature)(X), expected)


def test_kl_is_zero_at_its_target() -> None:
    zero = objectives.kl(model, (LOGITS / 2).softmax(1), temperature=2.0)(X)
    torch.testing.assert_close(zero, torch.zeros(6))


def test_feature_cosine() -> None:
    clean = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    for sign, expected in ((1.0, 0.0), (-1.0, 2.0)):
        score = objectives.feature_cosine(lambda x, s=sign: s * 7 * clean, clean)(X)
        assert_rows(score, [expected] * 6)


def test_dlr_does_not_mind_the_logits_scale() -> None:
    scaled = objectives.dlr(lambda x: 1000 * LOGITS, LABELS)(X)
    torch.testing.assert_close(scaled, objectives.dlr(model, LABELS)(X))


def test_dlr_of_equal_logits_is_none() -> None:
    assert not objectives.dlr(lambda x: torch.zeros(6, 5), LABELS)(X).any()


def test_dlr_of_two_classes_is_refused() -> None:
    with pytest.raises(UserError, match="margin"):
        objectives.dlr(lambda x: LOGITS[:, :2], LABELS % 2)(X)


def test_half_precision_logits_give_single_precision_objectives() -> None:
    def half(x: torch.Tensor) -> torch.Tensor:
        return (1000 * LOGITS).half()

    for objective in (
        objectives.cross_entropy(half, LABELS),
        objectives.margin(half, LABELS),
        objectives.dlr(half, LABELS),
        objectives.kl(half, TARGET),
        objectives.feature_cosine(half, LOGITS.half()),
    ):
        value = objective(X)
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()


def test_rows_are_scored_as_in_the_whole_batch() -> None:
    def brightness(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ LOGITS[:4]

    x = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    index = torch.tensor([4, 1])
    for objective in (
        objectives.cross_entropy(brightness, LABELS),
        objectives.kl(brightness, TARGET),
        objectives.feature_cosine(brightness, LOGITS),
        objectives.misclassified(brightness, LABELS),
    ):
        torch.testing.assert_close(objective.rows(index)(x[index]), objective(x)[index])


def test_adaptive_kl_takes_both_networks_at_the_attacked_image() -> None:
    """KL(T(x') || f(x')) of linear networks, and its slope through both of them."""
    generator = torch.Generator().manual_seed(3)
    ours, theirs = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.rand(6, 1, 2, 2, generator=generator, dtype=torch.float64)

    def of(matrix: torch.Tensor) -> objectives.Classifier:
        return lambda x: x.flatten(1) @ matrix

    objective = objectives.adaptive_kl(of(ours), of(theirs))
    for value, z, t in zip(objective(x), of(ours)(x), of(theirs)(x), strict=True):
        assert value.item() == pytest.approx(kl(softmax(t.tolist()), z.tolist(), 1.0), rel=1e-5)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(leaf).sum(), leaf)
    step = 1e-3
    for pixel in range(4):
        moved = torch.zeros(6, 4, dtype=torch.float64)
        moved[:, pixel] = step
        moved = moved.view(6, 1, 2, 2)
        by_hand = (objective(x + moved) - objective(x - moved)) / (2 * step)
        torch.testing.assert_close(
            by_hand.double(), slope.flatten(1)[:, pixel], rtol=0.02, atol=1e-3
        )
    constant = objectives.kl(of(ours), of(theirs)(x).softmax(1))
    (other,) = torch.autograd.grad(constant(leaf).sum(), leaf)
    assert not torch.allclose(slope, other, atol=1e-3)
    same = objectives.adaptive_kl(of(ours), of(ours))
    assert same(x).abs().max() < 1e-6


def test_what_an_image_is_compared_with_is_a_constant() -> None:
    target = TARGET.clone().requires_grad_()
    for make in (objectives.kl, objectives.feature_cosine, objectives.feature_transport):
        assert not make(model, target)(X).requires_grad


@pytest.mark.parametrize("objective", [objectives.feature_cosine, objectives.feature_transport])
def test_clean_features_are_of_the_same_images(objective) -> None:
    with pytest.raises(UserError, match=r"clean features are \[3, 12\], .* \[2, 12"):
        objective(lambda x: x.flatten(1), torch.rand(3, 12))(torch.rand(2, 3, 2, 2))


@pytest.mark.parametrize("objective", [objectives.cross_entropy, objectives.margin])
def test_labels_of_any_width(objective) -> None:
    x, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 3])
    found = objective(lambda x: x.flatten(1), labels.int())(x)
    assert torch.equal(found, objective(lambda x: x.flatten(1), labels)(x))

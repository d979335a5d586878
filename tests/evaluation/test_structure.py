"""Structure of logits and features against sums written out, and against cases known by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import silhouette_samples

from gacd.attacks.threat import ThreatModel
from gacd.errors import UserError
from gacd.evaluation import structure


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def naive_cka(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC of the centred Gram matrices, sums written out (Kornblith et al. 2019, Eq. 2 and 3)."""
    n = len(x)

    def centred(z: np.ndarray) -> list[list[float]]:
        k = [[math.fsum(a * b for a, b in zip(z[i], z[j], strict=True)) for j in range(n)]
             for i in range(n)]  # fmt: skip
        row = [math.fsum(r) / n for r in k]
        return [[k[i][j] - row[i] - row[j] + math.fsum(row) / n for j in range(n)]
                for i in range(n)]  # fmt: skip

    def hsic(k: list[list[float]], m: list[list[float]]) -> float:
        return math.fsum(k[i][j] * m[j][i] for i in range(n) for j in range(n))

    k, m = centred(x), centred(y)
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


def test_cka_is_that_of_centred_gram_matrices() -> None:
    x, y = normal(9, 4) + 3, normal(9, 6, seed=1)
    assert structure.linear_cka(x, y) == pytest.approx(naive_cka(x, y), rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100), shift=st.floats(-50, 50))
def test_cka_sees_no_rotation_scale_or_shift(seed: int, scale: float, shift: float) -> None:
    x, y = normal(12, 5, seed=seed), normal(12, 3, seed=seed + 1)
    rotation = np.linalg.qr(normal(5, 5, seed=seed + 2))[0]
    found = structure.linear_cka(x, y)
    assert 0 <= found <= 1
    assert structure.linear_cka(scale * x @ rotation + shift, y) == pytest.approx(found, rel=1e-6)
    assert structure.linear_cka(y, x) == pytest.approx(found, rel=1e-9)
    assert structure.linear_cka(x, x @ rotation) == pytest.approx(1)


def naive_correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - math.fsum(a) / len(a), b - math.fsum(b) / len(b)
    return math.fsum(a * b) / math.sqrt(math.fsum(a * a) * math.fsum(b * b))


def test_correlation_differences_entry_by_entry() -> None:
    teacher, student = normal(30, 4), normal(30, 4, seed=1)
    student[:, 2] = -3 * student[:, 1] + 7
    found = structure.correlation_difference(teacher, student)
    for i in range(4):
        for j in range(4):
            pair = [naive_correlation(z[:, i], z[:, j]) for z in (teacher, student)]
            assert found[i, j] == pytest.approx(abs(pair[0] - pair[1]), abs=1e-12)
    assert structure.class_correlations(student)[1, 2] == pytest.approx(-1)
    assert not structure.correlation_difference(teacher, 5 * teacher - 2).round(12).any()


def test_geometry_by_hand() -> None:
    target = np.array([[0.0, 0.0], [2.0, 0.0]])  # around (1, 0), 1 away
    source = np.array([[9.0, -2.0], [9.0, 2.0]])  # around (9, 0), 2 away
    attacked = np.array([[5.1, 40.0], [4.9, 0.0], [9.0, 0.0], [0.0, 0.0]])
    found = structure.geometry(target, source, attacked)
    assert found.inter_intra == pytest.approx(8 / 1.5)
    assert found.nearer_true == 50
    assert 0 < found.nearer_true_low < 50 < found.nearer_true_high < 100
    b = [np.hypot(9, 2), np.hypot(7, 2), *[(np.hypot(9, 2) + np.hypot(7, 2)) / 2] * 2]
    a = [2, 2, 4, 4]
    expected = np.mean([(y - x) / max(x, y) for x, y in zip(a, b, strict=True)])
    assert found.silhouette == pytest.approx(expected)


def test_geometry_moves_with_the_classes() -> None:
    x, y = normal(20, 6), normal(20, 6, seed=1)
    apart = [structure.geometry(x, y + d, y + d) for d in (0.2, 1.0, 5.0)]
    assert [g.inter_intra for g in apart] == sorted(g.inter_intra for g in apart)
    assert [g.silhouette for g in apart] == sorted(g.silhouette for g in apart)
    assert apart[-1].nearer_true == 100
    assert structure.geometry(x, y + 5, x).nearer_true == 0


@pytest.mark.parametrize("joint", [False, True])
def test_embedding_keeps_clusters_apart_and_is_seeded(joint: bool) -> None:
    features = {"a": normal(24, 5), "b": 100 * normal(24, 5, seed=1)}
    for rows in features.values():
        rows[12:] += 30 * rows.std()
    found = structure.embed(features, joint=joint, seed=3)
    for points in found.values():
        assert points.shape == (24, 2)
        assert silhouette_samples(points, np.repeat([0, 1], 12)).min() > 0
    again = structure.embed(features, joint=joint, seed=3)
    assert all(np.array_equal(again[name], found[name]) for name in found)
    if not joint:  # a model's embedding does not depend on the others
        alone = structure.embed({"b": features["b"]}, seed=3)
        assert np.array_equal(alone["b"], found["b"])


def test_a_joint_embedding_does_not_mind_the_features_scale() -> None:
    x, y = normal(24, 5), normal(24, 5, seed=1)
    plain = structure.embed({"a": x, "b": y}, joint=True)
    scaled = structure.embed({"a": x, "b": 64 * y}, joint=True)  # a power of 2: the same bits
    assert all(np.array_equal(plain[name], scaled[name]) for name in plain)


def test_attacked_images_raise_or_lower_the_loss_within_the_budget(
    honest, digits, threat: ThreatModel
) -> None:
    x, labels = digits.float_images(), digits.labels
    options = {"threat": threat, "steps": 5, "batch_size": 64, "show_progress": False}
    away = structure.perturbed(honest, x, labels, seed=1, **options)
    aim = (labels + 1) % 10
    towards = structure.perturbed(honest, x, aim, targeted=True, seed=1, **options)
    for images in (away, towards):
        assert images.min() >= 0 and images.max() <= 1
        assert (images - x).abs().max() <= threat.eps + 1e-6
    with torch.no_grad():
        loss = [F.cross_entropy(honest(z), labels) for z in (x, away)]
        aimed = [F.cross_entropy(honest(z), aim) for z in (x, towards)]
    assert loss[1] > 2 * loss[0]
    assert aimed[1] < aimed[0] / 1.5
    assert torch.equal(away, structure.perturbed(honest, x, labels, seed=1, **options))
    assert not torch.equal(away, structure.perturbed(honest, x, labels, seed=2, **options))
    starts = structure.perturbed(honest, x, labels, seed=1, **options | {"steps": 0})
    still = structure.perturbed(honest, x, labels, seed=1, step_size=0.0, **options)
    torch.testing.assert_close(still, starts)
    none = structure.perturbed(honest, x, labels, threat=ThreatModel(eps=0.0))
    assert torch.equal(none, x)


def test_attacked_images_have_starts_and_a_budget_of_their_own(
    honest, digits, threat: ThreatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = digits.float_images()[:1].repeat(20, 1, 1, 1)
    options = {"threat": threat, "batch_size": 10, "show_progress": False}
    labels = torch.zeros(20, dtype=torch.int64)
    first, second = structure.perturbed(honest, x, labels, steps=0, **options).split(10)
    assert (first - second).abs().mean() > threat.eps / 10
    monkeypatch.setattr(structure, "pgd", lambda _, x, threat, **__: x + 1.01 * threat.eps)
    with pytest.raises(RuntimeError, match="left its budget"):
        structure.perturbed(honest, x, labels, **options)


def test_outputs_do_not_depend_on_the_batches(honest, digits) -> None:
    x = digits.float_images()
    found = structure.outputs(honest.train(), x, batch_size=7)
    assert honest.training
    honest.eval()
    with torch.no_grad():
        np.testing.assert_allclose(found.logits, honest(x), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.features, honest.forward_features(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: structure.linear_cka(normal(4, 2), normal(5, 2)), "same images"),
        (lambda: structure.linear_cka(np.ones((4, 2)), normal(4, 2)), "differ"),
        (lambda: structure.class_correlations(normal(1, 3)), "at least 2 images"),
        (lambda: structure.class_correlations(np.eye(4)[:, :3] * [1, 0, 1]), "class 1 never"),
        (lambda: structure.correlation_difference(normal(5, 2), normal(5, 3)), "2 classes .* 3"),
        (lambda: structure.geometry(normal(1, 2), normal(5, 2), normal(3, 2)), "1, 5 and 3"),
        (lambda: structure.geometry(*[np.ones((3, 2))] * 3), "differ"),
        (lambda: structure.embed({"a": normal(3, 2)}), "at least 4"),
        (
            lambda: structure.embed({"a": normal(9, 2), "b": normal(9, 3)}, joint=True),
            r"one width, not \[2, 3\]",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(call, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call()

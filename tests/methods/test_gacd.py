"""GACD and CRD: their losses by loops from the papers, estimators, normalisers, predictions."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gacd.errors import UserError
from gacd.methods import anchoring
from methods.world import (
    ATTACK,
    CLASSES,
    NEGATIVES,
    TEMPERATURE,
    World,
    attacked,
    embed,
    known_attack,
    total,
)
from reference.gacd_eq9 import eq9


@pytest.mark.parametrize("reweight", ["teacher", "none", "normalised"])
@pytest.mark.parametrize("positive", ["bank", "view"])
def test_gacd_is_the_loop_over_eq_9(
    world: World, positive: str, reweight: str, generator: torch.Generator
) -> None:
    method, batch = world.method("gacd", positive=positive, reweight=reweight), world.batch()
    # as if augmented: the view is not the stored image
    batch = batch._replace(images=batch.images.flip(3).contiguous())
    known_attack(method)
    x_adv, term = attacked(batch), method.terms["gacd"]
    with torch.no_grad():
        student = copy.deepcopy(method.student).train()
        own = term.student_projection.linear
        other = term.anchoring.projection.linear
        s = embed(own, student.forward_features(x_adv))
        stored = world.teacher.module.forward_features(world.data.float_images())
        anchors = embed(other, stored)
        view = embed(other, world.teacher.module.forward_features(batch.images))
        positives = anchors[batch.index] if positive == "bank" else view
        weights = torch.ones(12)
        if reweight != "none":
            logits = world.teacher.module(world.data.float_images())
            weights = logits.softmax(1)[torch.arange(12), world.data.labels]
        if reweight == "normalised":
            weights = weights / weights.mean()  # over the bank
    log_z = []
    for i, row in enumerate(batch.index.tolist()):
        terms = [math.exp(float(positives[i] @ s[i]) / TEMPERATURE)]
        terms += [math.exp(float(anchors[j] @ s[i]) / TEMPERATURE) for j in range(12) if j != row]
        log_z.append(math.log(math.fsum(terms)))
    expected = eq9(
        s, positives, anchors, batch.labels, world.data.labels, weights[batch.index], weights,
        log_z, NEGATIVES, 12, TEMPERATURE,
    )  # fmt: skip
    total, parts = method(batch, generator)
    assert total.item() == pytest.approx(expected.mean().item(), rel=1e-4)
    bounds = []  # InfoNCE's, whose positive is the stored image whatever the loss's is
    for i, row in enumerate(batch.index.tolist()):
        scores = [float(anchor @ s[i]) / TEMPERATURE for anchor in anchors]
        total_of_scores = math.fsum(math.exp(score) for score in scores)
        bounds.append(math.log(12) + scores[row] - math.log(total_of_scores))
    assert parts["mi"].item() == pytest.approx(math.fsum(bounds) / 5, rel=1e-4)
    assert parts["mi_ceiling"].item() == pytest.approx(math.log(12))


def student_embeddings(method: Any, batch: Any) -> Tensor:
    """s of `attacked` images; nothing moves."""
    with torch.no_grad():
        student = copy.deepcopy(method.student).train()
        own = method.terms["gacd"].student_projection.linear
        return embed(own, student.forward_features(attacked(batch)))


def test_sampled_anchors_stand_for_the_whole_bank(world: World) -> None:
    """By loops: Z from the positive and the other images drawn; k of N = 12 in h."""
    temperature = 0.01  # at which embeddings that are much alike differ
    options = {"estimator": "sampled", "positive": "bank", "temperature": temperature}
    method, batch = world.method("gacd", **options), world.batch()
    known_attack(method)
    rows = world.bank.draw(NEGATIVES, torch.Generator().manual_seed(0))
    s = student_embeddings(method, batch)
    bank = embed(method.terms["gacd"].anchoring.projection.linear, world.bank.features_MD).detach()
    log_z = []
    for i, own in enumerate(batch.index.tolist()):
        scores = [math.exp(float(bank[j] @ s[i]) / temperature) for j in rows if j != own]
        z = math.exp(float(bank[own] @ s[i]) / temperature) + 11 * sum(scores) / len(scores)
        log_z.append(math.log(z))
    assert any(own in rows for own in batch.index)
    weights, labels = world.bank.weights_M, world.data.labels
    expected = eq9(
        s, bank[batch.index], bank[rows], batch.labels, labels[rows], weights[batch.index],
        weights[rows], log_z, NEGATIVES, 12, temperature,
    )  # fmt: skip
    assert total(method, batch).item() == pytest.approx(expected.mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["first-batch", "running"])
def test_a_constant_normaliser_is_the_batches_mean_partition(world: World, kind: str) -> None:
    method = world.method("gacd", normaliser=kind, positive="bank")
    known_attack(method)
    bank = embed(method.terms["gacd"].anchoring.projection.linear, world.bank.features_MD).detach()
    weights, log_z = world.bank.weights_M, None
    for rows in ((3, 0, 11, 7, 5), (1, 2, 4, 6)):
        batch = world.batch(rows)
        s = student_embeddings(method, batch)
        sums = (s @ bank.T / TEMPERATURE).exp().sum(1).tolist()
        now = math.log(math.fsum(sums) / len(sums))
        if log_z is None:
            log_z = now
        elif kind == "running":
            log_z = 0.99 * log_z + 0.01 * now
        expected = eq9(
            s, bank[batch.index], bank, batch.labels, world.data.labels, weights[batch.index],
            weights, [log_z] * len(rows), NEGATIVES, 12, TEMPERATURE,
        )  # fmt: skip
        assert total(method, batch).item() == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("balanced", [False, True])
def test_anchors_are_drawn_as_said(
    world: World, balanced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    draw = world.bank.draw

    def noted(k: int, generator: torch.Generator, *, balanced: bool = False) -> Tensor:
        asked.append(balanced)
        return draw(k, generator, balanced=balanced)

    monkeypatch.setattr(world.bank, "draw", noted)
    method = world.method("gacd", estimator="sampled", balanced=balanced)
    logs = method(world.batch(), torch.Generator().manual_seed(0), 1.0).parts
    assert asked == [balanced]
    assert ("mi" in logs) == (not balanced)  # draws by class are none from the marginal


@pytest.mark.parametrize("estimator", ["exact", "memory"])
def test_balanced_is_refused_where_nothing_is_drawn(world: World, estimator: str) -> None:
    with pytest.raises(UserError, match=f"estimator {estimator} draws none"):
        world.method("gacd", estimator=estimator, normaliser="first-batch", balanced=True)


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_a_bank_elsewhere_serves_where_rows_are_drawn_and_copied(
    world: World, estimator: str, generator: torch.Generator
) -> None:
    anchors, elsewhere = world.method("gacd", estimator=estimator).terms["gacd"].anchors, "meta"
    if estimator == "sampled":
        drawn = anchors.draw(generator, torch.device(elsewhere))
        assert drawn.features_MD.device.type == elsewhere
    else:
        with pytest.raises(UserError, match="the bank is on cpu and the student on meta: move"):
            anchors.draw(generator, torch.device(elsewhere))


@pytest.mark.parametrize("name", ["ce", "margin", "kl", "teacher-kl", "adaptive-kl"])
def test_gacd_refuses_attacks_on_a_head_that_it_does_not_train(world: World, name: str) -> None:
    attack = replace(ATTACK, objective=name)
    with pytest.raises(UserError, match=f"'{name}'.*use transport or cosine"):
        world.method("gacd", attack=attack)


def test_a_deep_copy_shares_teacher_and_bank_and_nothing_else(world: World) -> None:
    method = world.method("gacd")
    twin = copy.deepcopy(method)
    assert twin.teacher is method.teacher and twin.terms["gacd"].bank is world.bank
    assert not {p.data_ptr() for p in method.parameters()} & {
        p.data_ptr() for p in twin.parameters()
    }
    assert total(twin, world.batch()).item() == total(method, world.batch()).item()


def test_a_sample_of_the_bank_gives_the_loss_in_the_mean(world: World) -> None:
    """With a fixed Z (`none`), drawn anchors change the variance of the loss and not its mean."""
    batch = world.batch()

    def losses(draws: int, **options: Any) -> Tensor:
        method = world.method("gacd", normaliser="none", **options)
        known_attack(method)
        with torch.no_grad():
            return torch.stack([total(method, batch, seed) for seed in range(draws)])

    exact, sampled = losses(1, estimator="exact"), losses(150, estimator="sampled")
    error = sampled.std() / 150**0.5
    assert 0 < error < 0.05 * exact[0]
    assert abs(sampled.mean() - exact[0]) < 4 * error


@pytest.mark.parametrize("rows", [5, 2**16])  # of the bank, projected together
def test_the_class_of_the_nearest_embedding_is_what_gacd_predicts(
    world: World, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(anchoring, "ROWS", rows)
    method = world.method("gacd").eval()
    term, images = method.terms["gacd"], world.data.float_images()
    with torch.no_grad():
        anchors = embed(
            term.anchoring.projection.linear, world.teacher.module.forward_features(images)
        )
        centres = torch.stack([anchors[world.data.labels == c].sum(0) for c in range(CLASSES)])
        own = embed(term.student_projection.linear, method.student.forward_features(images))
        expected = own @ (centres / centres.norm(dim=1, keepdim=True)).T / TEMPERATURE
        torch.testing.assert_close(
            method.predictor(images).double(), expected, rtol=1e-3, atol=1e-3
        )
    leaf = images.requires_grad_()
    (grad,) = torch.autograd.grad(method.predictor(leaf).sum(), leaf)
    assert grad.abs().sum() > 0

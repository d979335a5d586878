"""GACD and CRD: their losses by loops from the papers, estimators, normalisers, predictions."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gacd.anchors import principal_projection
from gacd.errors import UserError
from gacd.losses.contrastive import gacd_loss, project_anchors
from gacd.methods import anchoring, create_method
from gacd.methods.awp import AWP
from methods.world import (
    ATTACK,
    CLASSES,
    NEGATIVES,
    TEMPERATURE,
    World,
    attacked,
    embed,
    known_attack,
    network,
    total,
)
from reference import soft_labels as reference
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


def by_hand(world: World, method: Any, weight: Tensor | None, bias: Tensor | None) -> float:
    """The loss of a method that sees `attacked` images, projected as given."""
    batch, term = world.batch(), method.terms["gacd"]
    with torch.no_grad():
        student = copy.deepcopy(method.student).train()
        s = term.student_projection(student.forward_features(attacked(batch)))
        stored = world.bank.features_MD
        rows = stored if weight is None else stored @ weight.T + bias
        anchors = rows / rows.norm(dim=1, keepdim=True)
    losses = gacd_loss(
        s,
        anchors[batch.index],
        anchors,
        labels_B=batch.labels,
        anchor_labels_M=world.data.labels,
        weights_B=world.bank.weights_M[batch.index],
        anchor_weights_M=world.bank.weights_M,
        index_B=batch.index,
        temperature=TEMPERATURE,
        negatives=NEGATIVES,
    )
    return losses.mean().item()


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


def test_a_loaded_projection_is_applied_anew(world: World) -> None:
    method = world.method("gacd", teacher_projection="pca", positive="bank")
    known_attack(method)
    total(method, world.batch())  # what is projected once is kept
    state = copy.deepcopy(method.state_dict())
    weight, bias = (
        state[f"terms.gacd.anchoring.projection.linear.{n}"] for n in ("weight", "bias")
    )
    weight.copy_(weight.flip(1))
    method.load_state_dict(state)
    expected = by_hand(world, method, weight, bias)
    assert total(method, world.batch()).item() == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def projections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every projection of anchors that is not part of a loss."""
    calls: list[int] = []

    def counted(features_MD: Tensor, *linear: Tensor | None) -> Tensor:
        calls.append(len(features_MD))
        return project_anchors(features_MD, *linear)

    monkeypatch.setattr(anchoring, "project_anchors", counted)
    return calls


@pytest.mark.parametrize("kind", ["pca", "identity"])
def test_a_frozen_projection_is_applied_once_and_does_not_train(
    world: World, kind: str, projections: list[int]
) -> None:
    method = world.method("gacd", teacher_projection=kind, positive="bank")
    known_attack(method)
    pca = principal_projection(world.bank.features_MD, 6)
    linear = pca if kind == "pca" else (None, None)
    for _ in range(2):
        assert total(method, world.batch()).item() == pytest.approx(
            by_hand(world, method, *linear), rel=1e-4
        )
    assert projections == [12]
    width = 6 if kind == "pca" else world.bank.features_MD.shape[1]
    assert method.terms["gacd"].student_projection.linear.out_features == width
    total(method, world.batch()).backward()
    assert not any(p.requires_grad for p in method.terms["gacd"].anchoring.projection.parameters())
    assert method.predictor(world.data.float_images()).shape == (12, CLASSES)


def test_a_frozen_projection_projects_the_anchors_drawn(
    world: World, projections: list[int]
) -> None:
    method = world.method("gacd", teacher_projection="pca", estimator="sampled")
    total(method, world.batch(), seed=0)
    total(method, world.batch(), seed=1)
    assert projections == [NEGATIVES] * 2


def test_a_refreshed_projection_trains_now_and_then_and_is_held_between(
    world: World, projections: list[int]
) -> None:
    options = {"teacher_projection": "refreshed", "refresh": 3, "positive": "bank"}
    method = world.method("gacd", **options)
    known_attack(method)
    term = method.terms["gacd"]
    linear = term.anchoring.projection.linear
    parameters = [*method.parameters()]
    optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1, momentum=0.9)
    trained, losses, state = [], [], {}
    for step in range(7):
        if step % 3 == 1:  # what the live step has made of it is held
            held = linear.weight.detach().clone(), linear.bias.detach().clone()
        if step == 5:
            state = copy.deepcopy(method.state_dict())
        now = held if step % 3 else (linear.weight.detach(), linear.bias.detach())
        expected = by_hand(world, method, *now)
        loss = total(method, world.batch())
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        trained.append(bool(linear.weight.grad.abs().sum() > 0))
        optimizer.step()
    assert trained == [True, False, False, True, False, False, True]
    assert projections == [12, 12]

    resumed = world.method("gacd", **options)
    known_attack(resumed)
    resumed.load_state_dict(state)
    assert total(resumed, world.batch()).item() == pytest.approx(losses[5], rel=1e-6)


def test_a_rehearsal_of_awps_is_no_step_of_a_refreshed_projection(world: World) -> None:
    method = world.method(
        "gacd", teacher_projection="refreshed", refresh=3, positive="bank", awp=AWP(gamma=0.01)
    )
    anchoring, trained = method.terms["gacd"].anchoring, []
    for _ in range(7):
        method.zero_grad()
        total(method, world.batch()).backward()
        trained.append(bool(anchoring.projection.linear.weight.grad.abs().sum() > 0))
    assert trained == [True, False, False, True, False, False, True]
    assert int(anchoring.age) == 7


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
    total(world.method("gacd", estimator="sampled", balanced=balanced), world.batch())
    assert asked == [balanced]


def test_bad_projections_are_refused(world: World) -> None:
    with pytest.raises(UserError, match="did you mean 'refreshed'"):
        world.method("gacd", teacher_projection="refresh")
    with pytest.raises(UserError, match="at least 2"):
        world.method("gacd", teacher_projection="refreshed", refresh=1)
    with pytest.raises(UserError, match="components"):
        world.method("gacd", teacher_projection="pca", dim=1000)


def crd_by_loops(
    s: list[list[float]],
    t: list[list[float]],
    students: list[list[float]],
    teachers: list[list[float]],
    rows: list[list[int]],
    weights: list[float],
    temperature: float,
) -> list[float]:
    """The first step of CRD for each image, Z from this batch (Eq. 17, 18; its code for Z)."""
    size, negatives = len(students), len(rows[0]) - 1

    def scores(query: list[float], memory: list[list[float]], of: list[int]) -> list[float]:
        pairs = (zip(query, memory[row], strict=True) for row in of)
        return [sum(a * b for a, b in pair) / temperature for pair in pairs]

    losses = [0.0] * len(rows)
    for queries, memory, is_student in ((s, teachers, True), (t, students, False)):
        every = [scores(q, memory, r) for q, r in zip(queries, rows, strict=True)]
        z = size * sum(math.exp(v) for row in every for v in row) / (len(rows) * len(rows[0]))
        for i, (row, values) in enumerate(zip(rows, every, strict=True)):
            for place, value in enumerate(values):
                ratio = math.exp(value) / z
                h = ratio / (ratio + negatives / size)
                anchor = row[place] if is_student else row[0]
                losses[i] -= weights[anchor] * math.log(h if place == 0 else 1 - h)
    return losses


def drawn_rows(contrast: Any, batch: Any) -> list[list[int]]:
    drawn = contrast.others.draw(batch.labels, NEGATIVES, torch.Generator().manual_seed(0))
    return [[i, *others] for i, others in zip(batch.index.tolist(), drawn.tolist(), strict=True)]


def test_the_memory_estimator_is_crd_with_the_teachers_weights(world: World) -> None:
    """The first step, by loops: memories as they stand, negatives as drawn, Z from this batch."""
    options = {"estimator": "memory", "normaliser": "first-batch", "reweight": "teacher"}
    method = world.method("gacd", **options)
    known_attack(method)
    batch, contrast = world.batch(), method.terms["gacd"].contrast
    memory = contrast.memory
    students, teachers = memory.student_ME.tolist(), memory.teacher_ME.tolist()
    rows = drawn_rows(contrast, batch)
    with torch.no_grad():
        twin = copy.deepcopy(method)
        term = twin.terms["gacd"]
        s = term.student_projection(twin.student.forward_features(attacked(batch))).tolist()
        t = term.anchoring.projection(world.teacher.features(batch.images)).tolist()
    weights = world.bank.weights_M.tolist()
    expected = crd_by_loops(s, t, students, teachers, rows, weights, TEMPERATURE)
    assert total(method, batch).item() == pytest.approx(sum(expected) / len(rows), rel=1e-4)

    moves = (memory.student_ME, students, s), (memory.teacher_ME, teachers, t)
    for memory_ME, old, new in moves:
        moved = 0.5 * torch.tensor(old[3]) + 0.5 * torch.tensor(new[0])
        torch.testing.assert_close(memory_ME[3], moved / moved.norm())
    assert torch.equal(memory.student_ME[1], torch.tensor(students[1]))  # not in the batch


@pytest.mark.parametrize("reweight", ["none", "teacher"])
def test_crd_is_the_loop_on_clean_images_with_cross_entropy(world: World, reweight: str) -> None:
    method, batch = world.method("crd", temperature=0.3, reweight=reweight), world.batch()
    contrast = method.terms["crd"].contrast
    students = contrast.memory.student_ME.tolist()
    teachers = contrast.memory.teacher_ME.tolist()
    rows = drawn_rows(contrast, batch)
    with torch.no_grad():
        twin = copy.deepcopy(method)
        term = twin.terms["crd"]
        features = twin.student.forward_features(batch.images)
        s = term.student_projection(features).tolist()
        logits = twin.student.forward_head(features).tolist()
        t = term.teacher_projection(world.teacher.features(batch.images)).tolist()
    nce = crd_by_loops(s, t, students, teachers, rows, [1.0] * 12, 0.3)
    losses = [
        reference.ce(row, y) + 0.7 * loss
        for row, y, loss in zip(logits, batch.labels.tolist(), nce, strict=True)
    ]
    if reweight == "teacher":
        own = world.bank.weights_M[batch.index].tolist()
        losses = [w * loss for w, loss in zip(own, losses, strict=True)]
    assert total(method, batch).item() == pytest.approx(sum(losses) / 5, rel=1e-4)


def test_the_memory_estimator_asks_for_a_constant_normaliser(world: World) -> None:
    with pytest.raises(UserError, match="normaliser first-batch"):
        world.method("gacd", estimator="memory")


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


@pytest.mark.parametrize("name", ["gacd", "crd"])
def test_the_seed_draws_both_projections_and_each_for_itself(world: World, name: str) -> None:
    """Of networks as wide as each other, which would start alike."""
    drawn = []
    for seed in (0, 1):
        student = network("digits-cnn-3", seed=4)
        made = {"teacher": world.teacher, "bank": world.bank, "seed": seed}
        method = create_method(name, student, ATTACK, **made, options={"crd": {"negatives": 7}})
        weights = (
            p for n, p in method.named_parameters() if n.endswith("projection.linear.weight")
        )
        drawn.append(tuple(weights))
    for pair in (*drawn, *zip(*drawn, strict=True)):
        assert len(pair) == 2 and not torch.equal(*pair)


@pytest.mark.parametrize(
    ("name", "options"),
    [("crd", {"negatives": 7}), ("gacd", {"estimator": "memory", "normaliser": "first-batch"})],
)
def test_the_seed_draws_the_memories(world: World, name: str, options: dict[str, Any]) -> None:
    drawn = []
    for seed in (0, 0, 1):
        student = network("digits-cnn-2", seed=1)
        made = {"teacher": world.teacher, "bank": world.bank, "seed": seed}
        method = create_method(name, student, ATTACK, **made, options={name: options})
        drawn.append(method.terms[name].contrast.memory.student_ME)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])

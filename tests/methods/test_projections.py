"""The projections of student and teacher: live, frozen, and refreshed every n steps."""

import copy

import pytest
import torch
from torch import Tensor

from gacd.anchors import principal_projection
from gacd.errors import UserError
from gacd.losses.contrastive import project_anchors
from gacd.methods import anchoring, create_method
from gacd.methods.awp import AWP
from methods.by_hand import by_hand
from methods.world import (
    ATTACK,
    CLASSES,
    NEGATIVES,
    World,
    known_attack,
    network,
    total,
)


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


def test_bad_projections_are_refused(world: World) -> None:
    with pytest.raises(UserError, match="did you mean 'refreshed'"):
        world.method("gacd", teacher_projection="refresh")
    with pytest.raises(UserError, match="at least 2"):
        world.method("gacd", teacher_projection="refreshed", refresh=1)
    with pytest.raises(UserError, match="components"):
        world.method("gacd", teacher_projection="pca", dim=1000)


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

"""Every method: what trains, what must stay as it is, which attack it is given, what it learns."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gacd.anchors import AnchorBank, Fingerprint
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel
from gacd.attacks.transport import sinkhorn
from gacd.data.batches import iterate
from gacd.data.dataset import ArrayDataset
from gacd.data.load import load_splits
from gacd.errors import UserError
from gacd.methods import METHODS, Step, Teacher, TrainingAttack, create_method
from gacd.methods.base import OBJECTIVES
from gacd.models import create_model
from gacd.models.base import Backbone
from gacd.models.modes import evaluating
from methods.world import (
    ATTACK,
    SETTINGS,
    THREAT,
    World,
    attacked,
    network,
    step_of,
    total,
)


def test_the_table_has_every_method() -> None:
    assert {term for name in SETTINGS for term in name.split("+")} == METHODS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_attack_is_the_papers(world: World, name: str) -> None:
    assert world.method(name).objective == SETTINGS[name].objective


def test_the_teachers_weights_are_probabilities_of_the_true_class(world: World) -> None:
    step = step_of(world.method("kd"), world.batch())
    logits = world.teacher.module(world.batch().images).tolist()
    expected = []
    for row, y in zip(logits, world.batch().labels.tolist(), strict=True):
        expected.append(math.exp(row[y]) / math.fsum(map(math.exp, row)))
    torch.testing.assert_close(step.teacher_weights, torch.tensor(expected))


def test_a_teacher_is_frozen_and_speaks_in_float32() -> None:
    module = network("digits-cnn-3", seed=0).train()
    teacher, x = Teacher(module), torch.rand(4, 1, 8, 8)
    assert not any(part.training for part in module.modules())
    assert not any(p.requires_grad for p in module.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = teacher.features(x)
        said = teacher(x), features, teacher.head(features)
    assert [part.dtype for part in said] == [torch.float32] * 3


@pytest.mark.parametrize("name", SETTINGS)
def test_what_trains(world: World, name: str) -> None:
    method = world.method(name)
    method.hold()
    before = {k: v.clone() for k, v in world.teacher.module.state_dict().items()}
    anchors = (world.bank.features_MD, world.bank.labels_M, world.bank.weights_M)
    bank = [part.clone() for part in anchors]
    trained = {k: p for k, p in method.named_parameters() if p.requires_grad}
    still = {k: p.detach().clone() for k, p in method.named_parameters() if not p.requires_grad}
    old = {k: p.detach().clone() for k, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        total(method, world.batch()).backward()
        optimizer.step()
    row = SETTINGS[name]
    heads = set() if row.trains_head else {"student.head.weight", "student.head.bias"}
    assert still.keys() == heads
    for key, parameter in trained.items():
        assert not torch.equal(parameter, old[key]), key
    for key, value in still.items():
        assert (
            torch.equal(method.get_parameter(key), value) and method.get_parameter(key).grad is None
        )
    assert sum("projection" in key and "weight" in key for key in trained) == row.projections
    for key, value in world.teacher.module.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in world.teacher.module.parameters())
    assert not world.teacher.module.training
    assert all(torch.equal(a, b) for a, b in zip(anchors, bank, strict=True))
    assert not any(part.requires_grad for part in anchors)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_attack_leaves_statistics_modes_and_gradients_alone(world: World, name: str) -> None:
    method, batch = world.method(name), world.batch()
    frozen = method.student.body[1].eval()  # a layer that its owner keeps in evaluation
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    modes = [part.training for part in method.modules()]
    flags = [p.requires_grad for p in method.parameters()]
    before = {k: v.clone() for k, v in method.state_dict().items()}
    x_adv = step_of(method, batch).adv_images
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert modes == [part.training for part in method.modules()]
    assert flags == [p.requires_grad for p in method.parameters()]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in method.parameters())
    if method.objective:
        assert 0 < (x_adv - batch.images).abs().max() <= 0.1 + 1e-6
    total(method, batch)
    passes = SETTINGS[name].passes
    state = method.state_dict()
    assert state["student.body.4.num_batches_tracked"] == passes  # training passes, no attack's
    assert torch.equal(state["student.body.1.running_mean"], before["student.body.1.running_mean"])
    assert not frozen.training


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "default"])
def test_the_objective_of_the_attack_can_be_chosen(world: World, objective: str) -> None:
    """What is chosen is maximised, better than by the attack on any other objective's image."""
    batch = world.batch()
    attack = replace(ATTACK, steps=20, step_size=0.02)
    found = {}
    for name in OBJECTIVES[1:]:
        method = world.method("ard", replace(attack, objective=name))
        assert method.objective == name
        step = step_of(method, batch)
        found[name] = step.adv_images  # and no pass of them was made before they were there
        torch.testing.assert_close(step.teacher_adv_logits, world.teacher(step.adv_images))
    judge = world.method("ard", replace(attack, objective=objective))
    step = Step(batch, judge.student, judge.teacher, torch.Generator(), 1.0)
    with evaluating(judge.student):
        objective_of = judge._objective(step)
        values = {name: objective_of(x).mean().item() for name, x in found.items()}
        assert values[objective] > objective_of(batch.images).mean().item()
    assert values[objective] >= max(values.values()) - 0.02 * abs(values[objective])


def test_every_objective_compares_what_it_says(world: World) -> None:
    """The targets: labels, and what student or teacher, in evaluation mode, say of clean images."""
    method, batch = world.method("ard"), world.batch()
    x, x_adv, y = batch.images, attacked(batch), batch.labels
    student, teacher = copy.deepcopy(method.student).eval(), world.teacher.module
    with torch.no_grad():
        s, s_adv, t, t_adv = (f(z).softmax(1) for f in (student, teacher) for z in (x, x_adv))
        z, z_adv = (student.forward_features(z) for z in (x, x_adv))
        others = student(x_adv).scatter(1, y[:, None], -torch.inf).amax(1)
        expected = {
            "ce": -s_adv.log()[torch.arange(5), y],
            "margin": others - student(x_adv)[torch.arange(5), y],
            "kl": (s * (s / s_adv).log()).sum(1),
            "teacher-kl": (t * (t / s_adv).log()).sum(1),
            "adaptive-kl": (t_adv * (t_adv / s_adv).log()).sum(1),
            "cosine": 1 - nn.functional.cosine_similarity(z_adv, z),
        }
        cost = 1 - nn.functional.normalize(z_adv) @ nn.functional.normalize(z).T
        expected["transport"] = 5 * (sinkhorn(cost) * cost).sum(1)
        for name in OBJECTIVES[1:]:
            other = world.method("ard", replace(ATTACK, objective=name))
            step = Step(batch, other.student, other.teacher, torch.Generator(), 1.0)
            with evaluating(other.student):
                found = other._objective(step)(x_adv)
            torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-5)


def test_the_attack_is_pgd_on_the_student_in_evaluation_mode(world: World) -> None:
    method, batch = world.method("pgd-at"), world.batch()

    def ce(x: Tensor) -> Tensor:
        logits = method.student(x)
        return logits.logsumexp(1) - logits.gather(1, batch.labels[:, None])[:, 0]

    with evaluating(method.student):
        expected = pgd(
            ce, batch.images, THREAT, steps=2, step_size=0.05,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    found = step_of(method, batch).adv_images
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["regression", "crd", "gacd"])
def test_autocast_ends_at_the_features(world: World, name: str) -> None:
    method = world.method(name)
    twin, step = copy.deepcopy(method.terms[name]), step_of(method, world.batch())
    state = step.generator.get_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = method.terms[name](step)
    step.generator.set_state(state)
    torch.testing.assert_close(found, twin(step), rtol=0, atol=0)


def test_the_seed_draws_the_projection_of_regression(world: World) -> None:
    drawn = []
    for seed in (0, 0, 1):
        student = network("digits-cnn-2", seed=1)
        method = create_method("regression", student, ATTACK, teacher=world.teacher, seed=seed)
        drawn.append(method.terms["regression"].projection.weight)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_budget_of_nothing_is_natural_training(world: World) -> None:
    nothing = TrainingAttack(threat=ThreatModel(eps=0.0), steps=2, step_size=0.05)
    loss = total(world.method("pgd-at", attack=nothing), world.batch())
    natural = total(world.method("natural"), world.batch())
    assert loss.item() == pytest.approx(natural.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: w.method("gacd", estimator="exat"), "estimator 'exat': did you mean 'exact'"),
        (lambda w: w.method("gacd", positive="views"), "positive 'views': did you mean 'view'"),
        (lambda w: w.method("gacd", normaliser="exat"), "did you mean 'exact'"),
        (
            lambda w: w.method("kd", temprature=2.0),
            "setting of kd 'temprature': did you mean 'temp",
        ),
        (
            lambda w: TrainingAttack(threat=THREAT, steps=1, step_size=1.0, objective="cosin"),
            "attack objective 'cosin': did you mean 'cosine'",
        ),
    ],
)
def test_unknown_choices_are_refused(
    world: World, make: Callable[[World], object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(world)


@pytest.fixture(scope="module")
def digits() -> World:
    """160 digits, and a teacher that has learned them a little."""
    data = load_splits("digits", seed=0).train.subset(torch.arange(160))
    teacher = learner(data, seed=5)
    optimizer = torch.optim.SGD(teacher.parameters(), 0.1, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(data.float_images()), data.labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    bank = AnchorBank.build(
        teacher,
        iterate(data, 160, shuffle=False, seed=0, epoch=0, drop_last=False),
        size=160,
        fingerprint=Fingerprint("teacher", "data", "none"),
        show_progress=False,
    )
    return World(data, Teacher(teacher), bank)


def learner(data: ArrayDataset, *, seed: int) -> Backbone:
    mean, std = data.mean_std()
    return create_model(
        "digits-cnn-4", num_classes=10, channels=1, mean=mean, std=std, seed=seed
    ).train()


@pytest.mark.parametrize("name", SETTINGS)
def test_five_steps_lower_the_loss_on_the_digits(digits: World, name: str) -> None:
    method = digits.method(name, student=learner(digits.data, seed=1))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05)
    batch = digits.batch(tuple(range(160)))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = total(method, batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[5] < 0.98 * losses[0], losses


def test_the_attack_runs_on_the_folded_network(world: World) -> None:
    method, batch = world.method("pgd-at"), world.batch()
    step_of(method, batch)  # finds what follows what
    calls: list[int] = []
    for part in method.student.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.register_forward_hook(lambda *_: calls.append(1))
    step_of(method, batch)
    assert not calls

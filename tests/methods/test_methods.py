"""Every method: its loss against the papers' formulas, what trains, and what must stay as it is."""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from gacd.anchors import AnchorBank, Fingerprint
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel
from gacd.data.batches import iterate
from gacd.data.dataset import ArrayDataset
from gacd.data.load import load_splits
from gacd.errors import UserError
from gacd.methods import METHODS, Method, Teacher, TrainingAttack
from gacd.methods.base import OBJECTIVES, check_same_classes, teacher_weights
from gacd.models import create_model
from gacd.models.base import Backbone
from gacd.models.modes import evaluating
from gacd.shapes import Batch
from reference import soft_labels as reference
from reference.gacd_eq9 import eq9

CLASSES, TEMPERATURE, NEGATIVES = 3, 0.5, 7
THREAT = ThreatModel(eps=0.1)
ATTACK = TrainingAttack(threat=THREAT, steps=2, step_size=0.05)

# Each method, with settings that are not its defaults, and the objective that its attack maximises.
SETTINGS: dict[str, tuple[dict[str, Any], str | None]] = {
    "natural": ({}, None),
    "pgd-at": ({}, "ce"),
    "trades": ({"beta": 3.0}, "kl"),
    "kd": ({"temperature": 3.0, "alpha": 0.6}, None),
    "ard": ({"temperature": 5.0, "alpha": 0.7}, "ce"),
    "gacd": ({"temperature": TEMPERATURE, "negatives": NEGATIVES, "dim": 6}, "transport"),
}
DISTILLED = ("kd", "ard", "gacd")


class World(NamedTuple):
    """A data set of random images, and a frozen teacher with the bank of its features."""

    data: ArrayDataset
    teacher: Teacher
    bank: AnchorBank

    def batch(self, rows: tuple[int, ...] = (3, 0, 11, 7, 5)) -> Batch:
        index = torch.tensor(rows)
        return Batch(self.data.float_images(index), self.data.labels[index], index)

    def method(self, name: str, attack: TrainingAttack = ATTACK, **options: Any) -> Method:
        options = {**SETTINGS[name][0], **options}
        if name in DISTILLED:
            options["teacher"] = self.teacher
        if name == "gacd":
            options["bank"] = self.bank
        return METHODS[name](network("digits-cnn-2", seed=1), attack, **options).train()


def network(name: str, *, seed: int, classes: int = CLASSES) -> Backbone:
    return create_model(name, num_classes=classes, channels=1, seed=seed)


@pytest.fixture
def world(generator: torch.Generator) -> World:
    images = torch.randint(256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = ArrayDataset(images, torch.arange(12) % CLASSES, ("a", "b", "c"), "noise")
    teacher = Teacher(network("digits-cnn-3", seed=2))
    with torch.no_grad():  # BatchNorm statistics that differ from those of any batch
        teacher.module.train()
        teacher.module(data.float_images())
        teacher.module.get_classifier().weight.mul_(40)
        teacher.module.eval()
    bank = AnchorBank.build(
        teacher.module,
        iterate(data, 12, shuffle=False, seed=0, epoch=0, drop_last=False),
        size=12,
        fingerprint=Fingerprint("teacher", "data", "none"),
        dtype="float32",
        show_progress=False,
    )
    return World(data, teacher, bank)


def known_attack(method: Method) -> list[str]:
    """Replace the attack by one whose result is known; returns the objectives it is asked for."""
    asked: list[str] = []

    def attacked(batch: Batch, generator: torch.Generator, *, default: str, **_: Any) -> Tensor:
        asked.append(default)
        return (batch.images + 0.1 * (-1) ** batch.index[:, None, None, None]).clamp(0, 1)

    method.adversarial = attacked  # type: ignore[method-assign]
    return asked


def step(method: Method, batch: Batch, seed: int = 0) -> Tensor:
    return method(batch, torch.Generator().manual_seed(seed)).total


def expected_losses(
    name: str, method: Method, batch: Batch, x_adv: Tensor, teacher: Teacher
) -> list[float]:
    """The papers' loss of each image, unweighted."""
    student = copy.deepcopy(method.student).train().double()
    with torch.no_grad():
        s, s_adv = student(batch.images.double()).tolist(), student(x_adv.double()).tolist()
        t = teacher.module(batch.images).tolist()
    losses = []
    for i, y in enumerate(batch.labels.tolist()):
        match name:
            case "natural":
                losses.append(reference.ce(s[i], y))
            case "pgd-at":
                losses.append(reference.ce(s_adv[i], y))
            case "trades":
                losses.append(reference.trades(s[i], s_adv[i], y, beta=3.0))
            case "kd":
                losses.append(reference.kd(s[i], t[i], y, temperature=3.0, alpha=0.6))
            case "ard":
                losses.append(reference.ard(s_adv[i], t[i], s[i], y, temperature=5.0, alpha=0.7))
    return losses


@pytest.mark.parametrize(
    ("name", "reweight"),
    [
        *((name, None) for name in ("natural", "pgd-at", "trades")),
        *((name, reweight) for name in ("kd", "ard") for reweight in ("none", "teacher")),
    ],
)
def test_the_loss_is_the_papers(
    world: World, name: str, reweight: str | None, generator: torch.Generator
) -> None:
    options = {} if reweight is None else {"reweight": reweight}
    method, batch = world.method(name, **options), world.batch()
    asked = known_attack(method)
    x_adv = method.adversarial(batch, generator, default="")
    losses = expected_losses(name, method, batch, x_adv, world.teacher)
    if reweight == "teacher":  # Algorithm 1: each image times the softmax of its true class
        logits = world.teacher.module(batch.images).tolist()
        weights = [
            reference.softmax(row)[y] for row, y in zip(logits, batch.labels.tolist(), strict=True)
        ]
        assert max(weights) - min(weights) > 0.1
        losses = [w * loss for w, loss in zip(weights, losses, strict=True)]
    assert step(method, batch).item() == pytest.approx(math.fsum(losses) / 5, rel=1e-4)
    assert (asked[1:] or [None]) == [SETTINGS[name][1]]


def embed(linear: nn.Linear, features: Tensor) -> Tensor:
    rows = features.double() @ linear.weight.double().T + linear.bias.double()
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("reweight", ["teacher", "none"])
@pytest.mark.parametrize("positive", ["bank", "view"])
def test_gacd_is_the_loop_over_eq_9(
    world: World, positive: str, reweight: str, generator: torch.Generator
) -> None:
    method, batch = world.method("gacd", positive=positive, reweight=reweight), world.batch()
    # as if augmented: the view is not the stored image
    batch = batch._replace(images=batch.images.flip(3).contiguous())
    asked = known_attack(method)
    x_adv = method.adversarial(batch, generator, default="")
    with torch.no_grad():
        student = copy.deepcopy(method.student).train()
        own = method.student_projection.linear
        other = method.teacher_projection.linear
        s = embed(own, student.forward_features(x_adv))
        stored = world.teacher.module.forward_features(world.data.float_images())
        anchors = embed(other, stored)
        view = embed(other, world.teacher.module.forward_features(batch.images))
        positives = anchors[batch.index] if positive == "bank" else view
        weights = torch.ones(12)
        if reweight == "teacher":
            logits = world.teacher.module(world.data.float_images())
            weights = logits.softmax(1)[torch.arange(12), world.data.labels]
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
    assert asked[1:] == ["transport"]
    nce = [z - float(p @ q) / TEMPERATURE for z, p, q in zip(log_z, positives, s, strict=True)]
    assert parts["mi"].item() == pytest.approx(math.log(12) - math.fsum(nce) / 5, rel=1e-4)
    assert parts["mi_ceiling"].item() == pytest.approx(math.log(12))


def test_the_memory_estimator_is_crd_with_the_teachers_weights(world: World) -> None:
    """The first step, by loops: memories as they stand, negatives as drawn, Z from this batch."""
    options = {"estimator": "memory", "normaliser": "first-batch", "reweight": "teacher"}
    method = world.method("gacd", **options)
    known_attack(method)
    batch = world.batch()
    students, teachers = method.memory.student_ME.tolist(), method.memory.teacher_ME.tolist()
    drawn = method.others.draw(batch.labels, NEGATIVES, torch.Generator().manual_seed(0)).tolist()
    x_adv = (batch.images + 0.1 * (-1) ** batch.index[:, None, None, None]).clamp(0, 1)
    with torch.no_grad():
        twin = copy.deepcopy(method)
        s = twin.student_projection(twin.student.forward_features(x_adv)).tolist()
        t = twin.teacher_projection(world.teacher.features(batch.images)).tolist()
    weights, size = world.bank.weights_M.tolist(), len(world.bank)

    def scores(query: list[float], memory: list[list[float]], rows: list[int]) -> list[float]:
        pairs = (zip(query, memory[row], strict=True) for row in rows)
        return [sum(a * b for a, b in pair) / TEMPERATURE for pair in pairs]

    rows = [[i, *others] for i, others in zip(batch.index.tolist(), drawn, strict=True)]
    expected = 0.0
    for queries, memory, is_student in ((s, teachers, True), (t, students, False)):
        every = [scores(q, memory, r) for q, r in zip(queries, rows, strict=True)]
        z = size * sum(math.exp(v) for row in every for v in row) / (len(rows) * len(rows[0]))
        for row, values in zip(rows, every, strict=True):
            for place, value in enumerate(values):
                ratio = math.exp(value) / z
                h = ratio / (ratio + NEGATIVES / size)
                anchor = row[place] if is_student else row[0]
                expected -= weights[anchor] * math.log(h if place == 0 else 1 - h)
    assert step(method, batch).item() == pytest.approx(expected / len(rows), rel=1e-4)

    moved = 0.5 * torch.tensor(students[3]) + 0.5 * torch.tensor(s[0])
    torch.testing.assert_close(method.memory.student_ME[3], moved / moved.norm())
    assert torch.equal(method.memory.student_ME[1], torch.tensor(students[1]))  # not in the batch


def test_the_memory_estimator_asks_for_a_constant_normaliser(world: World) -> None:
    with pytest.raises(UserError, match="normaliser first-batch"):
        world.method("gacd", estimator="memory")


def test_teacher_weights_are_probabilities_of_the_true_class() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    weights = teacher_weights(logits, torch.tensor([1, 2]), "teacher")
    expected = [1 / (math.exp(2) + 1 + math.exp(-1)), 1 / 3]
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert teacher_weights(logits, torch.tensor([1, 2]), "none") is None


@pytest.mark.parametrize("name", METHODS)
def test_what_trains(world: World, name: str) -> None:
    method = world.method(name)
    before = {k: v.clone() for k, v in world.teacher.module.state_dict().items()}
    anchors = (world.bank.features_MD, world.bank.labels_M, world.bank.weights_M)
    bank = [part.clone() for part in anchors]
    trained = {k: p for k, p in method.named_parameters() if p.requires_grad}
    still = {k: p.detach().clone() for k, p in method.named_parameters() if not p.requires_grad}
    old = {k: p.detach().clone() for k, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        step(method, world.batch()).backward()
        optimizer.step()
    heads = {"student.head.weight", "student.head.bias"} if name == "gacd" else set()
    assert still.keys() == heads
    for key, parameter in trained.items():
        assert not torch.equal(parameter, old[key]), key
    for key, value in still.items():
        assert (
            torch.equal(method.get_parameter(key), value) and method.get_parameter(key).grad is None
        )
    assert (name == "gacd") == ("teacher_projection.linear.weight" in trained)
    for key, value in world.teacher.module.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in world.teacher.module.parameters())
    assert not world.teacher.module.training
    assert all(torch.equal(a, b) for a, b in zip(anchors, bank, strict=True))
    assert not any(part.requires_grad for part in anchors)


@pytest.mark.parametrize("name", METHODS)
def test_the_attack_leaves_statistics_modes_and_gradients_alone(world: World, name: str) -> None:
    method, batch = world.method(name), world.batch()
    frozen = method.student.body[1].eval()  # a layer that its owner keeps in evaluation
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    modes = [part.training for part in method.modules()]
    flags = [p.requires_grad for p in method.parameters()]
    before = {k: v.clone() for k, v in method.state_dict().items()}
    x_adv = method.adversarial(batch, torch.Generator().manual_seed(0), default="ce")
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert modes == [part.training for part in method.modules()]
    assert flags == [p.requires_grad for p in method.parameters()]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in method.parameters())
    assert 0 < (x_adv - batch.images).abs().max() <= 0.1 + 1e-6
    step(method, batch)
    passes = {"natural": 1, "kd": 1, "pgd-at": 1, "gacd": 1, "ard": 2, "trades": 2}[name]
    state = method.state_dict()
    assert state["student.body.4.num_batches_tracked"] == passes  # training passes, no attack's
    assert torch.equal(state["student.body.1.running_mean"], before["student.body.1.running_mean"])
    assert not frozen.training


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "default"])
def test_the_objective_of_the_attack_can_be_chosen(world: World, objective: str) -> None:
    method, batch = world.method("pgd-at"), world.batch()
    chosen = TrainingAttack(threat=THREAT, steps=2, step_size=0.05, objective=objective)
    other = world.method("pgd-at", attack=chosen)

    def attacked(of: Method, default: str) -> Tensor:
        return of.adversarial(batch, torch.Generator().manual_seed(3), default=default)

    found = attacked(other, "ce" if objective != "ce" else "kl")
    assert torch.equal(found, attacked(method, objective))
    different = attacked(method, "cosine" if objective != "cosine" else "ce")
    assert not torch.equal(found, different)


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
    found = method.adversarial(batch, torch.Generator().manual_seed(0), default="ce")
    torch.testing.assert_close(found, expected)


def test_a_budget_of_nothing_is_natural_training(world: World) -> None:
    nothing = TrainingAttack(threat=ThreatModel(eps=0.0), steps=2, step_size=0.05)
    loss = step(world.method("pgd-at", attack=nothing), world.batch())
    natural = step(world.method("natural"), world.batch())
    assert loss.item() == pytest.approx(natural.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["ce", "margin", "kl"])
def test_gacd_refuses_attacks_on_a_head_that_it_does_not_train(world: World, name: str) -> None:
    attack = TrainingAttack(threat=THREAT, steps=2, step_size=0.05, objective=name)
    with pytest.raises(UserError, match=f"'{name}'.*use transport or cosine"):
        world.method("gacd", attack=attack)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: w.method("gacd", estimator="exat"), "estimator 'exat': did you mean 'exact'"),
        (lambda w: w.method("gacd", positive="views"), "positive 'views': did you mean 'view'"),
        (lambda w: w.method("gacd", normaliser="exat"), "did you mean 'exact'"),
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


def test_a_teacher_of_other_classes_is_refused() -> None:
    student = network("digits-cnn-2", seed=0)
    check_same_classes(student, network("digits-cnn-3", seed=0))
    with pytest.raises(UserError, match="teacher has 4 classes and 1 channels, the data 3 and 1"):
        check_same_classes(student, network("digits-cnn-3", seed=0, classes=4))
    colour = create_model("digits-cnn-2", num_classes=CLASSES, channels=3, seed=0)
    with pytest.raises(UserError, match="teacher has 3 classes and 3 channels, the data 3 and 1"):
        check_same_classes(student, colour)


def test_a_deep_copy_shares_teacher_and_bank_and_nothing_else(world: World) -> None:
    method = world.method("gacd")
    twin = copy.deepcopy(method)
    assert twin.teacher is method.teacher and twin.bank is method.bank
    assert not {p.data_ptr() for p in method.parameters()} & {
        p.data_ptr() for p in twin.parameters()
    }
    assert step(twin, world.batch()).item() == step(method, world.batch()).item()


def test_a_sample_of_the_bank_gives_the_loss_in_the_mean(world: World) -> None:
    """With a fixed Z (`none`), drawn anchors change the variance of the loss and not its mean."""
    batch = world.batch()

    def losses(draws: int, **options: Any) -> Tensor:
        method = world.method("gacd", normaliser="none", **options)
        known_attack(method)
        with torch.no_grad():
            return torch.stack([step(method, batch, seed) for seed in range(draws)])

    exact, sampled = losses(1, estimator="exact"), losses(150, estimator="sampled")
    error = sampled.std() / 150**0.5
    assert 0 < error < 0.05 * exact[0]
    assert abs(sampled.mean() - exact[0]) < 4 * error


def test_the_class_of_the_nearest_embedding_is_what_gacd_predicts(world: World) -> None:
    method = world.method("gacd").eval()
    images = world.data.float_images()
    with torch.no_grad():
        anchors = embed(
            method.teacher_projection.linear, world.teacher.module.forward_features(images)
        )
        centres = torch.stack([anchors[world.data.labels == c].sum(0) for c in range(CLASSES)])
        own = embed(method.student_projection.linear, method.student.forward_features(images))
        expected = own @ (centres / centres.norm(dim=1, keepdim=True)).T / TEMPERATURE
        torch.testing.assert_close(
            method.predictor(images).double(), expected, rtol=1e-3, atol=1e-3
        )
    leaf = images.requires_grad_()
    (grad,) = torch.autograd.grad(method.predictor(leaf).sum(), leaf)
    assert grad.abs().sum() > 0


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


@pytest.mark.parametrize("name", METHODS)
def test_five_steps_lower_the_loss_on_the_digits(digits: World, name: str) -> None:
    options: dict[str, Any] = {"teacher": digits.teacher} if name in DISTILLED else {}
    if name == "gacd":
        options |= {"bank": digits.bank, "negatives": 64}
    method = METHODS[name](learner(digits.data, seed=1), ATTACK, **options).train()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05)
    batch = digits.batch(tuple(range(160)))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = step(method, batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[5] < 0.98 * losses[0], losses

"""The package used from Python: what does not fit together is said in one line, at the door."""

import copy
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from gacd.anchors import AnchorBank, Fingerprint
from gacd.attacks.objectives import kl
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel
from gacd.data.batches import iterate
from gacd.data.dataset import ArrayDataset, Splits
from gacd.data.load import load_splits
from gacd.errors import UserError
from gacd.evaluation.autoattack import autoattack
from gacd.evaluation.robust import evaluate
from gacd.linear import fit_head
from gacd.losses.contrastive import gacd_loss
from gacd.losses.soft_labels import soft_kl
from gacd.methods import METHODS, Teacher, Term, TrainingAttack, create_method, register_method
from gacd.models import create_model
from gacd.models.adapted import Adapted
from gacd.models.base import Backbone
from gacd.models.checkpoints import save_model
from gacd.training import loop
from gacd.training.loop import Plan, fit

THREAT = ThreatModel(eps=0.1)
ATTACK = TrainingAttack(threat=THREAT, steps=1, step_size=0.1)
PLAN = Plan(epochs=1, batch_size=40, lr=0.1)


class Mine(nn.Module):
    def __init__(self, after: Any = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        self.head = nn.Linear(16, 10)
        self.after = after

    def forward(self, x: Tensor) -> Any:
        logits = self.head(self.body(x))
        return logits if self.after is None else self.after(logits)


@pytest.fixture(scope="module")
def digits() -> Splits:
    return load_splits("digits", train_limit=80, test_limit=20, seed=0)


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def network(
    seed: int = 0, classes: int = 10, channels: int = 1, of: str = "digits-cnn-2"
) -> Backbone:
    return create_model(of, num_classes=classes, channels=channels, seed=seed)


def bank(of: ArrayDataset, teacher: Backbone | None = None, **changes: Any) -> AnchorBank:
    batches = iterate(of, 40, shuffle=False, seed=0, epoch=0, drop_last=False)
    plain = {"size": len(of), "fingerprint": Fingerprint("t", "d", "p"), "show_progress": False}
    return AnchorBank.build(teacher or network(), batches, **{**plain, **changes})


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda z: z.softmax(1), "nothing may follow that layer"),
        (lambda z: (z, z), "must give logits of shape"),
    ],
)
def test_a_network_that_is_not_what_it_is_taken_for_is_not_measured(digits, after, message):
    with pytest.raises(UserError, match=message):
        evaluate(
            Adapted(Mine(after), "head", channels=1), digits.test, attacks=[], threat=THREAT,
            show_progress=False,
        )  # fmt: skip
    with pytest.raises(UserError, match=message):
        bank(digits.train, Adapted(Mine(after), "head", channels=1))


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"mean": (0.5,)}, "both mean and std"),
        ({"std": (0.5,)}, "both mean and std"),
        ({"mean": (0.5,), "std": (0.0,)}, "must be above 0"),
        ({"mean": (0.5,), "std": (float("nan"),)}, "must be above 0"),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "a number for each channel: 1"),
        ({"mean": (125.3,), "std": (63.0,)}, "divide those of 0 to 255 by 255"),
        ({"mean": (float("nan"),), "std": (0.5,)}, "must be of images in"),
    ],
)
def test_statistics_that_do_not_normalise_are_refused(statistics, message):
    with pytest.raises(UserError, match=message):
        Adapted(Mine(), "head", channels=1, **statistics)


def interrupted_after_one_epoch(validate: Any) -> Any:
    epochs = itertools.count()

    def called(*args: Any, **more: Any) -> Any:
        if next(epochs):
            raise KeyboardInterrupt
        return validate(*args, **more)

    return called


def test_another_training_is_not_taken_for_this_one(digits, fabric, tmp_path, monkeypatch):
    def run(method: str, folder: str, plan: Plan = PLAN, attack: TrainingAttack = ATTACK) -> None:
        built = create_method(method, network(), attack, teacher=Teacher(network(1)))
        fit(fabric, built, digits, plan, out=str(tmp_path / folder), name="test")

    run("pgd-at", "a")
    run("pgd-at", "a")  # done, and the same
    for method, plan, attack, said in (
        ("ard", PLAN, ATTACK, "method is pgd-at there and ard here"),
        ("pgd-at", replace(PLAN, epochs=2), ATTACK, "epochs is 1 there and 2 here"),
        ("pgd-at", PLAN, replace(ATTACK, steps=2), "attack steps is 1 there and 2 here"),
    ):
        with pytest.raises(UserError, match=said):
            run(method, "a", plan, attack)

    longer = replace(PLAN, epochs=3)
    monkeypatch.setattr(loop, "validate", interrupted_after_one_epoch(loop.validate))
    with pytest.raises(KeyboardInterrupt):
        run("pgd-at", "b", longer)
    assert (tmp_path / "b" / "checkpoint.safetensors").is_file()
    with pytest.raises(UserError, match="method is pgd-at there and ard here"):
        run("ard", "b", longer)
    (tmp_path / "b" / "checkpoint.safetensors").write_text("cut short")
    with pytest.raises(UserError, match="delete it and run the same command again"):
        run("pgd-at", "b", longer)


def test_a_head_that_features_left_alone_trains_afterwards(digits, fabric, tmp_path):
    student = network()
    teacher = Teacher(network(1))
    built = create_method(
        "gacd", student, ATTACK, teacher=teacher, bank=bank(digits.train, teacher.module)
    )
    for _ in range(2):  # trained, then found done
        fit(fabric, built, digits, PLAN, out=tmp_path / "gacd", name="test")
        assert student.get_classifier().weight.requires_grad
    before = student.get_classifier().weight.detach().clone()
    tuned = create_method("pgd-at", student, ATTACK)
    fit(fabric, tuned, digits, PLAN, out=tmp_path / "aft", name="test")
    assert not torch.equal(student.get_classifier().weight, before)


def test_a_head_that_its_owner_froze_stays_so(digits, fabric, tmp_path):
    student = network()
    student.get_classifier().requires_grad_(False)
    teacher = Teacher(network(1))
    built = create_method(
        "gacd", student, ATTACK, teacher=teacher, bank=bank(digits.train, teacher.module)
    )
    fit(fabric, built, digits, PLAN, out=tmp_path, name="test")
    assert not student.get_classifier().weight.requires_grad


def other_labels(data: ArrayDataset) -> ArrayDataset:
    return ArrayDataset(data.images, data.labels.roll(1), data.classes, data.name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: {"student": network(classes=7)}, "the student has 7 classes and 1 channels"),
        (lambda d: {"student": network(channels=3)}, "the student has 10 classes and 3 channels"),
        (lambda d: {"teacher": Teacher(network(classes=7))}, "the teacher has 7 classes"),
        (lambda d: {"bank": bank(other_labels(d.train))}, "labels are not those of the training"),
        (lambda d: {"bank": bank(d.train.subset(torch.arange(79)))}, "79 rows, but there are 80"),
        (
            lambda d: {"teacher": Teacher(network(of="digits-cnn-3"))},
            "the anchor bank's features are",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_does_not_train(digits, fabric, tmp_path, make, message):
    parts = {"student": network(), "teacher": Teacher(network(1)), "bank": None} | make(digits)
    anchors = parts["bank"] or bank(digits.train)
    built = create_method("gacd", parts["student"], ATTACK, teacher=parts["teacher"], bank=anchors)
    with pytest.raises(UserError, match=message):
        fit(fabric, built, digits, PLAN, out=tmp_path / "x", name="test")
    assert not (tmp_path / "x").exists()


def test_a_student_that_is_the_frozen_teacher_is_refused(digits, fabric, tmp_path):
    teacher = Teacher(network())
    built = create_method("ard", copy.deepcopy(teacher.module), ATTACK, teacher=teacher)
    with pytest.raises(UserError, match="no parameter of the student takes a gradient"):
        fit(fabric, built, digits, PLAN, out=tmp_path, name="test")


class Scalar(Term):
    def __init__(self, given: Any, *, beta: float) -> None:
        super().__init__(given)

    def losses(self, step: Any) -> Tensor:
        return step.student_logits.sum(1)


class Misspelt(Term):
    objective = "teacher_kl"

    def losses(self, step: Any) -> Tensor:
        return step.student_logits.sum(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: create_method(
                "rslad", network(), ATTACK, teacher=Teacher(network()), options={"rlsad": {}}
            ),
            "did you mean 'rslad'",
        ),
        (lambda: create_method("gacd+aft", network(), ATTACK), "several stages"),
        (lambda: register_method("mine", Misspelt), "did you mean 'teacher-kl'"),
        (lambda: register_method("mine", Scalar), "give the setting beta a default"),
        (lambda: Adapted(Adapted(Mine(), "head"), "head"), "Adapted already"),
        (lambda: Plan(epochs=0, batch_size=4, lr=0.1), "at least 1"),
        (lambda: Plan(epochs=1, batch_size=4, lr=0.1, ema=1.0), "ema in"),
        (lambda: load_splits("folder", root="nowhere", seed=0), "nowhere"),
    ],
)
def test_a_call_that_cannot_be_meant_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
    assert "mine" not in METHODS


OF_OTHER_TYPES = {
    "create_method('pgd-at', nn.Linear(2, 2), attack)": "wrap it in gacd.models.adapted.Adapted",
    "create_method('ard', net, attack, teacher=net)": "Teacher(network)",
    "Teacher(nn.Linear(2, 2))": "wrap it in gacd.models.adapted.Adapted",
    "Teacher(nn.DataParallel(net))": "give the network inside this DataParallel: its .module",
    "evaluate(net, None, attacks=[], threat=ThreatModel(eps=0.1))": "such as splits.test",
    "transfer(nn.Linear(2, 2), None, None)": "wrap it in gacd.models.adapted.Adapted",
    "fit_head(nn.Linear(2, 2), None, None)": "wrap it in gacd.models.adapted.Adapted",
    "load_weights(nn.Linear(2, 2), 'x.pt')": "wrap it in gacd.models.adapted.Adapted",
    "register_method('mine', nn.Linear)": "a class derived from gacd.methods.Term",
    "create_model('resnet18', num_classes=2, mean=(0.5,) * 3, std=(0.5,) * 3, seed=0)"
    "(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))": "images must be floating-point [B, 3",
    "gacd_loss(z, z, z[None], labels_B=i, anchor_labels_M=i)": "must be [B, E]",
    "gacd_loss(z, z, z[:0], labels_B=i, anchor_labels_M=i[:0])": "there are no anchors",
    "rslad(z, z, z[:1])": "logits are [4, 10], but those of the teacher [1, 10]",
    "rslad(z, z, z[:, :1])": "logits are [4, 10], but those of the teacher [4, 1]",
    "pgd(lambda x: x.sum(1), torch.rand(2, 16), ThreatModel(eps=0.1), steps=1, step_size=0.1)": (
        "must be [B, C, H, W], not [2, 16]"
    ),
    "create_model(18, num_classes=2, seed=0)": "unknown model '18'",
    "create_model('resnet18', num_classes=2, mean=0.5, std=0.5, seed=0)": "mean",
    "Adapted(nn.Sequential(nn.Linear(2, 2)), '0', mean=0.5, std=0.5)": "for each channel",
    "ThreatModel(norm=2, eps=0.1)": "unknown norm '2'",
    "pgd(lambda x: x.sum((1, 2, 3)), torch.rand(2, 1, 4, 4), ThreatModel(eps=0.1), steps=1, "
    "step_size=0.1, random_start=False, is_broken=lambda x: x)": "must be a gacd.attacks",
    "ArrayDataset(np.zeros((2, 1, 8, 8), np.uint8), torch.zeros(2), ('a',), 'mine')": (
        "must be tensors, not ndarray"
    ),
    "AnchorBank.build(net, [(z, z)], size=4, fingerprint=Fingerprint('t', 'd', 'p'))": (
        "have 3 parts, not 2: images, labels and the row of each image"
    ),
}
SCRIPT = """
import json, sys
import numpy as np
import torch
from torch import nn
from gacd.anchors import AnchorBank, Fingerprint
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel
from gacd.data.dataset import ArrayDataset
from gacd.errors import UserError
from gacd.evaluation.robust import evaluate
from gacd.evaluation.transfer import transfer
from gacd.linear import fit_head
from gacd.losses.contrastive import gacd_loss
from gacd.losses.soft_labels import rslad
from gacd.methods import Teacher, TrainingAttack, create_method, register_method
from gacd.models import create_model
from gacd.models.adapted import Adapted
from gacd.models.checkpoints import load_weights
net = create_model("digits-cnn-2", num_classes=10, channels=1, seed=0)
z, i = torch.randn(4, 10), torch.arange(4)
attack = TrainingAttack(threat=ThreatModel(eps=0.1), steps=1, step_size=0.1)
said = {}
for call in json.loads(sys.argv[1]):
    try:
        said[call] = repr(eval(call))
    except UserError as error:
        said[call] = str(error)
print(json.dumps(said))
"""


def test_arguments_of_other_types_are_refused_in_a_line():
    """In a process that does not check types as these tests do."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(list(OF_OTHER_TYPES))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    said = json.loads(done.stdout)
    assert [call for call, part in OF_OTHER_TYPES.items() if part not in said[call]] == []


def test_a_layer_for_other_classes_is_not_fitted(digits):
    with pytest.raises(UserError, match="the last layer has 7 classes"):
        fit_head(network(classes=7), digits, None)
    with pytest.raises(UserError, match="at least one strength"):
        fit_head(network(), digits, None, [])


def test_autoattack_needs_the_models_own_number_of_classes(digits):
    with pytest.raises(UserError, match="not num_classes=3"):
        autoattack(
            network(), digits.test.float_images(), digits.test.labels, num_classes=3,
            threat=THREAT, show_progress=False,
        )  # fmt: skip


def test_a_network_without_finite_logits_is_right_about_nothing_under_autoattack(digits):
    broken = Adapted(Mine(), "head", channels=1)
    torch.nn.init.constant_(broken.get_classifier().weight, torch.nan)
    labels = torch.zeros(len(digits.test), dtype=torch.int64)  # what argmax makes of NaN
    found = autoattack(
        broken, digits.test.float_images(), labels, num_classes=10, threat=THREAT,
        show_progress=False,
    )  # fmt: skip
    assert not found.robust.any()


def test_an_attack_refuses_what_it_cannot_climb(digits):
    x = digits.test.float_images()
    model, generator = network(), torch.Generator()
    how = {"steps": 1, "step_size": 0.1, "generator": generator}
    with pytest.raises(UserError, match="must be probabilities"):
        kl(model, model(x))
    with pytest.raises(UserError, match="has no gradient"):
        pgd(lambda v: torch.zeros(len(v)), x, THREAT, **how)


def test_a_temperature_that_is_no_number_is_refused():
    logits = torch.randn(12, 10)
    with pytest.raises(UserError, match="temperature must be above 0"):
        soft_kl(logits, logits, temperature=float("nan"))


def test_rows_of_anchors_mean_nothing_without_those_of_the_images():
    z = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    with pytest.raises(UserError, match="give index_B, too"):
        gacd_loss(
            z, z, z, labels_B=torch.arange(4), anchor_labels_M=torch.arange(4),
            anchor_index_M=torch.arange(4),
        )  # fmt: skip


def test_a_bank_of_another_size_is_refused(digits):
    with pytest.raises(UserError, match="size 70 has no row 79"):
        bank(digits.train, size=70)


def test_a_teacher_that_keeps_a_tensor_of_its_first_pass_can_be_attacked_through(digits):
    class Remembers(Mine):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "scale"):
                self.scale = torch.ones(()).expand(10) * 1.0
            return self.head(self.body(x) * self.scale[0])

    teacher = Adapted(Remembers(), "head", channels=1)
    bank(digits.train, teacher)
    x = digits.test.float_images().requires_grad_()
    teacher(x).sum().backward()
    assert x.grad is not None


def test_meta_that_is_no_json_is_refused_and_nothing_is_written(tmp_path):
    meta = {"architecture": "digits-cnn-2", "made": tmp_path}
    with pytest.raises(UserError, match=r"meta must be such as JSON can hold .*PosixPath"):
        save_model(tmp_path / "model.safetensors", network(), meta)
    assert not list(tmp_path.iterdir())

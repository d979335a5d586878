"""What the contrastive losses refuse, and what they leave alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gacd.errors import UserError
from gacd.losses.contrastive import (
    gacd_loss,
    nce,
)
from losses.problems import DOUBLE, problem, raw_problem


def test_a_projection_that_moved_before_the_backward_pass_is_noticed() -> None:
    p, weight, _ = raw_problem()
    loss = gacd_loss(**p, projection_weight_ED=weight.requires_grad_()).sum()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_a_second_derivative_is_refused() -> None:
    p = problem()
    student = p.pop("student_BE").requires_grad_()
    loss = gacd_loss(student, **p, temperature=0.1, negatives=3).sum()
    with pytest.raises(UserError, match="first derivative alone"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_no_gradient_and_no_mutation_where_none_belongs() -> None:
    p, weight, _ = raw_problem()
    before = {name: value.clone() for name, value in p.items()}
    p["student_BE"].requires_grad_()
    z = torch.tensor(1.0, dtype=DOUBLE)
    gacd_loss(**p, projection_weight_ED=weight, log_z=z).sum().backward()
    assert all(torch.equal(p[name], before[name]) for name in p)
    assert weight.grad is None and z.grad is None and p["anchors_MD"].grad is None
    assert not gacd_loss(**before, projection_weight_ED=weight).requires_grad
    with pytest.raises(UserError, match="constants"):
        gacd_loss(**problem() | {"anchors_MD": problem()["anchors_MD"].requires_grad_()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"negatives": 0}, "negatives"),
        ({"anchor_weights_M": torch.ones(23, requires_grad=True)}, "constants get no gradient"),
        ({"projection_weight_ED": torch.ones(6, 5)}, r"\[6, 5\], .* it must be \[6, 6\]"),
        ({"projection_bias_E": torch.ones(6)}, "goes with projection_weight_ED"),
        ({"index_B": torch.arange(5), "dataset_size": 99}, "say with anchor_index_M which rows"),
        ({"dataset_size": 0}, "dataset_size"),
        ({"student_BE": torch.ones(5, 7), "positive_BE": torch.ones(5, 7)}, "projection_weight_ED"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gacd_loss(**problem() | change)


UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"positive_BE": torch.ones(1, 6)}, "positive_BE is [1, 6], but student_BE [5, 6]"),
    ({"labels_B": torch.ones(4).long()}, "labels_B is [4], but there are 5 images"),
    ({"weights_B": torch.ones(5, 1)}, "weights_B is [5, 1], but there are 5 images"),
    ({"index_B": torch.ones(6).long()}, "index_B is [6], but there are 5 images"),
    (
        {"anchor_labels_M": torch.ones(99).long()},
        "anchor_labels_M is [99], but there are 23 anchors",
    ),
    (
        {"anchor_weights_M": torch.ones(99)},
        "anchor_weights_M is [99], but there are 23 anchors",
    ),
    (
        {"index_B": torch.arange(5), "anchor_index_M": torch.arange(24)},
        "anchor_index_M is [24], but there are 23 anchors",
    ),
    ({"student_BE": torch.ones(0, 6), "positive_BE": torch.ones(0, 6)}, "holds no image"),
    ({"projection_weight_ED": torch.ones(6, 6), "projection_bias_E": torch.ones(5)}, "be [6]"),
    ({"log_z": torch.ones(7)}, "log_z is one constant, not [7]"),
    ({"temperature": torch.tensor(0.1, requires_grad=True)}, "temperature: constants get no"),
]


def test_shapes_that_do_not_fit_are_refused_where_types_are_not_checked(tmp_path: Path) -> None:
    """As in a user's own loop: a process without the tests' checks of every shape."""
    torch.save([problem() | change for change, _ in UNFIT], tmp_path / "arguments.pt")
    program = """
import json, sys, torch
from gacd.errors import UserError
from gacd.losses.contrastive import crd_nce, gacd_loss, nce

said = []
e, c = torch.ones(4, 5), torch.ones(4, 3, 5)
z = {"dataset_size": 9, "student_log_z": torch.zeros(()), "teacher_log_z": torch.zeros(())}
for wrong in (
    lambda: nce(e[:2], c, dataset_size=9, log_z=0.0),
    lambda: nce(e, torch.ones(4, 3, 6), dataset_size=9, log_z=0.0),
    lambda: crd_nce(e, e, c, c, weights_B=torch.ones(4, 1), **z),
):
    try:
        said.append(f"not refused: {wrong()}")
    except UserError as error:
        said.append(str(error))
print(json.dumps(said))
said = []
for arguments in torch.load(sys.argv[1]):
    try:
        said.append(f"not refused: {gacd_loss(**arguments)}")
    except UserError as error:
        said.append(str(error))
print(json.dumps(said))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "arguments.pt")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pairs, whole = map(json.loads, done.stdout.splitlines())
    shapes = (
        "[4, 3, 5] for [2, 5]",
        "[4, 3, 6] for [4, 5]",
        "weights_B is [4, 1], but there are 4",
    )
    assert all(shape in said for shape, said in zip(shapes, pairs, strict=True)), pairs
    for said, (_, message) in zip(whole, UNFIT, strict=True):
        assert message in said and "not refused" not in said


@pytest.mark.parametrize(
    ("candidates", "temperature", "message"),
    [(1, 0.1, "at least one negative"), (3, -1.0, "temperature must be above 0, not -1.0")],
)
def test_nce_refuses_what_has_no_value(candidates: int, temperature: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        nce(
            torch.randn(2, 4),
            torch.randn(2, candidates, 4),
            dataset_size=5,
            log_z=torch.zeros(()),
            temperature=temperature,
        )

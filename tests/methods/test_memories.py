"""CRD, and GACD's estimator `memory`: two memories, by loops."""

import copy
import math
from typing import Any

import pytest
import torch

from gacd.errors import UserError
from gacd.methods import create_method
from methods.world import (
    ATTACK,
    NEGATIVES,
    TEMPERATURE,
    World,
    attacked,
    known_attack,
    network,
    total,
)
from reference import soft_labels as reference


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

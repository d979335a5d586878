"""Which epoch is kept: validation chooses, and test images are never read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gacd.attacks.validation import one_answer
from gacd.data.dataset import ArrayDataset, Splits
from gacd.methods import METHODS, Method
from gacd.storage import read_json_lines
from gacd.training import loop
from gacd.training.validation import validate
from training.states import same, weights


@pytest.mark.parametrize(
    ("natural", "select", "epoch"),
    [([0, 9, 0], "robust", 2), ([0, 0, 0], "robust", 3), ([9, 9, 0], "last", 3)],
)
def test_always_one_answer_is_chosen_only_where_nothing_else_is(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, natural: list[int], select: str,
    epoch: int,
) -> None:  # fmt: skip
    """Such a network is as right under any attack, and looks robust where classes are few."""
    labels = stage.splits.val.labels
    trivial = one_answer(labels)
    assert trivial == 100 * max(labels.tolist().count(label) for label in labels) / len(labels)
    above = iter(natural)

    def scores(*_: Any, **__: Any) -> dict[str, float]:
        more = next(above)
        return {"val_natural": trivial + more, "val_robust": trivial - more}

    monkeypatch.setattr(loop, "validate", scores)
    _, summary = stage.fit(tmp_path, "pgd-at", epochs=3, select=select)
    assert summary.selected_epoch == epoch


@pytest.mark.parametrize(
    ("name", "select", "epoch"),
    [("pgd-at", "robust", 3), ("pgd-at", "natural", 2), ("pgd-at", "last", 4), ("kd", "robust", 2)],
)
def test_validation_chooses_the_epoch(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, select: str, epoch: int
) -> None:
    """The best one, of equals the last; on clean images for a method without an attack."""
    natural, robust = iter([50.0, 90.0, 60.0, 70.0]), iter([40.0, 20.0, 40.0, 10.0])
    states = []

    def scores(fabric: Any, method: Method, *_: Any, **__: Any) -> dict[str, float]:
        states.append(weights(method))
        return {"val_natural": next(natural), "val_robust": next(robust)}

    monkeypatch.setattr(loop, "validate", scores)
    method, summary = stage.fit(tmp_path, name, epochs=4, select=select)
    assert summary.selected_epoch == epoch
    assert same(method.state_dict(), states[epoch - 1])
    assert not any(same(states[epoch - 1], s) for i, s in enumerate(states) if i != epoch - 1)
    row = read_json_lines(tmp_path / "log.jsonl")[epoch - 1]
    assert (row["val_natural"], row["val_robust"]) == (summary.val_natural, summary.val_robust)


def test_validation_is_of_the_held_out_images(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the attack of the stage's threat model, with noise of the plan's seed."""
    asked = []

    def noted(fabric: Any, method: Method, dataset: Any, threat: Any, **more: Any) -> Any:
        asked.append((dataset.fingerprint(), threat, more))
        return validate(fabric, method, dataset, threat, **more)

    monkeypatch.setattr(loop, "validate", noted)
    method, _ = stage.fit(tmp_path, "pgd-at", epochs=2)
    assert asked == [(stage.splits.val.fingerprint(), method.attack.threat, {"seed": 4})] * 2


def test_the_test_images_are_never_read(stage: Any, tmp_path: Path) -> None:
    class Poison(ArrayDataset):
        def __init__(self) -> None:
            pass

        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("__"):
                raise AssertionError(f"training read .{name} of the test set")
            return super().__getattribute__(name)

    splits = Splits(stage.splits.train, stage.splits.val, Poison())
    with pytest.raises(AssertionError):
        _ = splits.test.images
    for name in (name for name, term in METHODS.items() if not term.is_addition):
        stage.fit(tmp_path / name, name, splits=splits, epochs=1)


def test_validation_counts_what_the_predictor_gets_right(stage: Any, tmp_path: Path) -> None:
    method, _ = stage.fit(tmp_path, "natural", epochs=15, lr=0.1, ema=0.0)
    method.train()
    with torch.no_grad():
        method.eval()
        right = method.student(stage.splits.val.float_images()).argmax(1) == stage.splits.val.labels
        method.train()
    before = weights(method)
    nothing = type(method.attack.threat)(eps=0.0)
    fabric = stage.fabric()
    scores = validate(fabric, method, stage.splits.val, nothing, batch_size=7)
    expected = 100 * right.float().mean().item()
    assert scores == {"val_natural": pytest.approx(expected), "val_robust": pytest.approx(expected)}
    assert expected > 50
    everything = type(method.attack.threat)(eps=1.0)
    scores = validate(fabric, method, stage.splits.val, everything)
    assert scores["val_robust"] < scores["val_natural"]
    assert method.training and same(before, method.state_dict())


def test_validation_attacks_in_ten_steps_from_noise_of_its_seed(stage: Any) -> None:
    method, threat, attacked = stage.method("pgd-at"), stage.method().attack.threat, []
    seen: list[Tensor] = []
    method.student.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for seed in (0, 0, 1):
        seen.clear()
        validate(stage.fabric(), method, stage.splits.val, threat, seed=seed)
        assert len(seen) == 10 + 2  # and the verdicts of clean and of attacked images
        attacked.append(seen[-1])
    assert torch.equal(attacked[0], attacked[1]) and not torch.equal(attacked[0], attacked[2])
    seen.clear()
    validate(stage.fabric(), method, stage.splits.val, threat, steps=3)
    assert len(seen) == 3 + 2


def test_validation_asks_what_predicts_where_no_head_trains(stage: Any) -> None:
    method, val = stage.method("gacd").eval(), stage.splits.val
    with torch.no_grad():
        answers = method.predictor(val.float_images()).argmax(1)
        head = method.student.get_classifier()
        head.weight.zero_()  # whose answer is the least right one
        head.bias.copy_(-answers.bincount(minlength=3).float())
    nothing = type(method.attack.threat)(eps=0.0)
    scores = validate(stage.fabric(), method, replace(val, labels=answers), nothing)
    assert scores == {"val_natural": 100, "val_robust": 100}

"""A stage begun from Python: whose folder it is, and what it leaves of its student."""

from pathlib import Path
from typing import Any

import pytest

from gacd.anchors import AnchorBank
from gacd.errors import UserError
from gacd.methods import create_method
from gacd.methods.awp import AWP
from gacd.training import loop
from training.conftest import ATTACK


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"options": {"ard": {"temperature": 4.0}}}, "ard.temperature is 30.0 there and 4.0 here"),
        ({"awp": AWP(0.01)}, "awp gamma is 0.0 there and 0.01 here"),
    ],
)
def test_a_folder_of_other_settings_is_another_training(
    stage: Any, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    student = stage.method().student
    for _ in range(2):  # trained, then found done
        own = create_method("ard", student, ATTACK, teacher=stage.teacher)
        stage.fit(tmp_path, own, epochs=1)
    other = create_method("ard", student, ATTACK, teacher=stage.teacher, **more)
    with pytest.raises(UserError, match=message):
        stage.fit(tmp_path, other, epochs=1)


def test_a_stage_that_broke_leaves_the_head_as_it_was(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, held = stage.method("gacd"), []

    def broken(*_: Any, **__: Any) -> None:
        held.append(not method.student.get_classifier().weight.requires_grad)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "validate", broken)
    with pytest.raises(KeyboardInterrupt):
        stage.fit(tmp_path, method)
    assert held == [True] and method.student.get_classifier().weight.requires_grad


def test_an_anchor_bank_without_labels_is_not_gacds(stage: Any) -> None:
    bank = stage.bank
    without = AnchorBank(bank.features_MD, None, bank.weights_M, bank.fingerprint)
    with pytest.raises(UserError, match="the bank needs labels"):
        create_method("gacd", stage.method().student, ATTACK, teacher=stage.teacher, bank=without)

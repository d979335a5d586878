"""The diagnosis passes an honest robust model and catches masked ones."""

import pytest
import torch
from torch import Tensor, nn

from gacd.evaluation.diagnosis import Check, diagnose, zero_gradients
from gacd.evaluation.robust import evaluate


class Quantise(nn.Module):
    """Eight levels of grey: the gradient is zero wherever there is one."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 7).round() / 7


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def diagnosis(model, digits, threat, **kwargs) -> list[Check]:
    return diagnose(model, digits, threat=threat, show_progress=False, **kwargs)


@pytest.fixture(scope="module")
def undefended(tiny_net) -> nn.Module:
    torch.manual_seed(1)
    return tiny_net()


def test_honest_model_passes(honest, digits, threat, quick_autoattack, undefended) -> None:
    checks = diagnosis(honest, digits, threat, source=undefended)
    assert failed(checks) == set()
    assert len(checks) == 7
    assert all(check.text and check.value <= check.limit for check in checks)


def test_quantised_input_is_caught(masked, honest, digits, threat, quick_autoattack) -> None:
    checks = diagnosis(masked(Quantise()), digits, threat, source=honest)
    assert {
        "a large eps breaks everything",
        "AutoAttack is near PGD",
        "gradients do not vanish",
        "transfer is weaker than white-box",
    } <= failed(checks)


def test_saturated_softmax_is_caught(masked, digits, threat, quick_autoattack) -> None:
    checks = diagnosis(masked(scale=1e4), digits, threat)
    assert {"AutoAttack is near PGD", "gradients do not vanish"} <= failed(checks)


def test_a_given_evaluation_spares_autoattack(
    honest, digits, threat, quick_autoattack, monkeypatch
) -> None:
    full = evaluate(
        honest, digits, attacks=["pgd5", "pgd20", "autoattack"], threat=threat,
        autoattack_limit=30, show_progress=False,
    )  # fmt: skip
    monkeypatch.setattr("gacd.evaluation.robust.autoattack", None)
    checks = diagnosis(honest, digits, threat, evaluation=full)
    gap = next(check for check in checks if check.name == "AutoAttack is near PGD")
    index = full.index["autoattack"]
    lost = full.robust["pgd20"][index] & ~full.robust["autoattack"]
    gained = ~full.robust["pgd20"][index] & full.robust["autoattack"]
    assert gap.value == pytest.approx(100 * (int(lost.sum()) - int(gained.sum())) / 30)
    assert "pgd20" in gap.text


def test_zero_gradients_are_counted(honest, masked, digits) -> None:
    assert zero_gradients(honest, digits) < 1
    assert zero_gradients(masked(Quantise()), digits, batch_size=7) == 100.0


def test_a_cascade_does_not_stand_for_autoattack(honest, digits, threat, quick_autoattack) -> None:
    cascade = evaluate(
        honest, digits, attacks=["autoattack", "pgd5"], threat=threat,
        autoattack_limit=30, cascade=True, show_progress=False,
    )  # fmt: skip
    checks = diagnosis(honest, digits, threat, evaluation=cascade, autoattack_limit=20)
    gap = next(check for check in checks if check.name == "AutoAttack is near PGD")
    assert "pgd100" in gap.text  # of attacks made anew

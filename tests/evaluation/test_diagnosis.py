"""The diagnosis passes an honest robust model and catches masked ones."""

import pytest
import torch
from torch import Tensor, nn

from gacd.evaluation.diagnosis import Check, _autoattack_gap, diagnose, zero_gradients
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
    strong = evaluate(
        honest, digits.subset(index), attacks=["pgd100x5"], threat=threat, show_progress=False
    )
    lost = int((strong.robust["pgd100x5"] & ~full.robust["autoattack"]).sum())
    assert gap.value == pytest.approx(100 * wilson_low(lost, 30))
    assert f"{lost} of 30 images" in gap.text


def wilson_low(k: int, n: int, z: float = 1.959964) -> float:
    """Closed form of the lower end of Wilson's interval."""
    p, w = k / n, z * z / n
    return (p + w / 2 - z * (p * (1 - p) / n + w / (4 * n)) ** 0.5) / (1 + w)


def test_few_images_prove_little() -> None:
    """A fifth of the images falls to AutoAttack alone: shown by 200 of them, not by 10."""
    for n, shown in ((10, False), (200, True)):
        pgd = torch.ones(n, dtype=torch.bool)
        autoattack = torch.arange(n) >= n // 5
        low, _ = _autoattack_gap(pgd, autoattack)
        assert low == pytest.approx(100 * wilson_low(n // 5, n), abs=1e-6)
        assert (low > 10) == shown


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
    assert "of 20 images" in gap.text  # of attacks made anew

"""The diagnosis passes an honest robust model and catches masked ones."""

import pytest
import torch
from torch import Tensor, nn

from gacd.attacks.threat import ThreatModel
from gacd.evaluation import diagnosis as diagnosis_module
from gacd.evaluation.diagnosis import Check, _autoattack_gap, diagnose, zero_gradients
from gacd.evaluation.outcomes import Evaluation
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


def test_what_pgd_alone_breaks_is_no_gap() -> None:
    stands = torch.tensor([True, False, False, True, True])
    _, said = _autoattack_gap(stands, torch.tensor([True, True, True, False, True]))
    assert "1 of 5 images" in said


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


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Every evaluation asked for; each finds the accuracies of `ACCURACIES`."""
    asked: list[dict] = []

    def known(model, data, *, attacks, threat, **_) -> Evaluation:
        asked.append({"attacks": attacks, "threat": threat, "labels": data.labels})
        n, names = len(data), ["natural", *attacks]
        robust = {k: torch.arange(n) < round(ACCURACIES[k] * n / 100) for k in names}
        settings = {"eps": threat.eps}
        return Evaluation(n, robust, dict.fromkeys(names, torch.arange(n)), settings)

    monkeypatch.setattr(diagnosis_module, "evaluate", known)
    return asked


ACCURACIES = {
    "natural": 90, "noise": 81, "fgsm": 40, "pgd20": 43, "pgd100": 50, "pgd100x5": 100,
    "autoattack": 60, "transfer": 44,
}  # fmt: skip


@pytest.mark.parametrize(("norm", "everywhere"), [("linf", 0.5), ("l2", 4.0)])
def test_checks_are_differences_of_accuracies(
    honest, digits, measured, norm: str, everywhere: float
) -> None:
    """Each the defender's gain where there should be none, in points; grey is eps 1/2 away."""
    checks = diagnosis(honest, digits, ThreatModel(norm=norm, eps=0.1), source=honest)
    found = {check.name: (check.value, check.limit) for check in checks}
    assert found["iterative beats single-step"] == pytest.approx((43 - 40, 1))
    assert found["more steps never help the defender"] == pytest.approx((50 - 43, 1))
    assert found["a large eps breaks everything"] == pytest.approx((50, 1))
    expected = (90 - 81, (90 - 50) / 2)
    assert found["random noise is harmless next to the attack"] == pytest.approx(expected)
    assert found["AutoAttack is near PGD"][0] == pytest.approx(100 * wilson_low(40, 100))
    assert found["transfer is weaker than white-box"] == pytest.approx((50 - 44, 1))
    assert measured[1]["threat"] == ThreatModel(norm=norm, eps=everywhere)


def test_given_verdicts_are_those_of_the_images_chosen(honest, digits, threat, measured) -> None:
    """All of classes 0 to 3 fall to AutoAttack: of ten images, one a class, four."""
    index = torch.arange(20, 80)
    verdicts = digits.labels[index] > 3
    alike = {"test_images": digits.fingerprint(), "norm": threat.norm, "eps": threat.eps}
    given = Evaluation(100, {"autoattack": verdicts}, {"autoattack": index}, alike)
    checks = diagnosis(honest, digits, threat, evaluation=given, limit=10)
    assert measured[0]["labels"].bincount().tolist() == [1] * 10
    assert "autoattack" not in measured[0]["attacks"]
    (gap,) = (check for check in checks if check.name == "AutoAttack is near PGD")
    assert "4 of 10 images" in gap.text
    for n, other in enumerate(({"test_images": "another"}, {"eps": 0.2}, {"norm": "l2"}), 1):
        elsewhere = Evaluation(100, given.robust, given.index, alike | other)
        diagnosis(honest, digits, threat, evaluation=elsewhere)
        assert "autoattack" in measured[2 * n]["attacks"]


def test_a_limit_is_at_least_what_chance_may_do(
    honest, digits, threat, measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the attack breaks nothing: a point, or one image, which of 20 is five."""
    monkeypatch.setitem(ACCURACIES, "pgd100", ACCURACIES["natural"])
    for limit, points in ((100, 1.0), (20, 5.0)):
        found = {check.name: check for check in diagnosis(honest, digits, threat, limit=limit)}
        for name in (
            "random noise is harmless next to the attack",
            "more steps never help the defender",
        ):
            assert found[name].limit == pytest.approx(points)

"""The GACD loss in every floating point format, from rounding to overflow, under autocast."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gacd.errors import UserError
from gacd.losses import fused
from gacd.losses.contrastive import (
    gacd_loss,
    nce,
)
from gacd.losses.pairs import Pairs
from losses.problems import DOUBLE, problem, raw_problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1e3])
@pytest.mark.parametrize("sizes", [{"batch": 1}, {"classes": 1}, {"batch": 23, "width": 1}, {}])
@pytest.mark.parametrize("fast", [True, False])
def test_finite_in_every_precision(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    temperature: float,
    sizes: dict[str, int],
    fast: bool,
) -> None:
    monkeypatch.setattr(fused, "fast_bf16", lambda device: fast)
    p = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in problem(**sizes).items()
    }
    weight = torch.eye(p["student_BE"].shape[1], dtype=dtype).requires_grad_()
    p["student_BE"].requires_grad_()
    p["positive_BE"].requires_grad_()
    for z, k in ((None, 16384), (torch.zeros(()), 8)):
        options = {"temperature": temperature, "log_z": z, "negatives": k}
        loss_B = gacd_loss(**p, projection_weight_ED=weight, **options)
        loss_B.mean().backward()
        assert loss_B.dtype == torch.float32
        assert loss_B.isfinite().all()
        for leaf in (p["student_BE"], p["positive_BE"], weight):
            assert leaf.grad is not None and leaf.grad.isfinite().all()


@pytest.mark.parametrize(
    ("fast", "tolerances"), [(True, (0.01, 0.02, 0.02)), (False, (0.002, 0.004, 0.004))]
)
def test_bfloat16_is_near_float64(
    monkeypatch: pytest.MonkeyPatch, fast: bool, tolerances: tuple[float, ...]
) -> None:
    """Nearer where the processor is slow with it, so that the products are float32's."""
    monkeypatch.setattr(fused, "fast_bf16", lambda device: fast)
    p, weight, bias = raw_problem(64, batch=16, anchors=3000, classes=10)
    names = {"projection_weight_ED": weight, "projection_bias_E": bias}

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        anchors = p["anchors_MD"].to(dtype)
        leaves = [p["student_BE"].clone().requires_grad_(), weight.clone().requires_grad_()]
        q = p | {"anchors_MD": anchors, "student_BE": leaves[0]}
        loss_B = gacd_loss(**q, **names | {"projection_weight_ED": leaves[1]}, negatives=1000)
        return loss_B.detach(), *torch.autograd.grad(loss_B.mean(), leaves)

    for half, full, tolerance in zip(
        run(torch.bfloat16), run(torch.float64), tolerances, strict=True
    ):
        assert (half - full).norm() < tolerance * full.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positive_scores_of_half_precision_embeddings_are_not_rounded(dtype: torch.dtype) -> None:
    p = {name: value.to(dtype) for name, value in problem().items() if name.endswith("E")}
    expected_B = (p["student_BE"].double() * p["positive_BE"].double()).sum(1) / 0.1
    found_B = Pairs(p["student_BE"], p["positive_BE"], problem()["anchors_MD"].to(dtype)).positive_B
    torch.testing.assert_close(found_B.double(), expected_B, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("log_z", "temperature"), [(25.0, 0.3), (2.0, 0.3), (-60.0, 0.3), (0.0, 0.005)]
)
def test_the_negative_term_is_accurate_from_rounding_to_overflow(
    log_z: float, temperature: float
) -> None:
    """log(1 + e^u) in float32 for u from -30 to 200, where 1 + e^u is 1 or infinite."""
    p = problem()
    p["weights_B"] = torch.zeros(5, dtype=DOUBLE)
    for name in ("student_BE", "positive_BE", "anchors_MD"):  # alike in both precisions
        p[name] = p[name].float().double()

    def run(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q = {n: v.to(dtype) if v.is_floating_point() else v for n, v in p.items()}
        q["student_BE"].requires_grad_()
        z = torch.tensor(log_z, dtype=dtype)
        loss_B = gacd_loss(**q, temperature=temperature, negatives=64, log_z=z)
        return loss_B.double(), torch.autograd.grad(loss_B.sum(), q["student_BE"])[0].double()

    torch.testing.assert_close(run(torch.float32), run(DOUBLE), rtol=1e-4, atol=0)


def test_the_negative_term_has_no_hole_where_rounding_takes_the_one() -> None:
    """e^y from 2^23 to 2^25, in float32: 1 + e^y is e^y, or e^y + 2, and it must not matter."""
    cosines = torch.linspace(0.75, 0.95, 2001)
    student_BE = torch.stack((cosines, (1 - cosines**2).sqrt()), dim=1)
    found_B = gacd_loss(
        student_BE,
        torch.tensor([[1.0, 0.0]]).expand(len(cosines), 2),
        torch.tensor([[1.0, 0.0]]),
        labels_B=torch.zeros(len(cosines), dtype=torch.int64),
        anchor_labels_M=torch.ones(1, dtype=torch.int64),
        temperature=0.05,
        negatives=1,
        log_z=torch.zeros(()),
    )
    y_B = cosines.double() / 0.05
    expected_B = F.softplus(y_B) + F.softplus(-y_B)  # one negative, and the positive
    assert (found_B - expected_B).abs().max() < 1e-5 * 20


def test_autocast_changes_nothing() -> None:
    p, weight, _ = raw_problem()
    p = {n: v.float() if v.is_floating_point() else v for n, v in p.items()}
    leaves = [p["student_BE"].requires_grad_(), weight.float().requires_grad_()]

    def run() -> tuple[Tensor, ...]:
        loss_B = gacd_loss(**p, projection_weight_ED=leaves[1])
        return loss_B, *torch.autograd.grad(loss_B.sum(), leaves)

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)


def test_labels_of_any_width_and_a_constant_given_as_a_number() -> None:
    p = problem()
    expected_B = gacd_loss(**p, log_z=torch.tensor(0.5, dtype=DOUBLE))
    labels = {name: p[name].int() for name in ("labels_B", "anchor_labels_M")}
    torch.testing.assert_close(gacd_loss(**p | labels, log_z=0.5), expected_B, rtol=0, atol=0)
    p["anchor_labels_M"] += 256 * (torch.arange(23) % 2)  # classes that bytes do not tell apart
    narrow_B = gacd_loss(**p | {"labels_B": p["labels_B"].to(torch.int8)})
    torch.testing.assert_close(narrow_B, gacd_loss(**p), rtol=0, atol=0)


def test_nce_keeps_its_precision_under_autocast_and_refuses_what_would_broadcast() -> None:
    query, candidates = torch.randn(2, 8), torch.randn(2, 3, 8)
    setting: dict[str, Any] = {"dataset_size": 9, "log_z": 0.0}
    expected_B = nce(query, candidates, **setting)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(nce(query, candidates, **setting), expected_B, rtol=0, atol=0)
        half_B = nce(query, candidates.half(), **setting)
    torch.testing.assert_close(half_B, nce(query, candidates.half().float(), **setting))
    with pytest.raises(UserError, match="dataset_size must be at least 1"):
        nce(query, candidates, **setting | {"dataset_size": 0})

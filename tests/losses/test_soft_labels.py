"""Soft-label losses against naive float64 loops, their gradients, invariances and extremes."""

from collections.abc import Callable
from typing import NamedTuple

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gacd.errors import UserError
from gacd.losses.soft_labels import (
    adaad,
    ard,
    cross_entropy,
    feature_regression,
    iad,
    igdm,
    kd,
    rslad,
    soft_kl,
)
from reference import soft_labels as reference

LABELS = torch.tensor([0, 2, 3, 1])


class Case(NamedTuple):
    """A loss of `n` logit tensors, and the same for one image by the reference (y last)."""

    n: int
    loss: Callable[..., Tensor]
    naive: Callable[..., float]


CASES = {
    "kd": Case(
        2,
        lambda s, t: kd(s, t, LABELS, temperature=3.0, alpha=0.7),
        lambda s, t, y: reference.kd(s, t, y, temperature=3.0, alpha=0.7),
    ),
    "ard": Case(
        3,
        lambda a, t, s: ard(a, t, s, LABELS, temperature=30.0, alpha=0.9),
        lambda a, t, s, y: reference.ard(a, t, s, y, temperature=30.0, alpha=0.9),
    ),
    "rslad": Case(3, rslad, lambda a, s, t, y: reference.rslad(a, s, t)),
    "iad": Case(
        4,
        lambda a, s, ta, t: iad(
            student_adv_logits=a,
            student_logits=s,
            teacher_adv_logits=ta,
            teacher_logits=t,
            labels=LABELS,
            temperature=2.0,
            beta=0.3,
        ),
        lambda a, s, ta, t, y: reference.iad(a, s, ta, t, y, temperature=2.0, beta=0.3),
    ),
    "adaad": Case(
        4,
        lambda a, s, ta, t: adaad(
            student_adv_logits=a,
            student_logits=s,
            teacher_adv_logits=ta,
            teacher_logits=t,
            adv_weight=0.8,
        ),
        lambda a, s, ta, t, y: reference.adaad(a, s, ta, t, adv_weight=0.8),
    ),
    "igdm": Case(
        4,
        lambda sp, sm, tp, tm: igdm(
            student_plus_logits=sp,
            student_minus_logits=sm,
            teacher_plus_logits=tp,
            teacher_minus_logits=tm,
        ),
        lambda sp, sm, tp, tm, y: reference.igdm(sp, sm, tp, tm),
    ),
    "feature_regression": Case(
        2, feature_regression, lambda s, t, y: reference.feature_regression(s, t)
    ),
}
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def draw(n: int, generator: torch.Generator, scale: float = 3.0) -> list[Tensor]:
    return [scale * torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(n)]


@every_loss
def test_equals_the_naive_loop(case: Case, generator: torch.Generator) -> None:
    inputs = draw(case.n, generator)
    rows = zip(*(x.tolist() for x in inputs), LABELS.tolist(), strict=True)
    expected = torch.tensor([case.naive(*row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(case.loss(*inputs), expected, rtol=1e-10, atol=1e-12)
    single = case.loss(*(x.float() for x in inputs))
    torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=1e-4)


@every_loss
def test_gradients(case: Case, generator: torch.Generator) -> None:
    inputs = [x.requires_grad_() for x in draw(case.n, generator, scale=1.0)]
    if case is CASES["iad"]:
        inputs[2].requires_grad_(False)  # the trust is a constant by design
    assert torch.autograd.gradcheck(case.loss, inputs)


@every_loss
def test_finite_for_huge_logits_in_half_precision(case: Case) -> None:
    signs = torch.tensor([[1, -1, 1, -1, -1], [-1, 1, -1, 1, -1]] * 2)
    huge = (1e4 * signs).half()
    inputs = [(huge * (-1) ** i).requires_grad_() for i in range(case.n)]
    loss = case.loss(*inputs)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    loss.sum().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in inputs)


@every_loss
def test_autocast_changes_nothing(case: Case, generator: torch.Generator) -> None:
    inputs = [x.float() for x in draw(case.n, generator)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = case.loss(*inputs)
    torch.testing.assert_close(under, case.loss(*inputs), rtol=0, atol=0)


@every_loss
def test_half_precision_loses_nothing_that_its_numbers_hold(
    case: Case, generator: torch.Generator
) -> None:
    """Outputs of 2,000 and of 1, whose differences are between two numbers of that type."""
    scale = torch.tensor([1, 2000, 1, 1, 2000], dtype=torch.float64)
    inputs = [(x + (-1) ** i * scale).half() for i, x in enumerate(draw(case.n, generator))]
    expected = case.loss(*(x.double() for x in inputs))
    torch.testing.assert_close(case.loss(*inputs).double(), expected, rtol=1e-5, atol=1e-5)


@every_loss
def test_images_do_not_see_each_other(case: Case, generator: torch.Generator) -> None:
    inputs = draw(case.n, generator)
    changed = [torch.cat([x[:3], 7 * x[3:]]) for x in inputs]
    before, after = case.loss(*inputs), case.loss(*changed)
    torch.testing.assert_close(before[:3], after[:3], rtol=0, atol=0)
    assert before[3] != after[3]


@pytest.mark.parametrize("name", ["rslad", "adaad", "igdm", "feature_regression"])
def test_a_student_equal_to_its_teacher_has_no_loss(name: str, generator: torch.Generator) -> None:
    (x,) = draw(1, generator)
    case = CASES[name]
    loss = case.loss(*[x] * case.n)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), shift=st.floats(-50, 50), temperature=st.floats(0.5, 30))
def test_kl_is_positive_and_blind_to_a_constant(
    seed: int, shift: float, temperature: float
) -> None:
    s, t = draw(2, torch.Generator().manual_seed(seed))
    divergence = soft_kl(s, t, temperature=temperature)
    assert (divergence > 0).all()
    shifted = soft_kl(s + shift, t - 2 * shift, temperature=temperature)
    torch.testing.assert_close(shifted, divergence, rtol=1e-8, atol=1e-10)
    same = soft_kl(t + shift, t, temperature=temperature)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-10)


def test_kl_sums_over_classes(generator: torch.Generator) -> None:
    """K equal copies of a two-class problem: the same divergence whatever K (no division by K)."""
    s, t = (x[:, :2] for x in draw(2, generator))
    pair, many = soft_kl(s, t), soft_kl(s.repeat(1, 50), t.repeat(1, 50))
    torch.testing.assert_close(many, pair)


def test_extremes_of_alpha(generator: torch.Generator) -> None:
    s, t, a = draw(3, generator)
    hard = torch.nn.functional.cross_entropy(s, LABELS, reduction="none")
    torch.testing.assert_close(cross_entropy(s, LABELS), hard)
    torch.testing.assert_close(kd(s, t, LABELS, temperature=4.0, alpha=0.0), hard)
    torch.testing.assert_close(ard(a, t, s, LABELS, alpha=0.0), hard)
    torch.testing.assert_close(kd(s, t, LABELS, temperature=30.0, alpha=1.0), ard(s, t, a, LABELS))


def test_iad_without_doubt_is_ard_and_without_trust_is_self_agreement(
    generator: torch.Generator,
) -> None:
    a, s, ta, t = draw(4, generator)

    def loss(teacher_adv: Tensor, beta: float) -> Tensor:
        return iad(
            student_adv_logits=a,
            student_logits=s,
            teacher_adv_logits=teacher_adv,
            teacher_logits=t,
            labels=LABELS,
            beta=beta,
        )

    torch.testing.assert_close(loss(ta, 0.0), ard(a, t, s, LABELS, temperature=1.0))
    wrong = ta.scatter(1, LABELS[:, None], -1e6)
    torch.testing.assert_close(loss(wrong, 0.1), soft_kl(a, s))
    ta.requires_grad_()
    assert not loss(ta, 0.1).requires_grad  # the trust is a weight, not a term to minimise


def test_igdm_ignores_what_the_points_share(generator: torch.Generator) -> None:
    inputs = draw(4, generator)
    offset = torch.arange(5.0, dtype=torch.float64)
    moved = [x + (offset if i < 2 else -offset) for i, x in enumerate(inputs)]
    torch.testing.assert_close(CASES["igdm"].loss(*moved), CASES["igdm"].loss(*inputs))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: soft_kl(x, x, temperature=0.0), "temperature must be above 0, not 0"),
        (lambda x: kd(x, x, LABELS, temperature=1.0, alpha=1.5), "lies in 0 to 1, not 1.5"),
        (
            lambda x: iad(
                student_adv_logits=x,
                student_logits=x,
                teacher_adv_logits=x,
                teacher_logits=x,
                labels=LABELS,
                beta=-1.0,
            ),
            "beta must be 0 or above, not -1",
        ),
    ],
)
def test_refuses_bad_settings(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(torch.zeros(4, 5))


def test_shapes_are_checked_in_the_tests() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        soft_kl(torch.zeros(4, 5), torch.zeros(4, 6))

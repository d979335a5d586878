"""TRADES and MART against naive float64 loops, their gradients, invariances and extremes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gacd.errors import UserError
from gacd.losses.robust import mart, trades
from reference import soft_labels as reference

LABELS = torch.tensor([0, 2, 3, 1])
LOSSES = {"trades": (trades, reference.trades), "mart": (mart, reference.mart)}
both = pytest.mark.parametrize(("loss", "naive"), LOSSES.values(), ids=LOSSES.keys())
Loss = Callable[..., Tensor]


def draw(generator: torch.Generator, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    natural, adv = scale * torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    return natural, adv


@both
def test_equals_the_naive_loop(
    loss: Loss, naive: Callable[..., float], generator: torch.Generator
) -> None:
    natural, adv = draw(generator)
    rows = zip(natural.tolist(), adv.tolist(), LABELS.tolist(), strict=True)
    expected = torch.tensor([naive(*row, beta=4.5) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(loss(natural, adv, LABELS, beta=4.5), expected)
    single = loss(natural.float(), adv.float(), LABELS, beta=4.5)
    torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=1e-5)


@both
def test_gradients(loss: Loss, naive: object, generator: torch.Generator) -> None:
    inputs = [x.requires_grad_() for x in draw(generator, scale=1.0)]
    assert torch.autograd.gradcheck(lambda n, a: loss(n, a, LABELS), inputs)


@both
def test_finite_for_huge_logits_in_half_precision(loss: Loss, naive: object) -> None:
    one_hot = torch.nn.functional.one_hot(LABELS, 5)
    right = (1e4 * (2 * one_hot - 1)).half()
    for natural, adv in [(right, right), (right, -right), (-right, right), (right, right.roll(1))]:
        inputs = [natural.clone().requires_grad_(), adv.clone().requires_grad_()]
        value = loss(*inputs, LABELS)
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        value.sum().backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


@both
def test_autocast_changes_nothing(loss: Loss, naive: object, generator: torch.Generator) -> None:
    natural, adv = (x.float() for x in draw(generator))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = loss(natural, adv, LABELS)
    torch.testing.assert_close(under, loss(natural, adv, LABELS), rtol=0, atol=0)


@both
def test_constants_and_the_order_of_images_do_not_matter(
    loss: Loss, naive: object, generator: torch.Generator
) -> None:
    natural, adv = draw(generator)
    plain = loss(natural, adv, LABELS)
    torch.testing.assert_close(loss(natural + 40, adv - 7, LABELS), plain)
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(loss(natural[order], adv[order], LABELS[order]), plain[order])


def test_an_image_that_does_not_change_costs_no_disagreement(generator: torch.Generator) -> None:
    natural, _ = draw(generator)
    torch.testing.assert_close(
        trades(natural, natural, LABELS, beta=6.0),
        torch.nn.functional.cross_entropy(natural, LABELS, reduction="none"),
    )
    torch.testing.assert_close(
        mart(natural, natural, LABELS, beta=6.0), mart(natural, natural, LABELS, beta=0.0)
    )


def test_mart_keeps_its_margin_where_probabilities_round_to_one() -> None:
    """Two classes, adversarial gap g: the margin term is log(1 + e^g), g itself when large."""
    natural, adv = torch.zeros(1, 2), torch.tensor([[0.0, 60.0]])
    boosted = mart(natural, adv, torch.tensor([0]), beta=0.0)
    torch.testing.assert_close(boosted, torch.tensor([120.0]))


@both
def test_refuses_a_negative_beta(loss: Loss, naive: object) -> None:
    with pytest.raises(UserError, match="beta must be 0 or above, not -1"):
        loss(torch.zeros(4, 5), torch.zeros(4, 5), LABELS, beta=-1.0)

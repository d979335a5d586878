"""Combinations by weights, the attack they share, and adversarial weight perturbation."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gacd.errors import UserError
from gacd.methods import METHODS, Method
from gacd.methods.awp import AWP
from gacd.methods.registry import method_order, parse_method
from methods.world import ATTACK, World, known_attack, step_of, total

PAIRS = ["gacd+rslad", "rslad+gacd", "crd+kd", "ard+kd", "gacd+regression", "gacd+pgd-at"]
PAIRS += ["crd+pgd-at", "natural+pgd-at"]  # clean images beside attacked ones


def learned(method: Method, world: World) -> dict[str, Tensor]:
    """The student after a step."""
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    total(method, world.batch()).backward()
    optimizer.step()
    return dict(method.student.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("pair", PAIRS)
def test_a_combination_is_the_weighted_sum_of_its_terms(world: World, pair: str) -> None:
    names = pair.split("+")
    weights = dict(zip(names, (0.5, 2.0), strict=True))
    both = world.method(pair, weights=weights)
    parts = {name: world.method(name) for name in names}
    for term in names:  # the same projections and settings, whatever the pair's defaults are
        both.terms[term] = copy.deepcopy(parts[term].terms[term])
    for method in (both, *parts.values()):
        known_attack(method)
    loss = both(world.batch(), torch.Generator().manual_seed(0))
    losses = {name: total(part, world.batch()) for name, part in parts.items()}
    expected = sum(weights[name] * losses[name] for name in names)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    for name in names:
        assert loss.parts[f"loss_{name}"].item() == pytest.approx(
            weights[name] * losses[name].item(), rel=1e-5
        )


@pytest.mark.parametrize("pair", PAIRS)
def test_a_term_of_weight_0_is_not_there(world: World, pair: str) -> None:
    for left_out, name in (pair.split("+"), pair.split("+")[::-1]):
        both, alone = world.method(pair, weights={left_out: 0.0}), world.method(name)
        both.terms[name] = copy.deepcopy(alone.terms[name])  # its settings of the table
        assert list(both.terms) == [name]
        assert both.objective == alone.objective
        assert both.trains_head == alone.trains_head
        assert same(learned(both, world), learned(alone, world))


def test_weights_do_not_touch_a_method_by_itself(world: World) -> None:
    plain, weighted = world.method("kd"), world.method("kd", weights={"kd": 7.0})
    assert torch.equal(total(plain, world.batch()), total(weighted, world.batch()))


def test_the_first_terms_attack_is_everyones(world: World) -> None:
    assert world.method("gacd+rslad").objective == "transport"
    assert world.method("rslad+gacd").objective == "teacher-kl"
    assert world.method("kd+ard").objective == "ce"  # kd has none
    chosen = replace(ATTACK, objective="kl")
    assert world.method("gacd+rslad", chosen).objective == "kl"
    assert world.method("crd+kd", chosen).objective is None
    method, calls = world.method("gacd+rslad+ard"), []
    original = method.adversarial
    method.adversarial = lambda step: calls.append(1) or original(step)  # type: ignore
    total(method, world.batch())
    assert calls == [1]


def test_a_head_trains_where_any_term_trains_it(world: World) -> None:
    heads = {}
    for name in ("gacd", "regression", "gacd+regression", "gacd+rslad", "regression+pgd-at"):
        method = world.method(name)
        method.hold()
        heads[name] = method.student.get_classifier().weight.requires_grad
    assert list(heads.values()) == [False, False, False, True, True]
    method = world.method("gacd+rslad")
    assert method.predictor is method.student
    with pytest.raises(UserError, match=r"'ce' needs the student's head, which gacd\+regression"):
        world.method("gacd+regression", replace(ATTACK, objective="ce"))


def test_a_method_that_never_trained_leaves_the_head_alone(world: World) -> None:
    student = world.method("gacd").student
    assert student.get_classifier().weight.requires_grad
    method = world.method("gacd")
    for _ in range(2):  # a stage that was interrupted, and begun again
        method.hold()
    method.release()
    assert method.student.get_classifier().weight.requires_grad


@pytest.mark.parametrize("name", ["gacd+igdm", "regression+igdm", "igdm+gacd", "gacd+igdm+aft"])
def test_an_addition_needs_a_term_that_trains_the_head(name: str) -> None:
    with pytest.raises(UserError, match="no other term trains the head: add one that does"):
        parse_method(name)
    with pytest.raises(UserError, match="no other term trains the head"):
        parse_method("gacd+rslad+igdm", {"rslad": 0.0})
    assert parse_method("gacd+rslad+igdm").trains_head


def test_without_a_head_the_first_term_predicts(world: World) -> None:
    """Regression: what the teacher's head says of the student's projected features."""
    method, x = world.method("regression+gacd").eval(), world.data.float_images()
    linear, head = method.terms["regression"].projection, world.teacher.module.get_classifier()
    features = method.student.forward_features(x) @ linear.weight.T + linear.bias
    torch.testing.assert_close(method.predictor(x), features @ head.weight.T + head.bias)


def test_names_are_read_as_they_are_meant() -> None:
    assert parse_method("gacd+rslad+aft") == ("gacd+rslad", ("gacd", "rslad"), True)
    named = parse_method("gacd+rslad", {"gacd": 0.0})
    assert named == ("gacd+rslad", ("rslad",), False) and named.trains_head
    assert not parse_method("crd+kd").attacks and parse_method("kd+igdm").attacks
    assert parse_method("gacd").needs_bank and not parse_method("ard").needs_bank
    assert all(parse_method(n).needs_teacher == METHODS[n].needs_teacher for n in ("kd", "mart"))
    with pytest.raises(UserError, match=r"say rslad\+igdm"):
        parse_method("rslad+igdm", {"rslad": 0.0})


def test_rows_follow_the_table_of_methods() -> None:
    names = ["mine", "gacd+rslad+aft", "kd", "gacd+rslad", "rslad+gacd", "gacd+aft", "natural"]
    names += ["gacd", "adaad+igdm", "adaad"]
    assert method_order(names) == [
        *("natural", "kd", "rslad+gacd", "adaad", "adaad+igdm"),
        *("gacd", "gacd+aft", "gacd+rslad", "gacd+rslad+aft", "mine"),
    ]


@pytest.mark.parametrize("name", ["pgd-at", "trades", "natural", "gacd", "gacd+rslad", "crd"])
def test_awp_is_the_gradient_at_the_perturbed_weights(world: World, name: str) -> None:
    """By hand: g at w, then every matrix and kernel moved by gamma |w| g / |g|, then g there."""
    gamma, batch = 0.05, world.batch()
    method = world.method(name, awp=AWP(gamma))
    plain = world.method(name)
    known_attack(method)
    known_attack(plain)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    total(method, batch).backward()

    twin = copy.deepcopy(plain)
    total(twin, batch).backward()
    with torch.no_grad():
        for key, parameter in plain.student.named_parameters():
            slope = twin.student.get_parameter(key).grad
            if parameter.ndim > 1 and slope is not None:
                parameter += gamma * parameter.norm() * slope / slope.norm()
    total(plain, batch).backward()
    for (key, a), b in zip(method.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, before[key]), key  # nothing moved
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    statistics = dict(plain.named_buffers())
    for key, value in method.named_buffers():  # one pass's, at w + v: memories too
        torch.testing.assert_close(value, statistics[key], rtol=1e-4, atol=1e-6)


def test_awp_raises_the_loss_and_waits_for_its_warm_up(world: World) -> None:
    def loss(progress: float, awp: AWP | None) -> Tensor:
        return total(world.method("pgd-at", awp=awp), world.batch(), progress=progress)

    plain = loss(1.0, None)
    assert torch.equal(loss(1.0, AWP(0.0)), plain)
    assert torch.equal(loss(0.49, AWP(0.05, warmup=0.5)), plain)
    assert loss(0.5, AWP(0.05, warmup=0.5)) > plain


def test_a_step_makes_each_pass_once(world: World) -> None:
    step = step_of(world.method("ard"), world.batch())
    assert step.student_logits is step.student_logits
    assert step.teacher_logits is step.teacher_logits
    step.logs["seen"] = torch.ones(())
    again = step.again()
    assert again.teacher_logits is step.teacher_logits
    assert again.adv_images is step.adv_images
    assert again.student_logits is not step.student_logits
    assert not again.logs

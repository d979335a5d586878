import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gacd.losses import fused
from gacd.losses.contrastive import (
    crd_nce,
    gacd_loss,
    info_nce,
    log_partition,
    project_anchors,
)
from gacd.losses.information import info_nce_bound_of
from gacd.losses.pairs import Pairs
from losses.problems import DOUBLE, problem, raw_problem
from reference.gacd_eq9 import crd, eq9, exact_log_z

TESTS = Path(__file__).parents[1]


def dense(p: dict[str, Any], *, k: int, temperature: float, z_gradient: bool = False) -> Tensor:
    """The loss with the whole matrix of scores and autograd, exact Z over the anchors."""
    scores_BM = p["student_BE"] @ p["anchors_MD"].T / temperature
    log_z_B = scores_BM.logsumexp(1, keepdim=True)
    offset_B1 = (log_z_B if z_gradient else log_z_B.detach()) + math.log(k / scores_BM.shape[1])
    h_BM = (scores_BM - offset_B1).sigmoid()
    positive_B = (p["student_BE"] * p["positive_BE"]).sum(1, keepdim=True) / temperature
    other_BM = p["labels_B"][:, None] != p["anchor_labels_M"]
    terms_BM = other_BM * p["anchor_weights_M"] * (1 - h_BM).log()
    positive_h_B = (positive_B - offset_B1).sigmoid()[:, 0]
    return -p["weights_B"] * positive_h_B.log() - k * terms_BM.sum(1) / other_BM.sum(1)


@pytest.mark.parametrize("log_z", [None, 0.0, 3.0])
@pytest.mark.parametrize("k", [7, 500])
def test_equals_the_loop_over_eq_9(chunking: None, log_z: float | None, k: int) -> None:
    p = problem()
    z = None if log_z is None else torch.tensor(log_z, dtype=DOUBLE)
    loss_B = gacd_loss(**p, temperature=0.3, negatives=k, log_z=z)
    log_zs = exact_log_z(p["student_BE"], p["anchors_MD"], 0.3) if log_z is None else [log_z] * 5
    torch.testing.assert_close(loss_B, eq9(*p.values(), log_zs, k, 23, 0.3))


@pytest.mark.parametrize("z_gradient", [False, True])
def test_gradients_equal_those_of_the_whole_matrix(chunking: None, z_gradient: bool) -> None:
    p, weight, bias = raw_problem()
    leaves = [p["student_BE"].requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    upstream_B = torch.rand(5, dtype=DOUBLE)
    options = {"temperature": 0.3, "z_gradient": z_gradient}
    loss_B = gacd_loss(
        **p, projection_weight_ED=weight, projection_bias_E=bias, negatives=9, **options
    )
    projected = p | {"anchors_MD": F.normalize(F.linear(p["anchors_MD"], weight, bias), dim=1)}
    expected_B = dense(projected, k=9, **options)
    torch.testing.assert_close(loss_B, expected_B)
    torch.testing.assert_close(
        torch.autograd.grad(loss_B, leaves, upstream_B),
        torch.autograd.grad(expected_B, leaves, upstream_B),
    )


@pytest.mark.parametrize("exact_z", [True, False])
def test_gradcheck_for_student_and_both_projections(chunking: None, exact_z: bool) -> None:
    p, weight, bias = raw_problem(batch=3, anchors=11, width=5)
    student = torch.randn(3, 4, dtype=DOUBLE)
    student_weight = torch.randn(6, 4, dtype=DOUBLE)
    positive_features = p["anchors_MD"][:3]

    def loss(*leaves: Tensor) -> Tensor:
        student, student_weight, weight, bias = leaves
        return gacd_loss(
            **p
            | {
                "student_BE": F.normalize(student @ student_weight.T, dim=1),
                "positive_BE": F.normalize(F.linear(positive_features, weight, bias), dim=1),
            },
            projection_weight_ED=weight,
            projection_bias_E=bias,
            temperature=0.5,
            negatives=20,
            log_z=None if exact_z else torch.tensor(2.0, dtype=DOUBLE),
            z_gradient=True,
        )

    leaves = [leaf.requires_grad_() for leaf in (student, student_weight, weight, bias)]
    assert torch.autograd.gradcheck(loss, leaves)


def test_a_sample_of_anchors_is_unbiased(generator: torch.Generator) -> None:
    """Two-sided z-test on 1500 draws; |z| < 4 fails a sound estimator once in 16,000 seeds."""
    p = problem(anchors=40)
    options = {"temperature": 0.3, "negatives": 64, "log_z": torch.tensor(3.0, dtype=DOUBLE)}
    exact_B = gacd_loss(**p, **options)
    draws_nB = torch.stack(
        [
            gacd_loss(
                **p | {name: p[name][rows] for name in p if "anchor" in name},
                dataset_size=40,
                **options,
            )
            for rows in torch.randint(40, (1500, 16), generator=generator)
        ]
    )
    z_B = (draws_nB.mean(0) - exact_B) / (draws_nB.std(0) / math.sqrt(1500))
    assert draws_nB.std(0).min() > 0.01
    assert z_B.abs().max() < 4, z_B


def test_a_sampled_partition_is_unbiased_and_counts_the_positive_once(
    generator: torch.Generator,
) -> None:
    """As above, for Z rather than for log Z, at |z| < 4; own anchors drawn must not count twice."""
    p = problem(anchors=40)
    names = "student_BE", "positive_BE", "anchors_MD"
    index_B = (p["positive_BE"] @ p["anchors_MD"].T).argmax(1)
    exact_B = log_partition(*(p[name] for name in names), index_B=index_B, temperature=0.3)
    whole_B = (p["student_BE"] @ p["anchors_MD"].T / 0.3).logsumexp(1)
    torch.testing.assert_close(exact_B, whole_B)
    draws_nB = torch.stack(
        [
            log_partition(
                *(p[name] for name in names[:2]),
                p["anchors_MD"][rows],
                index_B=index_B,
                anchor_index_M=rows,
                dataset_size=40,
                temperature=0.3,
            ).exp()
            for rows in torch.randint(40, (1500, 16), generator=generator)
        ]
    )
    z_B = (draws_nB.mean(0) - exact_B.exp()) / (draws_nB.std(0) / math.sqrt(1500))
    assert z_B.abs().max() < 4, z_B


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 6), classes=st.integers(1, 6))
def test_the_order_of_anchors_and_images_does_not_matter(
    seed: int, batch: int, classes: int
) -> None:
    p = problem(batch, classes=classes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    anchors, images = (torch.randperm(n, generator=generator) for n in (23, batch))
    shuffled = {name: p[name][anchors if "anchor" in name else images] for name in p}
    torch.testing.assert_close(gacd_loss(**shuffled), gacd_loss(**p)[images])


def test_a_weight_of_zero_silences_an_anchor_and_an_image() -> None:
    p, weight, _ = raw_problem()
    p["student_BE"].requires_grad_()
    p["anchor_weights_M"][3] = 0
    p["weights_B"][1] = 0
    z = torch.tensor(2.0, dtype=DOUBLE)

    def gradient(p: dict[str, Any]) -> Tensor:
        loss_B = gacd_loss(**p, projection_weight_ED=weight, log_z=z)
        return torch.autograd.grad(loss_B.sum(), p["student_BE"])[0]

    moved = p | {"anchors_MD": p["anchors_MD"].clone(), "positive_BE": p["positive_BE"].clone()}
    moved["anchors_MD"][3] = 7.0
    moved["positive_BE"][1] = -p["positive_BE"][1]
    torch.testing.assert_close(gradient(moved), gradient(p))
    p["anchor_weights_M"][3] = p["weights_B"][1] = 1
    assert not torch.allclose(gradient(moved), gradient(p))


def test_one_class_only_leaves_the_positive_term() -> None:
    p = problem(classes=1)
    p["student_BE"].requires_grad_()
    loss_B = gacd_loss(**p, negatives=4, log_z=torch.tensor(1.0, dtype=DOUBLE))
    positive_B = (p["student_BE"] * p["positive_BE"]).sum(1) / 0.1
    expected_B = p["weights_B"] * F.softplus(1 + math.log(4 / 23) - positive_B)
    torch.testing.assert_close(loss_B, expected_B)
    torch.testing.assert_close(
        torch.autograd.grad(loss_B.sum(), p["student_BE"]),
        torch.autograd.grad(expected_B.sum(), p["student_BE"]),
    )


def test_duplicated_anchors_change_nothing() -> None:
    p = problem()
    twice = {name: torch.cat([p[name]] * 2) if "anchor" in name else p[name] for name in p}
    torch.testing.assert_close(gacd_loss(**twice, dataset_size=23), gacd_loss(**p))


@pytest.mark.parametrize("window", [2, 7])
def test_labels_are_looked_up_a_window_at_a_time(
    monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    p = problem()
    expected_B = gacd_loss(**p)
    monkeypatch.setattr(fused, "CPU_BYTES", 160)  # three anchors a chunk
    monkeypatch.setattr(fused, "WINDOW", window)
    torch.testing.assert_close(gacd_loss(**p), expected_B)


def test_an_image_alone_with_its_own_anchor_is_sure_of_it() -> None:
    p = problem(batch=1, anchors=1)
    student = p["student_BE"].requires_grad_()
    own = {"index_B": torch.zeros(1, dtype=torch.int64)}
    loss_B = info_nce(student, p["positive_BE"], p["anchors_MD"], **own)
    (slope,) = torch.autograd.grad(loss_B.sum(), student)
    assert not loss_B.any() and not slope.any()


def test_a_partition_that_a_monitor_needed_first_still_has_its_gradient() -> None:
    p = problem()
    student = p["student_BE"].requires_grad_()
    pairs = Pairs(student, p["positive_BE"], p["anchors_MD"])
    assert not info_nce_bound_of(pairs).nats.requires_grad
    expected_B = log_partition(student, p["positive_BE"], p["anchors_MD"])
    torch.testing.assert_close(
        torch.autograd.grad(pairs.log_partition().sum(), student),
        torch.autograd.grad(expected_B.sum(), student),
    )


def test_an_anchor_that_projects_to_nothing_is_harmless() -> None:
    p, weight, _ = raw_problem()
    p["anchors_MD"][5] = 0
    weight.requires_grad_()
    gacd_loss(**p, projection_weight_ED=weight).sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_the_matrix_of_scores_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **kwargs or {})
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, out.numel())
            return out

    monkeypatch.setattr(fused, "CPU_BYTES", 40_000)
    p, weight, bias = raw_problem(batch=50, anchors=2000)
    weight.requires_grad_()
    given = {value.untyped_storage().data_ptr() for value in p.values()}
    with Largest() as largest:
        gacd_loss(**p, projection_weight_ED=weight, projection_bias_E=bias).sum().backward()
    assert largest.numel == 50 * 100


def test_info_nce_is_cross_entropy_over_the_bank(chunking: None) -> None:
    p = problem()
    student, positive, anchors = p["student_BE"].requires_grad_(), p["positive_BE"], p["anchors_MD"]
    index_B = (positive @ anchors.T).argmax(1)
    expected_B = F.cross_entropy(student @ anchors.T / 0.2, index_B, reduction="none")
    for known in ({}, {"index_B": index_B}):
        loss_B = info_nce(student, positive, anchors, temperature=0.2, **known)
        torch.testing.assert_close(loss_B, expected_B)
        torch.testing.assert_close(
            torch.autograd.grad(loss_B.sum(), student),
            torch.autograd.grad(expected_B.sum(), student, retain_graph=True),
        )


def test_crd_equals_its_loop(generator: torch.Generator) -> None:
    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator, dtype=DOUBLE), dim=-1)

    student, teacher, memory_s, memory_t = unit(3, 5), unit(3, 5), unit(3, 8, 5), unit(3, 8, 5)
    weights_BJ = torch.rand(3, 8, generator=generator, dtype=DOUBLE)
    weights_B = torch.rand(3, generator=generator, dtype=DOUBLE)
    loss_B = crd_nce(
        student,
        teacher,
        memory_s,
        memory_t,
        dataset_size=50,
        student_log_z=torch.tensor(3.0, dtype=DOUBLE),
        teacher_log_z=torch.tensor(4.0, dtype=DOUBLE),
        weights_B=weights_B,
        weights_BJ=weights_BJ,
        temperature=0.2,
    )
    queries_BJ = weights_B[:, None].expand(3, 8)
    expected_B = crd(student, memory_t, weights_BJ, 3.0, 50, 0.2)
    expected_B += crd(teacher, memory_s, queries_BJ, 4.0, 50, 0.2)
    torch.testing.assert_close(loss_B, expected_B)


def test_crd_has_the_gradient_of_its_queries_alone_and_no_order_of_negatives(
    generator: torch.Generator,
) -> None:
    student, teacher, memory_s, memory_t = (
        F.normalize(torch.randn(*shape, generator=generator, dtype=DOUBLE), dim=-1)
        for shape in ((3, 5), (3, 5), (3, 8, 5), (3, 8, 5))
    )
    setting = {"dataset_size": 50, "temperature": 0.2}
    setting |= {"student_log_z": torch.tensor(3.0), "teacher_log_z": torch.tensor(4.0)}
    queries = student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, t: crd_nce(s, t, memory_s, memory_t, **setting), queries
    )
    order = torch.tensor([0, 3, 1, 7, 2, 6, 5, 4])
    loss_B = crd_nce(student, teacher, memory_s, memory_t, **setting)
    other_B = crd_nce(student, teacher, memory_s[:, order], memory_t[:, order], **setting)
    torch.testing.assert_close(loss_B, other_B)
    one_B = crd_nce(student[:1], teacher[:1], memory_s[:1], memory_t[:1], **setting)
    torch.testing.assert_close(one_B, loss_B[:1])


def test_projected_anchors_give_the_same_loss() -> None:
    p, weight, bias = raw_problem()
    weight.requires_grad_()  # what is projected beforehand is a constant
    live_B = gacd_loss(**p, projection_weight_ED=weight, projection_bias_E=bias)
    frozen = p | {"anchors_MD": project_anchors(p["anchors_MD"], weight, bias)}
    torch.testing.assert_close(gacd_loss(**frozen), live_B)


COMPILED = """
import torch
from gacd.losses.contrastive import gacd_loss
from losses.problems import raw_problem

p, weight, _ = raw_problem()
p = {name: value.float() if value.is_floating_point() else value for name, value in p.items()}
leaves = p.pop("student_BE").requires_grad_(), weight.float().requires_grad_()

def loss(student, weight):
    return gacd_loss(student, **p, projection_weight_ED=weight).mean()

def run(function):
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)

torch.testing.assert_close(run(torch.compile(loss, backend="aot_eager")), run(loss))
"""


def test_a_compiled_loss_has_the_values_and_slopes_of_a_plain_one() -> None:
    """In a process of its own: some compilers stumble over the tests' checks of shapes."""
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS)
    assert done.returncode == 0, done.stderr


def test_what_is_kept_of_the_anchors_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CPU_BYTES", 160)
    monkeypatch.setattr(fused, "KEPT_BYTES", 1000)
    p, weight, bias = raw_problem(anchors=200)
    scores = fused.Scores(p["student_BE"], p["anchors_MD"], weight, bias, temperature=0.1)
    for _ in scores:
        held = sum(c.z_cE.nbytes + c.products_cB.nbytes for c in scores._kept)
        assert held <= 1000
    assert held > 500

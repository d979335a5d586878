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

from gacd.errors import UserError
from gacd.losses import fused
from gacd.losses.contrastive import (
    crd_nce,
    gacd_loss,
    info_nce,
    log_partition,
    nce,
    project_anchors,
)
from gacd.losses.information import info_nce_bound_of
from gacd.losses.pairs import Pairs
from reference.gacd_eq9 import crd, eq9, exact_log_z

DOUBLE = torch.float64


def problem(
    batch: int = 5, anchors: int = 23, width: int = 6, classes: int = 4, seed: int = 0
) -> dict[str, Any]:
    """A random problem in float64 whose images are rows of the bank."""
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, width, generator=generator, dtype=DOUBLE), dim=1)

    index_B = torch.randperm(anchors, generator=generator)[:batch]
    anchors_ME = unit(anchors)
    labels_M = torch.randint(classes, (anchors,), generator=generator)
    weights_M = torch.rand(anchors, generator=generator, dtype=DOUBLE)
    return {
        "student_BE": unit(batch),
        "positive_BE": anchors_ME[index_B],
        "anchors_MD": anchors_ME,
        "labels_B": labels_M[index_B],
        "anchor_labels_M": labels_M,
        "weights_B": weights_M[index_B],
        "anchor_weights_M": weights_M,
    }


def raw_problem(width: int = 9, **sizes: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The same with raw anchors, and the projection's weight and bias."""
    p = problem(**sizes)
    generator = torch.Generator().manual_seed(1)
    p["anchors_MD"] = torch.randn(
        len(p["anchors_MD"]), width, generator=generator, dtype=DOUBLE
    ).relu()
    embedding = p["student_BE"].shape[1]
    weight_ED = torch.randn(embedding, width, generator=generator, dtype=DOUBLE)
    return p, weight_ED, torch.randn(embedding, generator=generator, dtype=DOUBLE)


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


@pytest.fixture(params=["one chunk", "chunks kept", "chunks formed again"])
def chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the anchors in one piece and in pieces of 4."""
    if request.param != "one chunk":
        monkeypatch.setattr(fused, "CPU_ELEMENTS", 20)
    if request.param == "chunks formed again":
        monkeypatch.setattr(fused, "KEPT_BYTES", 400)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1e3])
@pytest.mark.parametrize("sizes", [{"batch": 1}, {"classes": 1}, {"batch": 23, "width": 1}, {}])
def test_finite_in_every_precision(
    dtype: torch.dtype, temperature: float, sizes: dict[str, int]
) -> None:
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


def test_bfloat16_is_near_float64(generator: torch.Generator) -> None:
    p, weight, bias = raw_problem(64, batch=16, anchors=3000, classes=10)
    names = {"projection_weight_ED": weight, "projection_bias_E": bias}

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        anchors = p["anchors_MD"].to(dtype)
        leaves = [p["student_BE"].clone().requires_grad_(), weight.clone().requires_grad_()]
        q = p | {"anchors_MD": anchors, "student_BE": leaves[0]}
        loss_B = gacd_loss(**q, **names | {"projection_weight_ED": leaves[1]}, negatives=1000)
        return loss_B.detach(), *torch.autograd.grad(loss_B.mean(), leaves)

    for half, full, tolerance in zip(
        run(torch.bfloat16), run(torch.float64), (0.01, 0.02, 0.02), strict=True
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


@pytest.mark.parametrize("window", [2, 7])
def test_labels_are_looked_up_a_window_at_a_time(
    monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    p = problem()
    expected_B = gacd_loss(**p)
    monkeypatch.setattr(fused, "CPU_ELEMENTS", 20)  # three anchors a chunk
    monkeypatch.setattr(fused, "WINDOW", window)
    torch.testing.assert_close(gacd_loss(**p), expected_B)


def test_an_image_alone_with_its_own_anchor_is_sure_of_it() -> None:
    p = problem(batch=1, anchors=1)
    student = p["student_BE"].requires_grad_()
    own = {"index_B": torch.zeros(1, dtype=torch.int64)}
    loss_B = info_nce(student, p["positive_BE"], p["anchors_MD"], **own)
    (slope,) = torch.autograd.grad(loss_B.sum(), student)
    assert not loss_B.any() and not slope.any()


def test_a_projection_that_moved_before_the_backward_pass_is_noticed() -> None:
    p, weight, _ = raw_problem()
    loss = gacd_loss(**p, projection_weight_ED=weight.requires_grad_()).sum()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


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


def test_a_second_derivative_is_refused() -> None:
    p = problem()
    student = p.pop("student_BE").requires_grad_()
    loss = gacd_loss(student, **p, temperature=0.1, negatives=3).sum()
    with pytest.raises(UserError, match="first derivative alone"):
        torch.autograd.grad(loss, student, create_graph=True)


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


def test_no_gradient_and_no_mutation_where_none_belongs() -> None:
    p, weight, _ = raw_problem()
    before = {name: value.clone() for name, value in p.items()}
    p["student_BE"].requires_grad_()
    z = torch.tensor(1.0, dtype=DOUBLE)
    gacd_loss(**p, projection_weight_ED=weight, log_z=z).sum().backward()
    assert all(torch.equal(p[name], before[name]) for name in p)
    assert weight.grad is None and z.grad is None and p["anchors_MD"].grad is None
    assert not gacd_loss(**before, projection_weight_ED=weight).requires_grad
    with pytest.raises(UserError, match="constants"):
        gacd_loss(**problem() | {"anchors_MD": problem()["anchors_MD"].requires_grad_()})


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

    monkeypatch.setattr(fused, "CPU_ELEMENTS", 5000)
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


def test_projected_anchors_give_the_same_loss() -> None:
    p, weight, bias = raw_problem()
    weight.requires_grad_()  # what is projected beforehand is a constant
    live_B = gacd_loss(**p, projection_weight_ED=weight, projection_bias_E=bias)
    frozen = p | {"anchors_MD": project_anchors(p["anchors_MD"], weight, bias)}
    torch.testing.assert_close(gacd_loss(**frozen), live_B)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"negatives": 0}, "negatives"),
        ({"anchor_weights_M": torch.ones(23, requires_grad=True)}, "constants get no gradient"),
        ({"projection_weight_ED": torch.ones(6, 5)}, r"\[6, 5\], .* it must be \[6, 6\]"),
        ({"projection_bias_E": torch.ones(6)}, "goes with projection_weight_ED"),
        ({"index_B": torch.arange(5), "dataset_size": 99}, "say with anchor_index_M which rows"),
        ({"dataset_size": 0}, "dataset_size"),
        ({"student_BE": torch.ones(5, 7), "positive_BE": torch.ones(5, 7)}, "projection_weight_ED"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gacd_loss(**problem() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive_BE": torch.ones(1, 6)}, "positive_BE is [1, 6], but student_BE [5, 6]"),
        ({"labels_B": torch.ones(4).long()}, "labels_B is [4], but there are 5 images"),
        ({"weights_B": torch.ones(5, 1)}, "weights_B is [5, 1], but there are 5 images"),
        ({"index_B": torch.ones(6).long()}, "index_B is [6], but there are 5 images"),
        (
            {"anchor_labels_M": torch.ones(99).long()},
            "anchor_labels_M is [99], but there are 23 anchors",
        ),
        (
            {"anchor_weights_M": torch.ones(99)},
            "anchor_weights_M is [99], but there are 23 anchors",
        ),
        (
            {"index_B": torch.arange(5), "anchor_index_M": torch.arange(24)},
            "anchor_index_M is [24], but there are 23 anchors",
        ),
        ({"student_BE": torch.ones(0, 6), "positive_BE": torch.ones(0, 6)}, "holds no image"),
        ({"projection_weight_ED": torch.ones(6, 6), "projection_bias_E": torch.ones(5)}, "be [6]"),
        ({"log_z": torch.ones(7)}, "log_z is one constant, not [7]"),
        ({"temperature": torch.tensor(0.1, requires_grad=True)}, "temperature: constants get no"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_where_types_are_not_checked(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """As in a user's own loop: a process without the tests' checks of every shape."""
    torch.save(problem() | change, tmp_path / "arguments.pt")
    program = (
        "import torch; from gacd.losses.contrastive import gacd_loss; "
        f"gacd_loss(**torch.load({str(tmp_path / 'arguments.pt')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("gacd.errors.UserError: ")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("candidates", "temperature", "message"),
    [(1, 0.1, "at least one negative"), (3, -1.0, "temperature must be above 0, not -1.0")],
)
def test_nce_refuses_what_has_no_value(candidates: int, temperature: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        nce(
            torch.randn(2, 4),
            torch.randn(2, candidates, 4),
            dataset_size=5,
            log_z=torch.zeros(()),
            temperature=temperature,
        )


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


@pytest.mark.filterwarnings("ignore")  # of torch's own, about what it compiles
def test_a_compiled_loss_has_the_values_and_slopes_of_a_plain_one() -> None:
    p, weight, _ = raw_problem()
    p = {name: value.float() if value.is_floating_point() else value for name, value in p.items()}
    leaves = p.pop("student_BE").requires_grad_(), weight.float().requires_grad_()

    def loss(student: Tensor, weight: Tensor) -> Tensor:
        return gacd_loss(student, **p, projection_weight_ED=weight).mean()

    def run(function: Any) -> tuple[Tensor, ...]:
        value = function(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    torch.testing.assert_close(run(torch.compile(loss, backend="aot_eager")), run(loss))

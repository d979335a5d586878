"""Distillation by the teacher's outputs: one loss per image [B], reduced last by the caller.

`KL(p || q) = sum_k p_k log(p_k / q_k)`: summed over the classes, never divided by their number.
The teacher is always the reference p, whichever way round a paper prints its arguments: that is
what the published codes compute, and it is Hinton's soft cross-entropy less a constant. `S(x)`,
`T(x)` are the student's and the teacher's logits, `T` alone is the temperature, and KL is of their
softmax; `x'` is the adversarial image, `y` the label.

Everything is computed in float32 or wider, whatever the logits' type and under any autocast. The
teacher's logits are used as they come: detach them (or compute them without gradients) beforehand.
UserError is raised for a temperature that is not positive, a mixing weight (alpha, adv_weight)
outside [0, 1], a negative beta, or outputs of different shapes.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gacd.errors import UserError
from gacd.shapes import Labels, Logits, PerSample


def log_probs(logits: Logits, *, temperature: float = 1.0) -> Logits:
    """`log softmax(logits / temperature)`, in float32 or wider. UserError if temperature <= 0."""
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, not {temperature:g}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide / temperature, dim=1)


def check_beta(beta: float) -> None:
    """Refuse a negative weight."""
    if beta < 0:
        raise UserError(f"beta must be 0 or above, not {beta:g}")


def cross_entropy(logits: Logits, labels: Labels) -> PerSample:
    """`-log softmax(logits)[y]`."""
    return F.nll_loss(log_probs(logits), labels.long(), reduction="none")


def soft_kl(logits: Logits, target_logits: Logits, *, temperature: float = 1.0) -> PerSample:
    """`T^2 KL(softmax(target_logits / T) || softmax(logits / T))`.

    T^2 keeps the gradient's size as T grows (Hinton et al. 2015, section 2).
    """
    if logits.shape != target_logits.shape:
        raise UserError(
            f"logits are {list(logits.shape)}, but those of the teacher {list(target_logits.shape)}"
        )
    log_q = log_probs(logits, temperature=temperature)
    log_p = log_probs(target_logits, temperature=temperature)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def kd(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Labels,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
) -> PerSample:
    """Knowledge distillation on clean images: labels and softened teacher outputs.

    `(1 - alpha) CE(S(x), y) + alpha T^2 KL(T(x)/T || S(x)/T)`

    Source: Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), section 2; T = 4 and alpha = 0.9 are the
    usual settings of the CRD benchmark.
    """
    soft = soft_kl(student_logits, teacher_logits, temperature=temperature)
    return _mix(alpha, soft, cross_entropy(student_logits, labels))


def ard(
    student_adv_logits: Logits,
    teacher_logits: Logits,
    student_logits: Logits,
    labels: Labels,
    *,
    temperature: float = 30.0,
    alpha: float = 1.0,
) -> PerSample:
    """Adversarially robust distillation: on x' the student says what the teacher says of x.

    `(1 - alpha) CE(S(x), y) + alpha T^2 KL(T(x)/T || S(x')/T)`

    Source: Goldblum et al. 2020 (arXiv:1905.09747), the ARD objective. Their code averages the KL
    over the classes too, and so weighs it K times less against the cross-entropy.
    """
    soft = soft_kl(student_adv_logits, teacher_logits, temperature=temperature)
    return _mix(alpha, soft, cross_entropy(student_logits, labels))


def rslad(
    student_adv_logits: Logits,
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    adv_weight: float = 5 / 6,
) -> PerSample:
    """Robust soft labels: the teacher's clean output is the only target, of x' and of x.

    `adv_weight KL(T(x) || S(x')) + (1 - adv_weight) KL(T(x) || S(x))`

    Source: Zi et al. 2021 (arXiv:2108.07969), the outer minimisation of RSLAD. Their code averages
    over the classes too.
    """
    adv = soft_kl(student_adv_logits, teacher_logits)
    return _mix(adv_weight, adv, soft_kl(student_logits, teacher_logits))


def iad(
    *,
    student_adv_logits: Logits,
    student_logits: Logits,
    teacher_adv_logits: Logits,
    teacher_logits: Logits,
    labels: Labels,
    temperature: float = 1.0,
    beta: float = 0.1,
) -> PerSample:
    """Introspective distillation: where the teacher fails on x', the student trusts itself.

    `a T^2 KL(T(x)/T || S(x')/T) + (1 - a) KL(S(x) || S(x'))`, `a = softmax(T(x'))[y] ^ beta`

    beta = 0 trusts the teacher everywhere (a = 1): that is the published warm-up (60 epochs), and
    ARD with alpha = 1. The student's own target S(x) is differentiated, `a` is a constant.

    Source: Zhu et al. 2022 (arXiv:2106.04928), section 3. Their code leaves the first `a` out.
    UserError if beta < 0.
    """
    check_beta(beta)
    trust = (-beta * cross_entropy(teacher_adv_logits, labels)).exp().detach()
    guidance = soft_kl(student_adv_logits, teacher_logits, temperature=temperature)
    return trust * guidance + (1 - trust) * soft_kl(student_adv_logits, student_logits)


def adaad(
    *,
    student_adv_logits: Logits,
    student_logits: Logits,
    teacher_adv_logits: Logits,
    teacher_logits: Logits,
    adv_weight: float = 1.0,
) -> PerSample:
    """Adaptive distillation: at x' and at x the student says what the teacher says at that point.

    `adv_weight KL(T(x') || S(x')) + (1 - adv_weight) KL(T(x) || S(x))`

    x' maximises the first KL, through the teacher too. Source: Huang et al. 2023 (CVPR), the outer
    minimisation of AdaAD. Their code averages over the classes on CIFAR-10, sums on CIFAR-100.
    """
    adv = soft_kl(student_adv_logits, teacher_adv_logits)
    return _mix(adv_weight, adv, soft_kl(student_logits, teacher_logits))


def igdm(
    *,
    student_plus_logits: Logits,
    student_minus_logits: Logits,
    teacher_plus_logits: Logits,
    teacher_minus_logits: Logits,
) -> PerSample:
    """Indirect gradient matching, to add to another loss: outputs change alike along x' - x.

    `KL(softmax(T(x + d) - T(x - d)) || softmax(S(x + d) - S(x - d)))`, `d = x' - x`

    The differences stand for input gradients, to first order. The published weight of the term
    grows linearly from 0 over the training (to 20 on CIFAR-100); weighing is left to the caller.

    Source: Lee, Cho, Kim 2025 (arXiv:2312.03286), the IGDM loss.
    """
    return soft_kl(
        _difference(student_plus_logits, student_minus_logits),
        _difference(teacher_plus_logits, teacher_minus_logits),
    )


def feature_regression(
    student_features: Float[Tensor, "B E"], teacher_features: Float[Tensor, "B E"]
) -> PerSample:
    """`mean_e (s_e - t_e)^2`: the student's projected features against the teacher's.

    Source: the hint loss of FitNets, Romero et al. 2015 (arXiv:1412.6550), equation 3, with the
    mean over the dimensions for its half sum, so that a weight means the same at any width.
    """
    return _difference(student_features, teacher_features).square().mean(1)


def _mix(weight: float, first: PerSample, second: PerSample) -> PerSample:
    if not 0 <= weight <= 1:
        raise UserError(f"a mixing weight (alpha, adv_weight) lies in 0 to 1, not {weight:g}")
    return weight * first + (1 - weight) * second


def _difference(a: Float[Tensor, "B E"], b: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
    if a.shape != b.shape:
        raise UserError(f"outputs to compare are {list(a.shape)} and {list(b.shape)}")
    # Widened first: a half-precision difference is rounded, and its square may overflow.
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide) - b.to(wide)

"""Projected gradient ascent on any objective, within any threat model: a pure function."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor

from gacd.attacks.objectives import Objective, PerImage
from gacd.attacks.threat import ThreatModel
from gacd.errors import UserError
from gacd.shapes import Images

_SLACK = 1e-3  # out of [0, 1], of rounding
Step = Callable[[Objective, Images, Images, Images], tuple[Images, Images]]


def pgd(
    objective: Objective,
    x: Images,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float,
    restarts: int = 1,
    momentum: float = 0.0,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    is_broken: PerImage | None = None,
) -> Images:
    """Images within the threat model's reach of `x` at which the objective is large.

    x' <- project(ascend(x', grad objective(x'), step_size)), `steps` times, from a random point of
    the ball (drawn with `generator`) or from `x`. `step_size` is in the units of `threat.eps`.
    Momentum m steps along g <- m g + grad / mean|grad|. Of several restarts each image keeps the
    best; the first draws the same start however many follow. An image for which `is_broken` holds
    is attacked no further: it keeps the point that broke it. That costs the others one more forward
    pass before each step.

    Only the gradient of the images is computed. Parameters, modes and `.grad` are left alone, so
    eval mode is the caller's to set (`gacd.models.modes.evaluating`): only in it do batch
    normalisation's statistics stay, too. Under autocast the images stay float32. Without
    `is_broken` nothing waits for the device, and without a generator torch.compile takes it whole
    (torch 2.14, trace_autograd_ops = True). The result is detached, in the memory format of `x`.
    Raises UserError for settings out of range, an objective that is not one number an image, and,
    on the CPU (a look at a GPU waits for it), images out of [0, 1]. Source: Madry et al. 2018; Dong
    et al. 2018, Eq. 6.
    """
    threat.check_step(step_size)
    _check(x, steps, restarts, momentum)
    if not (is_broken is None or isinstance(is_broken, PerImage)):
        raise UserError("is_broken must be a gacd.attacks.objectives.PerImage, as misclassified is")
    x = x.detach()
    step = partial(_step, threat=threat, step_size=step_size, momentum=momentum)

    def climb(x_adv: Images) -> Images:
        if is_broken is None:
            return _climb(objective, x, x_adv, steps, step)
        if isinstance(objective, PerImage):
            return _climb_until(is_broken, objective, x, x_adv, steps, step)
        raise UserError(
            "is_broken needs an objective of single images, a gacd.attacks.objectives.PerImage "
            "(feature transport is none)"
        )

    with torch.enable_grad():
        best = climb(_start(x, threat, random_start, generator))
        for _ in range(restarts - 1):
            x_adv = _start(x, threat, random_start, generator)
            if is_broken is not None:  # begins where it is broken already, and so is left there
                x_adv = _where(is_broken(best), best, x_adv)
            x_adv = climb(x_adv)
            better = objective(x_adv) > objective(best)
            if is_broken is not None:
                better = better | is_broken(x_adv)
            best = _where(better, x_adv, best)
    return threat.project(best, x)


def fgsm(objective: Objective, x: Images, threat: ThreatModel) -> Images:
    """One step of length eps from `x` itself, cut to the box (Goodfellow et al. 2015).

    l_inf: x + eps sign(grad); l_2: x + eps grad / |grad|. Raises as `pgd` does.
    """
    return pgd(objective, x, threat, steps=1, step_size=threat.eps, random_start=False)


def check_range(x: Images) -> None:
    """Refuse images out of [0, 1], such as normalised ones."""
    low, high = (float(end) for end in x.detach().aminmax()) if x.numel() else (0.0, 1.0)
    if not (low > -_SLACK and high < 1 + _SLACK):
        raise UserError(
            f"images to attack must lie in [0, 1], not in [{low:.3g}, {high:.3g}]: divide bytes by "
            "255, clamp after resizing, and normalise inside the model"
        )


def _start(
    x: Images, threat: ThreatModel, random_start: bool, generator: torch.Generator | None
) -> Images:
    if not random_start:
        return x
    if generator is None:
        raise UserError("a random start needs generator=torch.Generator(device=...)")
    return threat.random_start(x, generator)


def _climb(objective: Objective, x: Images, x_adv: Images, steps: int, step: Step) -> Images:
    velocity = torch.zeros_like(x)
    for _ in range(steps):
        x_adv, velocity = step(objective, x, x_adv, velocity)
    return x_adv


def _climb_until(
    is_broken: PerImage, objective: PerImage, x: Images, x_adv: Images, steps: int, step: Step
) -> Images:
    x_adv, velocity = x_adv.clone(), torch.zeros_like(x)
    rows = torch.arange(len(x), device=x.device)
    for _ in range(steps):
        rows = rows[~is_broken.rows(rows)(x_adv[rows])]
        if not len(rows):
            break
        x_adv[rows], velocity[rows] = step(
            objective.rows(rows), x[rows], x_adv[rows], velocity[rows]
        )
    return x_adv


def _step(
    objective: Objective,
    x: Images,
    x_adv: Images,
    velocity: Images,
    *,
    threat: ThreatModel,
    step_size: float,
    momentum: float,
) -> tuple[Images, Images]:
    leaf = x_adv.detach().requires_grad_()
    score_B = objective(leaf)
    if score_B.shape != (len(x_adv),):
        raise UserError(
            f"an objective gives one number an image, {[len(x_adv)]}, not {list(score_B.shape)}: "
            "no reduction over the batch"
        )
    if not score_B.requires_grad:
        raise UserError("the objective has no gradient: it must not detach, or run under no_grad")
    (grad,) = torch.autograd.grad(score_B.sum(), leaf)
    if momentum:
        scale = grad.abs().mean((1, 2, 3), keepdim=True)
        velocity = momentum * velocity + grad / scale.clamp_min(torch.finfo(grad.dtype).tiny)
        grad = velocity
    return threat.project(threat.ascend(x_adv, grad, step_size), x), velocity


def _where(choose: Bool[Tensor, " B"], x: Images, otherwise: Images) -> Images:
    return torch.where(choose[:, None, None, None], x, otherwise)


def _check(x: Images, steps: int, restarts: int, momentum: float) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise UserError(f"images to attack must be float32 in [0, 1], not {x.dtype}")
    if x.dim() != 4:
        raise UserError(f"images to attack must be [B, C, H, W], not {list(x.shape)}")
    if not torch.compiler.is_compiling():
        if torch.is_inference_mode_enabled():
            raise UserError("an attack needs gradients: torch.no_grad is fine, inference_mode not")
        if x.device.type == "cpu":
            check_range(x)
    if steps < 0 or momentum < 0:
        raise UserError("steps and momentum of an attack must not be negative")
    if restarts < 1:
        raise UserError(f"an attack needs at least one start, not restarts={restarts}")

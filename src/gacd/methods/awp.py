"""Adversarial weight perturbation, an addition to any method (Wu, Xia and Wang 2020)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gacd.methods.base import Step


class AWP(NamedTuple):
    """`gamma`: the size of the perturbation, 0: none; `warmup`: the share of training without."""

    gamma: float = 0.0
    warmup: float = 0.0


NO_AWP = AWP()


def perturbed_weights(
    method: nn.Module, arguments: tuple[Any, ...], step: Step, *, gamma: float
) -> dict[str, Tensor]:
    """w + v for each weight matrix or kernel of the student, v = gamma |w| g / |g|, layer by layer.

    g is the gradient of the loss on the attacked batch: one step of ascent of the whole length, as
    published. v is a constant, so the gradient at w + v is what then reaches w itself, and there is
    nothing to undo. Statistics and memories do not move here. Source: arXiv:2004.05884, Eq. 8 to
    12; its code also decays w + v where we, as in its algorithm, decay w.
    """
    weights = {
        name: p
        for name, p in method.named_parameters()
        if name.startswith("student.") and p.requires_grad and p.ndim > 1
    }
    buffers = {name: buffer.clone() for name, buffer in method.named_buffers()}
    first = step.again()
    first.generator = step.generator.clone_state()  # the same negatives, drawn twice
    loss = functional_call(method, buffers, arguments, {"attacked": first}).total
    # What the teacher answered it answers again: it is the student whose weights move.
    vars(step).update({k: v for k, v in vars(first).items() if k.startswith("teacher_")})
    gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    return {
        name: w + gamma * w.detach().norm() * g / g.norm().clamp_min(torch.finfo(g.dtype).tiny)
        for (name, w), g in zip(weights.items(), gradients, strict=True)
    }

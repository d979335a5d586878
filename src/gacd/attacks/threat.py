"""What an attacker may do to an image: a ball around it, cut by the box of valid images."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gacd.errors import UserError, unknown
from gacd.shapes import Images

Norm = Literal["linf", "l2"]
_PIXELS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """All images within `eps` of the given one and in [0, 1].

    `eps` is in units of [0, 1] images, for the norm of the whole image: 8/255 is usual for l_inf,
    0.5 for l_2. Nothing here is in place, and every result has the memory format of `x`.
    Raises UserError for an unknown norm, a negative or infinite eps, or an l_inf eps above 1.
    """

    norm: Norm = "linf"
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise unknown("norm", self.norm, get_args(Norm))
        top = 1.0 if self.norm == "linf" else math.inf
        if not 0 <= self.eps <= top or math.isinf(self.eps):
            raise UserError(
                f"eps is {self.eps:g}: an {self.norm} eps is in units of [0, 1] images, "
                f"e.g. {'8/255' if self.norm == 'linf' else '0.5'}"
            )

    def check_step(self, step_size: float) -> None:
        """Refuse a step that is negative, or, for l_inf, above 1, the whole range of a pixel."""
        if step_size < 0 or (self.norm == "linf" and step_size > 1):
            raise UserError(
                f"step_size is {step_size:g}: it must not be negative and is in the units of eps, "
                "of images in [0, 1], e.g. 2/255"
            )

    def step(self, size: float | None) -> float:
        """The size of an evaluation's steps: a quarter of eps, where none is given."""
        return self.eps / 4 if size is None else size

    def project(self, x_adv: Images, x: Images) -> Images:
        """`x_adv` brought into the ball around `x`, then into the box [0, 1].

        Both hold afterwards (to float rounding for the ball), since `x` lies in the box and cutting
        to it only brings a pixel nearer. For l_2 the ball's step is radial.
        """
        delta = x_adv - x
        if self.norm == "linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            length = _length(delta)
            delta = delta * (self.eps / length.clamp_min(_tiny(length))).clamp_max(1)
        return (x + delta).clamp(0, 1)

    def random_start(self, x: Images, generator: torch.Generator) -> Images:
        """A point drawn uniformly from the ball around each image, cut to the box."""
        if self.norm == "linf":
            delta = torch.empty_like(x).uniform_(-self.eps, self.eps, generator=generator)
        else:
            direction = torch.empty_like(x).normal_(generator=generator)
            volume = x.new_empty(len(x), 1, 1, 1).uniform_(generator=generator)
            radius = self.eps * volume ** (1 / x.shape[1:].numel())
            delta = direction * (radius / _length(direction))
        return self.project(x + delta, x)

    def ascend(self, x: Images, grad: Images, step_size: float) -> Images:
        """One step of steepest ascent, of length `step_size` in the norm, for each image alone.

        l_inf: x + s sign(g); l_2: x + s g / |g|. An image whose gradient is zero stays.
        """
        if self.norm == "linf":
            return x + step_size * grad.sign()
        # Scaled by its largest entry first: the squares of a vanishing gradient underflow.
        grad = grad / grad.abs().amax(_PIXELS, keepdim=True).clamp_min(_tiny(grad))
        length = _length(grad)
        return x + grad * (step_size / length.clamp_min(_tiny(length)))


def _length(delta: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(delta, dim=_PIXELS, keepdim=True)
    return length


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny

"""The running average of a method's weights."""

from copy import deepcopy
from itertools import chain

import torch

from gacd.methods.method import Method


def averaged(method: Method) -> Method:
    """A copy to hold the average; a teacher and an anchor bank are shared with the method."""
    return deepcopy(method).requires_grad_(False)


@torch.no_grad()
def update(average: Method, method: Method, *, decay: float) -> None:
    """a <- decay a + (1 - decay) w, for weights and floating-point buffers; others are copied."""
    pairs = list(
        zip(
            chain(average.parameters(), average.buffers()),
            chain(method.parameters(), method.buffers()),
            strict=True,
        )
    )
    real = [(a, w) for a, w in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in real], [w for _, w in real], 1 - decay)
    for a, w in pairs:
        if not a.is_floating_point():
            a.copy_(w)

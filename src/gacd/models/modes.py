"""Evaluation mode for the time of an attack, with everything put back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; every mode and flag as before outside.

    Each submodule gets its own mode back (one kept in evaluation inside a training network stays
    so) and each parameter its own `requires_grad`, also after an exception. `.grad` is not touched.
    One thread at a time: two that evaluate one model put back what the other has changed.
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    try:
        for part, _ in modes:
            part.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter, required in flags:
            parameter.requires_grad_(required)

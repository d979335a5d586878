"""Learning rates as pure functions of progress."""

import math
from typing import Literal

Schedule = Literal["cosine", "one-cycle", "constant"]


def learning_rate(progress: float, *, peak: float, schedule: Schedule, warmup: float) -> float:
    """The learning rate at `progress` in [0, 1) through training.

    First comes a linear rise over the share `warmup`; p runs from 0 to 1 over what follows it.
    cosine: peak (1 + cos(pi p)) / 2; one-cycle: a triangle, peak (1 - p) after a `warmup` of at
    least 0.3 (Smith 2018); constant: the peak.
    """
    if schedule == "one-cycle":
        warmup = max(warmup, 0.3)
    if progress < warmup:
        return peak * progress / warmup
    rest = (progress - warmup) / (1 - warmup)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * rest)) / 2
    if schedule == "one-cycle":
        return peak * (1 - rest)
    return peak

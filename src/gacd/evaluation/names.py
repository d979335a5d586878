"""Attacks by name."""

import re
from dataclasses import dataclass
from typing import Literal

from gacd.errors import unknown

Kind = Literal["natural", "noise", "fgsm", "pgd", "cw", "transfer", "autoattack"]
_EXAMPLES = ("natural", "noise", "fgsm", "pgd20", "pgd100x5", "cw", "transfer", "autoattack")
_TRANSFER_STEPS = 20
_CW_STEPS = 40


@dataclass(frozen=True)
class Attack:
    """An attack by name; `steps` and `restarts` are of use to pgd, cw and transfer."""

    name: str
    kind: Kind
    steps: int = 1
    restarts: int = 1


def parse_attack(name: str) -> Attack:
    """The attack of that name; UserError, with the nearest one known, where there is none.

    `natural`, `noise` (one random point of the ball), `fgsm`, `pgd<steps>[x<restarts>]` on the
    cross-entropy, `cw[<steps>[x<restarts>]]` on Carlini and Wagner's logit margin (40 steps unless
    said), `transfer` (pgd20 images made on another model), `autoattack`.
    """
    match name:
        case "natural" | "noise" | "fgsm" | "autoattack":
            return Attack(name, name)
        case "transfer":
            return Attack(name, "transfer", steps=_TRANSFER_STEPS)
    if found := re.fullmatch(r"pgd([1-9]\d*)(?:x([1-9]\d*))?", name):
        return Attack(name, "pgd", int(found[1]), int(found[2] or 1))
    if found := re.fullmatch(r"cw(?:([1-9]\d*)(?:x([1-9]\d*))?)?", name):
        return Attack(name, "cw", int(found[1] or _CW_STEPS), int(found[2] or 1))
    raise unknown("attack", name, _EXAMPLES)

"""The state of a method, kept and compared."""

import torch
from torch import Tensor

from gacd.methods import Method


def weights(method: Method) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in method.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

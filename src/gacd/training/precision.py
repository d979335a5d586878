"""bf16 autocast that leaves the images alone, and sums in float32 on every processor."""

from functools import cache, partial
from typing import Any

import torch
from lightning_fabric.plugins.precision import MixedPrecision
from torch import Tensor
from torch.library import Library

from gacd.processor import fast_bf16

_PRODUCTS = (
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv2d.padding,  # given in words
    torch.ops.aten.linear.default,
)


class Bf16Autocast(MixedPrecision):
    """bf16-mixed without Fabric's cast of the inputs.

    Between 1/2 and 1 bf16 numbers are 1/256 apart: an attack's steps of 2/255 would be off by up to
    a quarter, and its images could leave the eps ball. The networks' own products are in bf16 all
    the same (`round_products` on processors that are slow at them).
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)
        if device == "cpu" and not fast_bf16():
            round_products()

    def convert_input(self, data: Any) -> Any:
        """The data as they are."""
        return data


@cache
def round_products() -> Library:
    """From now on autocast on this process's CPU computes y = round(round(x) * round(W)).

    So it is in convolutions and linear layers, with the sums in float32, in the backward pass as
    well: what hardware for bf16 does, whose operands and results have 8 bits and whose sums have
    24. On x86 without AVX-512 PyTorch's own bf16 kernels sum in bf16 (a gradient of a convolution's
    weights was off by 2 % of the largest) and train at an eighth of this speed.
    """
    library = Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    register(library)
    return library


def register(library: Library) -> None:
    """These kernels are autocast's for as long as the library lives."""
    for op in _PRODUCTS:
        library.impl(op, partial(_product, op), "AutocastCPU")  # type: ignore[no-untyped-call]


def _product(op: Any, *args: Any) -> Any:
    """In whichever of the two small types autocast is to; float64 stays what it is, as there."""
    low = torch.get_autocast_dtype("cpu")
    given = {x.dtype for x in args if isinstance(x, Tensor)}
    with torch.autocast("cpu", enabled=False):
        if not given <= {torch.float32, torch.bfloat16, torch.float16}:
            return op(*args)
        rounded = (x.to(low).float() if isinstance(x, Tensor) else x for x in args)
        return op(*rounded).to(low)

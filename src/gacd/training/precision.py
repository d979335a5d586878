"""bf16 autocast that leaves the images alone, and sums in float32 on every processor."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric.plugins.precision import MixedPrecision
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gacd.processor import fast_bf16

_PRODUCTS = (F.conv2d, F.linear)


class Bf16Autocast(MixedPrecision):
    """bf16-mixed without Fabric's cast of the inputs.

    Between 1/2 and 1 bf16 numbers are 1/256 apart: an attack's steps of 2/255 would be off by up to
    a quarter, and its images could leave the eps ball. The networks' own products are in bf16 all
    the same (as `RoundedProducts` on processors that are slow at them).
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)
        self._rounds = device == "cpu" and not fast_bf16()

    def convert_input(self, data: Any) -> Any:
        """The data as they are."""
        return data

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """The autocast, inside which a network runs."""
        with super().forward_context():
            if not self._rounds:
                yield
                return
            with RoundedProducts():
                yield


class RoundedProducts(TorchFunctionMode):
    """bf16 convolutions and linear layers, computed in float32: round(round(x) * round(W)).

    That is what hardware for bf16 does, in the backward pass as well: operands and result have 8
    bits, sums 24. On x86 without AVX-512 PyTorch's own bf16 kernels sum in bf16 (a gradient of a
    convolution's weights was off by 2 % of the largest) and train at an eighth of this speed.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Any function of torch that is called inside."""
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not _low(args):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            named = {name: _rounded(value) for name, value in kwargs.items()}
            return func(*map(_rounded, args), **named).to(torch.bfloat16)


def _low(args: Sequence[Any]) -> bool:
    """Whether a product of these is one of bf16 numbers."""
    on = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    return on or any(isinstance(x, Tensor) and x.dtype is torch.bfloat16 for x in args)


def _rounded(value: Any) -> Any:
    return value.to(torch.bfloat16).float() if isinstance(value, Tensor) else value

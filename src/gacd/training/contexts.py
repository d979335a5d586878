"""What stands around a stage's steps, and is put away when they end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, cast

import torch

from gacd.methods.method import Method
from gacd.processor import fast_bf16

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@contextmanager
def compiled(method: Method, *, enabled: bool) -> Iterator[None]:
    """The student's features by torch.compile inside; the plain forward again outside."""
    if not enabled:
        yield
        return
    import torch._inductor.config  # takes time, and is for this alone

    student = method.student
    faster = torch.compile(student.forward_features, dynamic=False)
    student.forward_features = faster  # type: ignore[method-assign]
    rounds = not fast_bf16(next(student.parameters()).device.type)
    try:
        # Networks of one class share a limit of 8 by default, beyond which they run as they are.
        with (
            torch._dynamo.config.patch(recompile_limit=64),
            torch._inductor.config.patch(emulate_precision_casts=rounds),  # as `round_products`
        ):
            yield
    finally:
        del student.forward_features  # the instance's, which hid the class's


@contextmanager
def fastest_convolutions(device: torch.device) -> Iterator[None]:
    """cuDNN tries its algorithms for every shape, once: training has few shapes and many steps."""
    flags = torch.backends.cudnn
    before = flags.benchmark
    flags.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        flags.benchmark = before


def tensorboard(out: Path, *, first: int, enabled: bool) -> "AbstractContextManager[SummaryWriter]":
    """A writer of TensorBoard events, from epoch `first` on; only the first rank ever uses it."""
    if not enabled:
        return nullcontext(cast("SummaryWriter", None))
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out), purge_step=first)  # what a killed run wrote there is void


@contextmanager
def interruptible(impatient: bool) -> Iterator[threading.Event]:
    """Turn Ctrl-C into a flag that is read between steps; if `impatient`, a second stops at once.

    Several ranks must not be: their launcher passes one Ctrl-C on again, and a rank that leaves
    alone keeps the others waiting.
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        flag.set()
        if impatient:
            signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
    if impatient and flag.is_set():  # since the last look
        raise KeyboardInterrupt

"""SIGTERM, by which schedulers and `kill` end a job, is as Ctrl-C: a checkpoint is written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Hand a SIGTERM to whoever handles Ctrl-C at the time; the process's own way again outside."""

    def handle(number: int, frame: FrameType | None) -> None:
        interrupted = signal.getsignal(signal.SIGINT)
        if not callable(interrupted):  # ignored, as of what a script starts with &
            raise KeyboardInterrupt
        interrupted(signal.SIGINT, frame)

    decided = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # by who started us
    if decided or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

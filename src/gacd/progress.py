"""Progress of long loops: a live bar on a terminal, plain lines anywhere else."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, SupportsFloat


class Progress(Protocol):
    """One loop's progress."""

    def advance(self, n: int = 1, **values: SupportsFloat) -> None:
        """Count `n` more units; show `values` (numbers or 0-d tensors) at the next refresh.

        Tensors are read only when something is printed, so a loop on a GPU is not held up.
        """


@contextmanager
def progress(
    total: int, description: str, *, unit: str = "images", done: int = 0, enabled: bool = True
) -> Iterator[Progress]:
    """Show a loop over `total` units: rate, remaining time and the latest values.

    `done` of them were done before, and tell nothing of the rate.
    """
    if not enabled:
        yield _Silent()
    elif sys.stderr.isatty():
        bar = _Bar(total, description, unit, done)
        with bar.bar:
            try:
                yield bar
            finally:
                bar.say()
    else:
        lines = _Lines(total, description, unit, done)
        yield lines
        if lines.unsaid:
            lines.say()


def _text(values: dict[str, SupportsFloat]) -> str:
    return " ".join(f"{name} {float(value):.4g}" for name, value in values.items())


def _speed(rate: float) -> str:
    return f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Silent:
    def advance(self, n: int = 1, **values: SupportsFloat) -> None:
        pass


class _Lines:
    every = 20.0  # seconds between plain lines: a log is read later, a bar now

    def __init__(self, total: int, description: str, unit: str, done: int) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.before = self.done = done
        self.values: dict[str, SupportsFloat] = {}
        self.start = self.last = time.monotonic()
        self.unsaid = True

    def advance(self, n: int = 1, **values: SupportsFloat) -> None:
        self.done += n
        self.values.update(values)
        self.unsaid = True
        if time.monotonic() - self.last > self.every:
            self.say()

    def say(self) -> None:
        self.unsaid = False
        self.last = time.monotonic()
        spent = self.last - self.start
        self.show(spent, (self.done - self.before) / spent if spent > 0 else 0.0)

    def show(self, spent: float, rate: float) -> None:
        left = _clock((self.total - self.done) / rate) if rate > 0 else "?"
        print(
            f"{self.description}: {self.done}/{self.total} {self.unit}, {_speed(rate)}, "
            f"{_clock(spent)} spent, {left} left {_text(self.values)}".rstrip(),
            file=sys.stderr,
            flush=True,
        )


class _Bar(_Lines):
    every = 0.25

    def __init__(self, total: int, description: str, unit: str, done: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        super().__init__(total, description, unit, done)
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit + " {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task(description, total=total, completed=done, rate="", values="")

    def show(self, spent: float, rate: float) -> None:
        self.bar.update(
            self.task, completed=self.done, rate=_speed(rate), values=_text(self.values)
        )

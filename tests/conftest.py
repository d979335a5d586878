"""Shapes checked at run time, one thread, and a seeded generator: what every test shares."""

import jaxtyping

# Before anything imports the package: only modules imported afterwards have their shapes checked.
jaxtyping.install_import_hook("gacd", "beartype.beartype")

import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from gacd import linear  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator that starts every test at the same place."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What a stage in bf16 has done to autocast, on a processor slow at it, ends with its test."""
    yield
    precision = sys.modules.get("gacd.training.precision")
    if precision and precision.round_products.cache_info().currsize:
        precision.round_products()._destroy()
        precision.round_products.cache_clear()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths of outputs end in the test's own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def attacked(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], int]:
    """How many linear layers were attacked since the last call; the n-th from now is not."""
    count, stop, attack = 0, 0, linear.count_right

    def counted(*given: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == stop:
            raise KeyboardInterrupt
        return attack(*given, **more)

    def attacked(next_stop: int = 0) -> int:
        nonlocal count, stop
        before, count, stop = count, 0, next_stop
        return before

    monkeypatch.setattr(linear, "count_right", counted)
    return attacked

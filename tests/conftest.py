"""Shapes checked at run time, one thread, and a seeded generator: what every test shares."""

import jaxtyping

# Before anything imports the package: only modules imported afterwards have their shapes checked.
jaxtyping.install_import_hook("gacd", "beartype.beartype")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator that starts every test at the same place."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths of outputs end in the test's own folder."""
    monkeypatch.chdir(tmp_path)

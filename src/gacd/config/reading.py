"""What the commands can be told that only read what runs left behind."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(kw_only=True)
class Compare:
    """Two evaluated models on the same test images: is the difference more than chance?"""

    a: Path | None = None
    """A row's folder, a run folder of one row, or an outcomes.safetensors."""
    b: Path | None = None
    """The same, of the other model."""
    attack: str | None = None
    """One attack only; by default all that both models met."""
    json: bool = False
    """Print JSON."""


@dataclass(kw_only=True)
class Seeds:
    """Finished runs that differ by their seed: means, and which differences are decided."""

    runs: list[Path] = field(default_factory=list)
    """A folder of gacd distill for each seed, or one with a folder of gacd evaluate a row."""
    minus: str | None = None
    """The row that differences are from; by default pgd-at, where there is one."""
    figure: Path | None = None
    """Draw the differences into this file, .svg or .png."""
    json: bool = False
    """Print JSON."""
    markdown: bool = False
    """Print Markdown."""


@dataclass(kw_only=True)
class Report:
    """Draw report.html of a run folder anew."""

    out: Path = Path("runs/quickstart")
    """The run's folder; it need not be named: gacd report FOLDER."""

"""What a study has found so far: one result for each cell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Result:
    """A cell of a study: what it is, and what was measured, if it is done."""

    study: str
    """table1, ..., rivals."""
    labels: Mapping[str, Any]
    """What tells it from the study's other cells: role, method, teacher, student, dataset, ..."""
    seed: int
    key: str
    """The cell's address; one cell may stand in several studies."""
    folder: Path
    """Of its files: record.json, outcomes.safetensors, ..., or analysis.json."""
    record: Mapping[str, Any] | None
    """None: not done yet."""
    teacher: str | None = None
    """Its teacher's file, where other seeds may have the same; None: no teacher, or its own."""


Results = Sequence[Result]
StandIns = Mapping[str, str]
"""Our architectures and data sets, and those of the paper that they stand for."""

"""The report of one run folder."""

from pathlib import Path


def write_run_report(out: Path, title: str) -> None:
    """TODO."""

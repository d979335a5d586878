"""The tables and figures of `gacd analyze`: each figure of the record under its own heading."""

from typing import Any

import pytest

from gacd.report import analysis
from gacd.report.analysis import geometry_table, likeness_table
from gacd.report.tables import Table


@pytest.fixture
def record() -> dict[str, Any]:
    """Every figure another."""

    def difference(x: float) -> dict[str, Any]:
        return {"mean": x / 2, "matrix": [[0.0, x], [x, 0.0]]}

    shape = {"silhouette": -0.25, "inter_intra": 1.5, "nearer_true": 70.0}
    return {
        "n": 1000,
        "classes": ["cat", "dog"],
        "attack": {"name": "PGD-20"},
        "correlations": {"gacd": {"natural": difference(0.2), "attacked": difference(0.6)}},
        "cka": {"gacd": {"natural": 0.9, "attacked": 0.8}},
        "pair": {"target": "cat", "source": "dog", "n_target": 30, "n_source": 40},
        "geometry": {"teacher": {**shape, "nearer_true_low": 60.0, "nearer_true_high": 90.0}},
    }


def only_row(table: Table) -> dict[str, str]:
    (row,) = table.rows
    return {c.heading: str(cell) for c, cell in zip(table.columns, row, strict=True)}


def test_likeness(record: dict[str, Any]) -> None:
    assert only_row(likeness_table(record)) == {
        "model": "gacd",
        "Δ corr, natural": "0.100",
        "Δ corr, attacked": "0.300",
        "CKA, natural": "0.900",
        "CKA, attacked": "0.800",
    }


def test_geometry(record: dict[str, Any]) -> None:
    table = geometry_table(record)
    assert only_row(table) == {
        "model": "teacher",
        "silhouette": "−0.25",
        "inter / intra": "1.50",
        "nearer own class": "70 % [60, 90]",
    }
    assert table.notes[0].startswith("30 images of cat, 40 of dog, and the latter perturbed into")


def test_matrices_of_both_views(record: dict[str, Any]) -> None:
    alt = analysis._correlations(record).alt
    assert "gacd: clean images: mean 0.100, from 0.000 to 0.200." in alt
    assert "gacd: PGD-20 images: mean 0.300, from 0.000 to 0.600." in alt

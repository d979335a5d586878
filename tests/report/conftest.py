"""Made-up records, and the page made of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gacd.report import figures, pictures
from gacd.report.canvas import Figure
from gacd.report.page import Check, Checks, Section, write_report
from gacd.report.tables import comparison_table


def record(method: str, natural: float, pgd20: float, autoattack: float, **more: Any) -> dict:
    return {
        "model": "small-net",
        "method": method,
        "dataset": "digits",
        "seed": 0,
        "n": 360,
        "natural": natural,
        "pgd20": pgd20,
        "autoattack": autoattack,
        **more,
    }


@pytest.fixture(scope="session")
def results() -> list[dict]:
    intervals = {"natural": [93.1, 97.5], "pgd20": [52.5, 62.7], "autoattack": [46.6, 60.4]}
    shared = {"autoattack_n": 200, "parameters": 19946, "intervals": intervals}
    return [
        record("natural", 98.9, 1.7, 0.0, role="undefended", **shared),
        record("pgd-at", 98.3, 71.9, 68.0, role="teacher", **shared),
        record("gacd", 95.3, 57.6, 53.5, role="student", **shared),
        record("gacd+aft", 97.2, 64.4, 61.0, role="student", **shared),
    ]


@pytest.fixture(scope="session")
def curves() -> dict[str, list[dict]]:
    rows = [
        {"epoch": e, "loss": 2.0 / e, "val_natural": 90.0 + e, "val_robust": 50.0 + e}
        for e in (1, 2, 3)
    ]
    features = [{"epoch": e, "loss": 3.0 / e, "mi": 1.0 * e, "mi_ceiling": 7.2} for e in (1, 2, 3)]
    return {"teacher": rows, "gacd: features": features}


@pytest.fixture(scope="session")
def attacked_digits() -> Figure:
    clean = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    truth = ["0", "1", "2", "3"]
    answers = {"gacd": {"clean": truth, "attacked": ["0", "7", "2", "9"]}}
    return pictures.attacked_pictures(clean, {"gacd": 255 - clean}, answers, truth)


@pytest.fixture(scope="session")
def page(
    results: list[dict],
    curves: dict[str, list[dict]],
    attacked_digits: Figure,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    against_eps = {
        r["method"]: [(e, r["natural"] * (1 - e), 40.0, 99.0) for e in (0.0, 0.1, 0.2)]
        for r in results
    }
    checks = [
        Check("More steps never help", True, "57.6 after 20 steps, 57.2 after 100."),
        Check("A large budget reaches 0 %", False, "12.2 % are left at ε = 0.5."),
        Check("Transfer is weaker", None),
    ]
    path = tmp_path_factory.mktemp("run") / "report.html"
    write_report(
        path,
        title="Robust <students> & teachers",
        intro="Every model was attacked at ε = 0.2.",
        sections=[
            Section("Accuracies", ["What is left under attack."], [comparison_table(results)]),
            Section("Pictures", (), [attacked_digits]),
            Section("Curves", (), [figures.accuracy_against_eps(against_eps, 0.1, False)]),
            Section("Curves", (), [figures.training_curves(curves)]),
            Section("Masking", (), [Checks(checks)]),
        ],
        provenance={
            "commit": "0123456789abcdef" * 4,
            "seed": 0,
            "versions": {"gacd": "0.1.0", "torch": "2.15.0"},
        },
    )
    return path

"""The page of `gacd analyze`, made of its `analysis.json` and of nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gacd.report.canvas import Figure
from gacd.report.embedding import embedding_scatter
from gacd.report.page import Checks, Section, write_report
from gacd.report.pictures import heatmaps
from gacd.report.records import ENVIRONMENT
from gacd.report.run import provenance
from gacd.report.tables import Cell, Column, Record, Table, number
from gacd.storage import Shape, check_json, is_count, is_number, is_whole, read_json

RECORD = "analysis.json"
GEOMETRY = (
    "Inter / intra: distance of the classes' centroids, by the mean distance of clean images to "
    "their own. Nearer own class: share of the attacked images nearer to the centroid of their "
    "true class"
)
"""What the columns of a table of two classes' features are."""
_MADE_ON = {"own": "made against the model itself", "teacher": "made against the teacher"}


def _of_views(shape: Shape) -> Shape:
    return dict.fromkeys(("natural", "attacked"), shape)


_RECORD = {
    "dataset": str,
    "n": is_count,
    "classes": [str],
    "seed": is_whole,
    "attack": {"name": str, "norm": str, "made_on": lambda value: value in list(_MADE_ON)},
    "correlations": {str: _of_views({"mean": is_number, "matrix": [[is_number]]})},
    "pair": {"target": str, "source": str, "n_target": is_whole, "n_source": is_whole},
    "geometry": {
        str: dict.fromkeys(
            ("silhouette", "inter_intra", "nearer_true", "nearer_true_low", "nearer_true_high"),
            is_number,
        )
    },
    "embedding": {"kind": str, "points": {str: {str: [[is_number]]}}},
    "teacher": {"architecture": str, "method": str},
    "models": {str: {"architecture": str}},
    "config": {"threat": {"eps": object}},
    "environment": ENVIRONMENT,
    "timestamp": str,
}


def write_analysis_report(out: Path) -> None:
    """Write `report.html` and `figures/*.svg` beside the `analysis.json` in `out`.

    Raises:
        UserError: there is no such file, it is damaged, or nothing can be written there.
    """
    record = read_analysis(out / RECORD)
    write_report(
        out / "report.html",
        title=f"Structure of features on {record['dataset']}",
        intro=_intro(record),
        sections=_sections(record),
        provenance=provenance([record], RECORD),
    )


def read_analysis(path: Path) -> dict[str, Any]:
    """A record of `gacd analyze`. Raises UserError for any other file."""
    record: dict[str, Any] = read_json(path, _RECORD)
    alike = dict.fromkeys(record["correlations"], _of_views(is_number))
    check_json(path, record, {"cka": alike})
    return record


def likeness_table(record: Record) -> Table:
    """How alike every student and the teacher are."""
    views = ("natural", "attacked")
    return Table(
        f"Likeness to the teacher, on {record['n']:,} images",
        (
            Column("model"),
            *(Column(f"Δ corr, {view}", numeric=True) for view in views),
            *(Column(f"CKA, {view}", numeric=True) for view in views),
        ),
        tuple(
            (
                Cell(name),
                *(Cell(f"{found[view]['mean']:.3f}") for view in views),
                *(Cell(f"{record['cka'][name][view]:.3f}") for view in views),
            )
            for name, found in record["correlations"].items()
        ),
        (
            "Δ corr: mean of |corr(teacher) - corr(student)| over all pairs of classes, the "
            "diagonal (0) included; smaller is closer to the teacher.",
            "CKA: linear centred kernel alignment with the teacher's features, 1 where they are "
            "the same but for rotation and scale.",
        ),
    )


def geometry_caption(record: Record) -> str:
    """Of a table of the two classes' features."""
    return f"Features of {record['pair']['target']} and {record['pair']['source']}"


def geometry_table(record: Record) -> Table:
    """Two classes in every model's features."""
    return Table(
        geometry_caption(record),
        (
            Column("model"),
            Column("silhouette", numeric=True),
            Column("inter / intra", numeric=True),
            Column("nearer own class", numeric=True),
        ),
        tuple(
            (
                Cell(name),
                Cell(number(shape["silhouette"], 2)),
                Cell(f"{shape['inter_intra']:.2f}"),
                Cell(
                    f"{shape['nearer_true']:.0f} %",
                    f"[{shape['nearer_true_low']:.0f}, {shape['nearer_true_high']:.0f}]",
                ),
            )
            for name, shape in record["geometry"].items()
        ),
        (
            f"{pair_of(record)}.",
            f"{GEOMETRY}, with Wilson's 95 % interval.",
        ),
    )


def _sections(record: Record) -> list[Section]:
    sections = []
    if record["correlations"]:
        text = (
            "How far the correlations between the classes' logits are from the teacher's. Dark "
            "cells are close to 0, light ones far from it."
        )
        matrices = _correlations(record).named("correlation-differences")
        content: list[Table | Figure | Checks] = [likeness_table(record), matrices]
        sections.append(Section("Correlations between classes", [text], content))
    text = (
        "t-SNE keeps neighbours, not distances: the table is computed on the features themselves."
    )
    content = [geometry_table(record), embedding_figure(record).named("embedding")]
    return [*sections, Section("Features of two classes", [text], content)]


def _intro(record: Record) -> list[str]:
    attack = record["attack"]
    students = ", ".join(record["correlations"]) or "none"
    eps = record["config"]["threat"]["eps"]
    return [
        f"Teacher: {record['teacher']['architecture']} ({record['teacher']['method']}); compared "
        f"with it: {students}. {record['dataset']}, {record['n']:,} test images, "
        f"{len(record['classes'])} classes.",
        f"Attacked images: {attack['name']} at {attack['norm']} ε = {eps}, "
        f"{_MADE_ON[attack['made_on']]}.",
    ]


def pair_of(record: Record) -> str:
    """Which images of two classes were looked at."""
    pair = record["pair"]
    return (
        f"{pair['n_target']} images of {pair['target']}, {pair['n_source']} of {pair['source']}, "
        f"and the latter perturbed into {pair['target']} against each model"
    )


def _correlations(record: Record) -> Figure:
    words = {"natural": "clean images", "attacked": record["attack"]["name"] + " images"}
    matrices = {
        f"{student}: {word}": np.array(found[view]["matrix"], dtype=np.float64)
        for student, found in record["correlations"].items()
        for view, word in words.items()
    }
    title = "Absolute differences of class correlations from the teacher's"
    return heatmaps(matrices, record["classes"], title)


def embedding_figure(record: Record, named: Callable[[str], str] = str) -> Figure:
    """Two classes in every model's features, as t-SNE places them; `named` renames the models."""
    joint = record["embedding"]["kind"] == "joint"
    how = "one embedding for all models" if joint else "an embedding for each model by itself"
    notes = {
        name: f"silhouette {g['silhouette']:.2f}; {g['nearer_true']:.0f} % nearer own class"
        for name, g in record["geometry"].items()
    }
    return embedding_scatter(
        {named(name): groups for name, groups in record["embedding"]["points"].items()},
        f"t-SNE of features, {how}",
        one_scale=joint,
        notes={named(name): note for name, note in notes.items()},
    )

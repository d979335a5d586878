"""The transcription: complete against the tables' shapes, within bounds, and as its text says."""

from collections import Counter
from statistics import fmean

import pytest

from gacd.study.claims import judge_claims
from gacd.study.paper import (
    accuracies,
    architecture_key,
    architecture_name,
    paper,
    published,
)

SHAPES = {  # methods x columns x accuracies, counted in the paper
    "table1": (4, 2 * 3, 2),
    "table2": (4, 2 * 3, 2),
    "table3": (1, 4, 2),
    "table4": (4, 2, 2),
    "ablation": (2, 1, 2),
}


@pytest.mark.parametrize("table", SHAPES)
def test_every_number_of_the_table_is_there(table):
    methods, columns, metrics = SHAPES[table]
    rows = published(table)
    assert len(rows) == methods * columns
    assert len({(r.method, r.dataset, r.teacher, r.student) for r in rows}) == len(rows)
    assert Counter(r.method for r in rows) == dict.fromkeys({r.method for r in rows}, columns)
    assert all(len(row.accuracies) == metrics for row in rows)
    assert paper()["tables"].keys() == SHAPES.keys()


@pytest.mark.parametrize("table", SHAPES)
def test_accuracies_are_percent_and_no_attack_helps(table):
    for row in published(table):
        natural, robust = row.accuracies.values()
        assert 0 <= robust < natural <= 100


SUMS = {  # of the figures of each row, added up from the paper's own lines
    "table1": {"kd": 618.65, "ard": 776.24, "gacd+aft": 804.21, "gacd": 752.87},
    "table2": {"kd": 384.70, "ard": 391.80, "gacd+aft": 440.93, "gacd": 369.35},
    "table3": {"pgd-at": 413.44},
    "table4": {"pgd-at (teacher)": 115.80, "kd": 128.79, "ard": 142.33, "gacd": 151.07},
    "ablation": {"gacd+aft, none": 137.76, "ard, teacher": 134.82},
}


@pytest.mark.parametrize("table", SUMS)
def test_sums_of_the_rows(table):
    """A slip in one digit shows."""
    for method, total in SUMS[table].items():
        rows = [row for row in published(table) if row.method == method]
        assert sum(sum(row.accuracies.values()) for row in rows) == pytest.approx(total, abs=1e-6)


def test_figures_that_the_claims_quote():
    pair = {"teacher": "resnet18", "student": "resnet18"}
    assert tuple(accuracies("table1", "gacd+aft", **pair).values()) == (82.73, 52.75)
    assert tuple(accuracies("table3", "pgd-at", teacher="resnet18").values()) == (76.54, 44.46)
    strong = {"teacher": "wrn-34-10", "student": "resnet18"}
    assert tuple(accuracies("table1", "kd", **strong).values()) == (90.50, 4.63)
    assert accuracies("table1", "rslad", **pair) == {}


def test_the_claims_quote_the_figures_that_the_paper_states():
    assert [claim.paper for claim in judge_claims([])] == [
        "82.73/52.75 against 76.54/44.46",
        "+3.2/+1.5 (ResNet-18), +6.3/+5.0 (WRN)",
        "−1.8/−1.0",
        "+1.5/+4.1",
        "Table 4",
        "Figures 3 and 4",
        "Figure 2a",
        "Figure 2b",
        "90.50/4.63 (teacher 84.41/45.75)",
    ]


def mean(table: str, method: str, column: int | None, metric: str) -> float:
    rows = [row.accuracies[metric] for row in published(table) if row.method == method]
    return fmean(rows if column is None else [rows[column]])


@pytest.mark.parametrize("line", paper()["stated"], ids=lambda line: line["what"])
def test_what_the_text_derives_agrees_with_the_tables(line):
    """Within the rounding of the text: no inconsistency there."""
    computed = mean(*line["plus"]) - mean(*line["minus"])
    assert computed == pytest.approx(line["value"], abs=0.0051)


def test_what_the_text_says_against_the_tables():
    """The notes' counts, from the numbers."""
    teachers = {(r.dataset, r.teacher): r.accuracies for r in published("table3")}

    def exceeds(row, metric):
        return row.accuracies[metric] > teachers[row.dataset, row.teacher][metric]

    fine_tuned = [row for row in published("table1") if row.method == "gacd+aft"]
    assert [exceeds(row, "natural") for row in fine_tuned].count(False) == 2
    linear = [row for row in published("table1") if row.method == "gacd"]
    assert [exceeds(row, "pgd20") for row in linear].count(True) == 1
    ours = [row for row in published("table2") if row.method.startswith("gacd")]
    assert not any(exceeds(row, "natural") for row in ours)
    best = {
        (table, metric): [
            max(
                (r for r in published(table) if (r.teacher, r.student) == column),
                key=lambda r: r.accuracies[metric],
            ).method
            for column in dict.fromkeys((r.teacher, r.student) for r in published(table))
        ]
        for table in ("table1", "table2")
        for metric in ("natural", "pgd20")
    }
    assert Counter(best["table1", "natural"]) == {"gacd": 3, "kd": 3}
    assert Counter(best["table1", "pgd20"]) == {"gacd+aft": 5, "ard": 1}
    assert set(best["table2", "natural"]) == {"kd"}
    assert Counter(best["table2", "pgd20"]) == {"gacd+aft": 5, "ard": 1}
    assert len({r.accuracies["pgd20"] for r in published("ablation")}) == 1


def test_figure_2_lists_what_was_varied():
    figure = paper()["figure2"]
    assert figure["negatives"] == [16, 64, 256, 1024, 4096, 16384]
    assert figure["temperatures"] == [0.02, 0.05, 0.07, 0.1, 0.2]
    assert figure["chosen"] == {"negatives": 16384, "temperature": 0.1}


def test_every_table_has_notes_and_the_rivals_are_marked_as_quoted():
    data = paper()
    assert all(table["notes"] for table in data["tables"].values())
    assert "quoted" in data["rivals"]["caption"]
    assert data["rivals"]["uncertainty"] == 0.5
    assert len(data["rivals"]["rows"]) == 7
    for row in data["rivals"]["rows"]:
        natural, pgd20, autoattack = row["accuracies"]
        assert 100 > natural > pgd20 > autoattack > 0


@pytest.mark.parametrize(
    ("name", "key", "written"),
    [
        ("ResNet-18", "resnet18", "ResNet-18"),
        ("resnet56", "resnet56", "ResNet-56"),
        ("WRN-34-10", "wrn-34-10", "WRN-34-10"),
        ("WideResNet-40-2", "wrn-40-2", "WRN-40-2"),
        ("MobileNetV2", "mobilenetv2", "MobileNetV2"),
        ("digits-cnn-8", "digits-cnn-8", "digits-cnn-8"),
    ],
)
def test_names_of_architectures(name, key, written):
    assert architecture_key(name) == key
    assert architecture_name(name) == written

"""Our figures beside the paper's: Tables 1 to 4, the ablation, the rivals."""

from collections.abc import Iterator
from dataclasses import replace

from gacd.report.tables import Cell, Column, Table, heading
from gacd.study.arms import (
    NO_TEACHER,
    UNDEFENDED,
    WEIGHTINGS,
    Pair,
    alone,
    default_weighting,
    pairs,
    student,
    student_name,
    teacher,
    transferred,
)
from gacd.study.measure import Arm, select
from gacd.study.paper import (
    accuracies,
    architecture_key,
    dataset_name,
    method_name,
    paper,
    written,
)
from gacd.study.results import Results, StandIns
from gacd.study.rows import (
    INTERVALS,
    Row,
    difference_table,
    on,
    pair_table,
    row_table,
    shown,
)

_ORDER = ("natural", "kd", "ard", "gacd+aft", "gacd")
HOW_TO_READ = (
    f"Accuracies in %. {INTERVALS} No teacher: the same student trained adversarially by itself, "
    "which the paper shows only where it is itself the teacher. Cost: FLOPs of "
    "training the student relative to that row."
)


def pair_tables(results: Results, study: str, stand_ins: StandIns) -> Iterator[Table]:
    """A table for each pair of teacher and student, as in Tables 1 and 2."""
    here = [result for result in results if result.study == study]
    for pair in pairs(results, (study,), None, stand_ins):
        t, s = pair.standing
        rows: list[Row] = [
            (
                "teacher",
                teacher(results, pair),
                accuracies("table3", "pgd-at", teacher=t, dataset=str(pair.dataset)),
            ),
            (UNDEFENDED, alone(here, pair, "natural"), {}),
            (NO_TEACHER, alone(here, pair), {}),
        ]
        for method in methods(here, pair):
            arm = student(here, (study,), method, pair)
            rows.append((arm.name, arm, accuracies(study, method, teacher=t, student=s)))
        yield pair_table(pair, stand_ins, rows, alone(here, pair))


def teacher_table(results: Results, stand_ins: StandIns) -> Table | None:
    """Table 3."""
    labels = [r.labels for r in results if r.study == "table3" and r.labels["role"] == "teacher"]
    rows: list[Row] = []
    for dataset, name in dict.fromkeys((each.get("dataset"), each["teacher"]) for each in labels):
        arm = select(results, ("table3",), name, role="teacher", teacher=name, dataset=dataset)
        standing = architecture_key(stand_ins.get(name, name))
        theirs = accuracies("table3", "pgd-at", teacher=standing, dataset=str(dataset))
        rows.append((on(shown(name, stand_ins), [arm]), arm, theirs))
    return row_table("Teachers, trained adversarially", rows) if rows else None


def transfer_tables(results: Results, stand_ins: StandIns) -> Iterator[Table]:
    """Table 4: a table for each data set."""
    for dataset, arms in transferred(results).items():
        name = stand_ins.get(dataset, dataset)
        rows = [
            (arm.name, arm, accuracies("table4", source, dataset=name))
            for source, arm in arms.items()
        ]
        standing = f" (for {dataset_name(name)})" if name != dataset else ""
        caption = f"Frozen features and a linear layer, {dataset_name(dataset)}{standing}"
        yield row_table(caption, rows, metrics=("natural", "pgd7", "autoattack"))


def ablation_tables(results: Results, stand_ins: StandIns) -> Iterator[Table]:
    """Reweighted by the teacher, and not."""
    here = [result for result in results if result.study == "ablation"]
    for pair in pairs(here, ("ablation",), None, stand_ins):
        where = dict(zip(("teacher", "student"), pair.standing, strict=True))
        rows: list[Row] = [(NO_TEACHER, alone(here, pair), {})]
        for method in methods(here, pair):
            for reweight in WEIGHTINGS:
                arm = student(results, ("ablation", "table1"), method, pair, reweight)
                usual = reweight == default_weighting(method)
                theirs = (
                    accuracies("table1", method, **where)
                    if usual
                    else accuracies("ablation", f"{method}, {reweight}", **where)
                )
                rows.append((f"{method_name(method)}, {arm.name}", arm, theirs))
        found = pair_table(pair, stand_ins, rows)
        yield replace(found, notes=(*found.notes, _ablated()))


def rival_arms(results: Results) -> Iterator[tuple[Pair, dict[str, Arm]]]:
    """Every method of the study `rivals` by its name; those without a teacher come first."""
    here = [result for result in results if result.study == "rivals"]
    for pair in pairs(here, ("rivals",), None, {}):
        labels = [r.labels for r in here if r.labels["role"] in ("baseline", "undefended")]
        arms = {}
        for method in dict.fromkeys(str(label["method"]) for label in labels):
            name = student_name(method)
            if name == method_name(method):
                name += ", no teacher"
            arms[name] = alone(here, pair, method)
        arms |= {method_name(m): student(here, ("rivals",), m, pair) for m in methods(here, pair)}
        yield pair, {name: arm for name, arm in arms.items() if arm.results}


def rival_tables(results: Results, stand_ins: StandIns) -> Iterator[Table]:
    """Every method with the same teacher and student."""
    for pair, arms in rival_arms(results):
        rows: list[Row] = [("teacher", teacher(results, pair), {})]
        rows += [(name, arm, {}) for name, arm in arms.items()]
        yield pair_table(pair, stand_ins, rows, arms.get(NO_TEACHER))


def difference_tables(results: Results) -> Iterator[Table]:
    """What every method adds to the same student trained adversarially alone, image by image."""
    for pair, arms in rival_arms(results):
        baseline = arms.get(NO_TEACHER)
        if baseline is not None and baseline.done("natural"):
            yield difference_table(f"Differences from {NO_TEACHER}, {pair}", arms, baseline)


def quoted_table() -> Table:
    """What others published."""
    data = paper()["rivals"]
    rows = tuple(
        (
            Cell(method_name(row["method"])),
            Cell(dataset_name(row["dataset"])),
            *(Cell(f"{value:.2f}") for value in row["accuracies"]),
        )
        for row in data["rows"]
    )
    columns = (
        Column("method"),
        Column("data"),
        *(Column(heading(m), True) for m in data["metrics"]),
    )
    return Table("Published elsewhere, ResNet-18, quoted", columns, rows, (data["caption"] + ".",))


def methods(results: Results, pair: Pair) -> list[str]:
    """Of the students of a pair, in the paper's order."""
    found = dict.fromkeys(
        str(r.labels["method"])
        for r in results
        if r.labels["role"] == "student"
        and (r.labels["teacher"], r.labels["student"]) == (pair.teacher, pair.student)
    )
    rank = {name: i for i, name in enumerate(_ORDER)}
    return sorted(found, key=lambda name: rank.get(name, len(rank)))


def _ablated() -> str:
    """The paper's ablation, which is of one pair."""
    pair = {"teacher": "resnet18", "student": "wrn-34-10"}
    gacd, ard = (accuracies("table1", method, **pair) for method in ("gacd+aft", "ard"))
    bare, weighted = (accuracies("ablation", m) for m in ("gacd+aft, none", "ard, teacher"))
    return (
        f"The paper's ablation, ResNet-18 to WRN-34-10: GACD+AFT {written(gacd)}, not reweighted "
        f"{written(bare)}; ARD {written(ard)}, reweighted {written(weighted)}."
    )

"""Our figures beside the paper's: Tables 1 to 4, the ablation, the rivals."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from gacd.report.tables import Cell, Column, Table
from gacd.study.arms import Pair, alone, default_weighting, pairs, student, teacher, transferred
from gacd.study.evidence import METRICS
from gacd.study.measure import Arm, contrast, select
from gacd.study.paper import (
    accuracies,
    architecture_key,
    architecture_name,
    dataset_name,
    method_name,
    paper,
    rivals,
)
from gacd.study.results import Result

Results = Sequence[Result]
StandIns = Mapping[str, str]

_Row = tuple[str, Arm, Mapping[str, float]]
"""What a row is called, its cells, and the paper's accuracies."""

_MISSING = Cell("–")
_ORDER = ("natural", "kd", "ard", "gacd+aft", "gacd")
HOW_TO_READ = (
    "Accuracies in %. [low, high]: 95 % interval over seeds and test images; with one seed, over "
    "the images alone. No teacher: the same student trained adversarially by itself, a row that "
    "the paper lacks. Cost: training of the student relative to that row."
)


def pair_tables(results: Results, study: str, stand_ins: StandIns) -> Iterator[Table]:
    """A table for each pair of teacher and student, as in Tables 1 and 2."""
    here = [result for result in results if result.study == study]
    for pair in pairs(results, (study,), None, stand_ins):
        t, s = pair.standing
        rows: list[_Row] = [
            (
                "teacher",
                teacher(results, pair),
                accuracies("table3", "pgd-at", teacher=t, dataset=str(pair.dataset)),
            ),
            ("undefended", alone(here, pair, "natural"), {}),
            ("no teacher", alone(here, pair), {}),
        ]
        for method in methods(here, pair):
            arm = student(here, (study,), method, pair)
            rows.append((arm.name, arm, accuracies(study, method, teacher=t, student=s)))
        yield _pair_table(pair, stand_ins, rows, alone(here, pair))


def teacher_table(results: Results, stand_ins: StandIns) -> Table | None:
    """Table 3."""
    labels = [r.labels for r in results if r.study == "table3" and r.labels["role"] == "teacher"]
    rows: list[_Row] = []
    for dataset, name in dict.fromkeys((each.get("dataset"), each["teacher"]) for each in labels):
        arm = select(results, ("table3",), name, role="teacher", teacher=name, dataset=dataset)
        standing = architecture_key(stand_ins.get(name, name))
        theirs = accuracies("table3", "pgd-at", teacher=standing, dataset=str(dataset))
        rows.append((_on(shown(name, stand_ins), [arm]), arm, theirs))
    return _table("Teachers, trained adversarially", rows) if rows else None


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
        yield _table(caption, rows, metrics=("natural", "pgd7"))


def ablation_tables(results: Results, stand_ins: StandIns) -> Iterator[Table]:
    """Reweighted by the teacher, and not."""
    here = [result for result in results if result.study == "ablation"]
    for pair in pairs(here, ("ablation",), None, stand_ins):
        where = dict(zip(("teacher", "student"), pair.standing, strict=True))
        rows: list[_Row] = [("no teacher", alone(here, pair), {})]
        for method in methods(here, pair):
            for reweight in ("teacher", "none"):
                arm = student(results, ("ablation", "table1"), method, pair, reweight)
                usual = reweight == default_weighting(method)
                theirs = (
                    accuracies("table1", method, **where)
                    if usual
                    else accuracies("ablation", f"{method}, {reweight}", **where)
                )
                rows.append((f"{method_name(method)}, {arm.name}", arm, theirs))
        found = _pair_table(pair, stand_ins, rows)
        yield replace(found, notes=(*found.notes, _ABLATED))


def rival_arms(results: Results) -> Iterator[tuple[Pair, dict[str, Arm]]]:
    """Every method of the study `rivals` by its name; those without a teacher come first."""
    here = [result for result in results if result.study == "rivals"]
    for pair in pairs(here, ("rivals",), None, {}):
        labels = [r.labels for r in here if r.labels["role"] in ("baseline", "undefended")]
        arms = {}
        for method in dict.fromkeys(str(label["method"]) for label in labels):
            name = {"natural": "undefended", "pgd-at": "no teacher"}.get(
                method, f"{method_name(method)}, no teacher"
            )
            arms[name] = alone(here, pair, method, name)
        arms |= {method_name(m): student(here, ("rivals",), m, pair) for m in methods(here, pair)}
        yield pair, {name: arm for name, arm in arms.items() if arm.results}


def rival_tables(results: Results, stand_ins: StandIns) -> Iterator[Table]:
    """Every method with the same teacher and student."""
    for pair, arms in rival_arms(results):
        rows: list[_Row] = [("teacher", teacher(results, pair), {})]
        rows += [(name, arm, {}) for name, arm in arms.items()]
        yield _pair_table(pair, stand_ins, rows, arms.get("no teacher"))


def quoted_table() -> Table:
    """What others published."""
    data = paper()["rivals"]
    rows = tuple(
        (
            Cell(method_name(row.method)),
            Cell(dataset_name(row.dataset)),
            *(Cell(f"{value:.2f}") for value in row.accuracies.values()),
        )
        for row in rivals()
    )
    columns = (
        Column("method"),
        Column("data"),
        *(Column(METRICS[m], True) for m in data["metrics"]),
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


def relative_cost(arm: Arm, baseline: Arm | None) -> tuple[float, str] | None:
    """Training relative to the baseline's, and by what it is counted: FLOPs, or else seconds."""
    if baseline is None:
        return None
    for key, unit in (("train_flops", "FLOPs"), ("train_seconds", "time")):
        ours, theirs = _spent(arm, key), _spent(baseline, key)
        if ours and theirs:
            return ours / theirs, unit
    return None


def _spent(arm: Arm, key: str) -> float | None:
    """Mean over seeds; a fine-tuned model's record counts the fine-tuning alone."""
    records = [r.record for r in arm.results if r.record and r.record.get(key)]
    if not records:
        return None
    spent = fmean(float(record[key]) for record in records)
    if arm.start is None or not str(records[0]["method"]).endswith("fine-tuned"):
        return spent
    before = _spent(arm.start, key)
    return None if before is None else before + spent


def shown(name: str, stand_ins: StandIns) -> str:
    """An architecture, and which of the paper's it stands for."""
    if name not in stand_ins or architecture_key(stand_ins[name]) == name:
        return architecture_name(name)
    return f"{name} (for {architecture_name(stand_ins[name])})"


_ABLATED = (
    "The paper's ablation, ResNet-18 to WRN-34-10: GACD+AFT 85.35/55.19, not reweighted "
    "83.53/54.23; ARD 79.05/50.16, reweighted 80.59/54.23."
)


def _pair_table(
    pair: Pair, stand_ins: StandIns, rows: Sequence[_Row], baseline: Arm | None = None
) -> Table:
    caption = f"{shown(pair.teacher, stand_ins)} → {shown(pair.student, stand_ins)}"
    return _table(_on(caption, [arm for _, arm, _ in rows]), rows, baseline)


def _on(text: str, arms: Sequence[Arm]) -> str:
    """With the data that the records name."""
    names = dict.fromkeys(str(r.record["dataset"]) for arm in arms for r in arm.results if r.record)
    return ", ".join([text, *names])


def _table(
    caption: str,
    rows: Sequence[_Row],
    baseline: Arm | None = None,
    metrics: Sequence[str] = ("natural", "pgd20", "autoattack"),
) -> Table:
    """Our accuracies, the paper's beside them where it has any, seeds, and cost where known."""
    rows = [row for row in rows if row[1].results]
    costs = [relative_cost(arm, baseline) if name != "teacher" else None for name, arm, _ in rows]
    columns = [Column("method")]
    for metric in metrics:
        columns.append(Column(METRICS[metric], numeric=True))
        if any(metric in theirs for _, _, theirs in rows):
            columns.append(Column("paper", numeric=True))
    columns.append(Column("seeds", numeric=True))
    if any(costs):
        columns.append(Column("cost", numeric=True))
    cells = []
    for (name, arm, _), cost, theirs in zip(rows, costs, [row[2] for row in rows], strict=True):
        line = [Cell(name)]
        for metric in metrics:
            line.append(accuracy(arm, metric))
            if any(metric in other for _, _, other in rows):
                line.append(Cell(f"{theirs[metric]:.2f}") if metric in theirs else _MISSING)
        line.append(_seeds(arm, metrics[0]))
        if any(costs):
            line.append(Cell(f"{cost[0]:.2g}×", f"({cost[1]})") if cost else _MISSING)
        cells.append(tuple(line))
    notes = (_sizes([arm for _, arm, _ in rows], metrics),)
    return Table(caption, tuple(columns), tuple(cells), notes)


def accuracy(arm: Arm, metric: str) -> Cell:
    """Mean over the seeds in percent, and its interval."""
    found = contrast([(1.0, Arm(arm.name, arm.results))], metric)
    if found is None:
        return _MISSING
    low, high = found.accuracy_interval()
    return Cell(f"{found.mean:.1f}", f"[{low:.1f}, {high:.1f}]")


def _seeds(arm: Arm, metric: str) -> Cell:
    done, planned = len(arm.done(metric)), len(arm.results)
    return Cell(str(done) if done == planned else f"{done} of {planned}")


def _sizes(arms: Sequence[Arm], metrics: Sequence[str]) -> str:
    """How many test images the figures stand on."""
    said = []
    for metric in metrics:
        ns = sorted(
            {
                int(r.record.get(f"{metric}_n") or r.record["n"])
                for arm in arms
                for r in arm.done(metric).values()
                if r.record
            }
        )
        if ns:
            said.append((METRICS[metric], " or ".join(f"{n:,}" for n in ns)))
    if not said:
        return "Nothing measured yet."
    if len({n for _, n in said}) == 1:
        return f"n = {said[0][1]} test images."
    return "Test images: " + ", ".join(f"{name} {n}" for name, n in said) + "."

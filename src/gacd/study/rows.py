"""A table's rows: our accuracies with their intervals, the paper's, seeds and cost."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from gacd.report.tables import HEADLINES, Cell, Column, Table, budgets, heading, image_count, signed
from gacd.study.arms import Pair
from gacd.study.measure import Arm, Measured, contrast, differences
from gacd.study.paper import architecture_key, architecture_name
from gacd.study.results import Result, StandIns

Row = tuple[str, Arm, Mapping[str, float]]
"""What a row is called, its cells, and the paper's accuracies."""

INTERVALS = (
    "[low, high]: 95 % interval over seeds and test images; with one seed, over the images alone."
)

_MISSING = Cell("–")
_DIFFERENCES = (
    "Percentage points, on the same images and seed by seed. ▲ or ▼: the whole 95 % interval is on "
    "one side of 0, with more than one seed. Each interval stands alone: of twenty differences "
    "that are really zero, one is marked on average."
)


def pair_table(
    pair: Pair, stand_ins: StandIns, rows: Sequence[Row], baseline: Arm | None = None
) -> Table:
    """A table of one pair, captioned by it and by the data that the records name."""
    caption = f"{shown(pair.teacher, stand_ins)} → {shown(pair.student, stand_ins)}"
    return row_table(on(caption, [arm for _, arm, _ in rows]), rows, baseline)


def on(text: str, arms: Sequence[Arm]) -> str:
    """A text, with the data that the records name."""
    names = dict.fromkeys(str(r.record["dataset"]) for arm in arms for r in arm.results if r.record)
    return ", ".join([text, *names])


def row_table(
    caption: str,
    rows: Sequence[Row],
    baseline: Arm | None = None,
    metrics: Sequence[str] = HEADLINES,
) -> Table:
    """Our accuracies, the paper's beside them where it has any, seeds, and cost where known."""
    rows = [row for row in rows if row[1].results]
    costs = [relative_cost(arm, baseline) if name != "teacher" else None for name, arm, _ in rows]
    published = {metric for _, _, theirs in rows for metric in theirs}
    columns = [Column("method")]
    for metric in metrics:
        columns.append(Column(heading(metric), numeric=True))
        if metric in published:
            columns.append(Column(f"paper's {heading(metric)}", numeric=True))
    columns.append(Column("seeds", numeric=True))
    if any(costs):
        columns.append(Column("cost", numeric=True))
    cells = []
    for (name, arm, theirs), cost in zip(rows, costs, strict=True):
        line = [Cell(name)]
        for metric in metrics:
            line.append(_accuracy(arm, metric))
            if metric in published:
                line.append(Cell(f"{theirs[metric]:.2f}") if metric in theirs else _MISSING)
        line.append(_seeds(arm, metrics[0]))
        if any(costs):
            line.append(Cell(f"{cost:.2f}×") if cost else _MISSING)
        cells.append(tuple(line))
    notes = (_sizes([arm for _, arm, _ in rows], metrics), *_fewer(rows, metrics))
    return Table(caption, tuple(columns), tuple(cells), notes)


def difference_table(
    caption: str, arms: Mapping[str, Arm], other: Arm, metrics: Sequence[str] = HEADLINES
) -> Table:
    """What every other arm has more than this one, in percentage points, seed by seed."""
    rows = tuple(
        (
            Cell(name),
            *(_difference(found.get(metric)) for metric in metrics),
            Cell(str(max((len(each.seeds) for each in found.values()), default=0))),
        )
        for name, found in differences(arms, other, metrics).items()
    )
    columns = (
        Column("method"),
        *(Column(heading(metric), True) for metric in metrics),
        Column("seeds", True),
    )
    return Table(caption, columns, rows, (_DIFFERENCES,))


def _difference(found: Measured | None) -> Cell:
    if found is None:
        return _MISSING
    low, high = found.interval()
    mark = (" ▲" if low > 0 else " ▼") if found.decided else ""
    return Cell(signed(found.mean) + mark, f"[{signed(low)}, {signed(high)}]")


def _accuracy(arm: Arm, metric: str) -> Cell:
    """Mean over the seeds in percent, and its interval."""
    found = contrast([(1.0, arm)], metric)
    if found is None:
        return _MISSING
    low, high = found.interval()
    return Cell(f"{found.mean:.1f}", f"[{low:.1f}, {high:.1f}]")


def _seeds(arm: Arm, metric: str) -> Cell:
    done, planned = len(arm.done(metric)), len(arm.results)
    return Cell(str(done) if done == planned else f"{done} of {planned}")


def _fewer(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """What some records of a row lack: its figure is of the other seeds, or a dash."""
    said = []
    for name, arm, _ in rows:
        counts = {metric: len(arm.done(metric)) for metric in metrics}
        most = max(counts.values())
        said += [f"{heading(m)} of {name} ({n} of {most})" for m, n in counts.items() if n < most]
    return [f"Measured with fewer seeds: {', '.join(said)}."] if said else []


def attacker(results: Iterable[Result]) -> list[str]:
    """A sentence of what the attacks on these models were allowed, if any was made."""
    known = budgets(result.record for result in results if result.record)
    found = [f"{norm}, ε = {eps}" for norm, eps in known]
    return [f"Attacker: {' or '.join(found)}, where black is 0 and white is 1."] * bool(found)


def _sizes(arms: Sequence[Arm], metrics: Sequence[str]) -> str:
    """How many test images the figures stand on."""
    said = []
    for metric in metrics:
        done = (r.record for arm in arms for r in arm.done(metric).values())
        if ns := sorted({image_count(record, metric) for record in done if record}):
            said.append((heading(metric), " or ".join(f"{n:,}" for n in ns)))
    if not said:
        return "Nothing measured yet."
    if len({n for _, n in said}) == 1:
        return f"n = {said[0][1]} test images."
    return "Test images: " + ", ".join(f"{name} {n}" for name, n in said) + "."


def relative_cost(arm: Arm, baseline: Arm | None) -> float | None:
    """FLOPs of training relative to the baseline's."""
    ours, theirs = _flops(arm), _flops(baseline) if baseline else None
    return ours / theirs if ours and theirs else None


def _flops(arm: Arm) -> float | None:
    """Mean over seeds, whatever the models were fine-tuned from included."""
    records = [result.record or {} for result in arm.results]
    spent = [float(record["train_flops"]) for record in records if "train_flops" in record]
    return fmean(spent) if spent else None


def shown(name: str, stand_ins: StandIns) -> str:
    """An architecture, and which of the paper's it stands for."""
    if name not in stand_ins or architecture_key(stand_ins[name]) == name:
        return architecture_name(name)
    return f"{name} (for {architecture_name(stand_ins[name])})"

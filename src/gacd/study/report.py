"""The report of a study: HTML and Markdown of the same sections, the figures, `claims.json`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gacd.report.analysis import embedding_figure
from gacd.report.canvas import Figure
from gacd.report.page import Check, Checks, Section, write_report, written_out
from gacd.report.records import read_checks
from gacd.report.run import images_checked, provenance
from gacd.report.tables import Table
from gacd.storage import write_bytes, write_json
from gacd.study import figures, tables
from gacd.study.arms import SWEPT, sweep
from gacd.study.claim_tables import (
    evidence_tables,
    geometry_table,
    likeness_table,
    network_name,
    summary,
)
from gacd.study.claims import Claim, claims_json, judge_claims
from gacd.study.measure import select
from gacd.study.paper import architecture_name, dataset_name, paper
from gacd.study.results import Result, Results, StandIns
from gacd.study.rows import attacker
from gacd.study.rule import RULE

_LEGEND = (
    "Accuracies in % or differences in percentage points, [low, high] their 95 % intervals. "
    "AutoAttack is shown beside each verdict and does not enter it. Each claim links to its "
    "evidence. Not decided: the data allow either answer."
)
_WRITTEN = {
    "table1": "Table 1",
    "table2": "Table 2",
    "table3": "Table 3",
    "table4": "Table 4",
    "ablation": "Ablation",
    "figure2": "Figure 2",
}


def write_study_report(
    results: Results, out: Path, *, title: str, stand_ins: StandIns, scale: str
) -> None:
    """Write `report.md`, `report.html`, `claims.json` and `figures/*.svg` into `out`.

    `stand_ins` maps our architectures (and data sets) to those of the paper that they stand for.
    What has no data is left out and said. Raises UserError where a file cannot be written.
    """
    claims = judge_claims(results, stand_ins)
    write_json(out / "claims.json", claims_json(claims))
    sections = list(_sections(results, claims, stand_ins, scale))
    intro = _intro(results, stand_ins, scale)
    records = [r.record for r in _unique(results) if r.record]
    made = provenance(records, "claims.json; record.json of each cell") if records else {}
    write_report(out / "report.html", title=title, intro=intro, sections=sections, provenance=made)
    write_bytes(out / "report.md", _markdown(title, intro, sections, made).encode())


def _sections(
    results: Results, claims: Sequence[Claim], stand_ins: StandIns, scale: str
) -> Iterator[Section]:
    absent = ", ".join(claim.claim for claim in claims if not claim.evidence)
    claims = [claim for claim in claims if claim.evidence]
    if claims:
        said = [_LEGEND] + [f"No cell of this study is about {absent}."] * bool(absent)
        yield Section("Claims", said, [summary(claims)])
    for study, heading in (("table1", "Table 1"), ("table2", "Table 2")):
        found = list(tables.pair_tables(results, study, stand_ins))
        yield from _section(results, study, f"{heading}: students", found)
    teachers = tables.teacher_table(results, stand_ins)
    yield from _section(results, "table3", "Table 3: teachers", [teachers] if teachers else [])
    transfers = list(tables.transfer_tables(results, stand_ins))
    yield from _section(results, "table4", "Table 4: transfer", transfers)
    ablation = list(tables.ablation_tables(results, stand_ins))
    yield from _section(results, "ablation", "Ablation: reweighting", ablation)
    swept = figures.sweeps({k: sweep(results, k) for k in SWEPT})
    drawn = [swept.named("figure2")] if swept else []
    yield from _section(results, "figure2", "Figure 2: negatives and temperature", drawn)
    yield from _analyses(results)
    yield from _rivals(results, stand_ins, scale)
    if claims:
        yield Section("How claims are decided", RULE, [])
    for claim in claims:
        text = [f"{claim.verdict.capitalize()}: {claim.text}. Paper: {claim.paper}."]
        yield Section(claim.claim, text, evidence_tables(claim))
    yield from _masking(results)
    yield _inconsistencies(results)


def _section(
    results: Results,
    study: str,
    heading: str,
    content: Sequence[Table | Figure],
    said: str = "",
) -> Iterator[Section]:
    """Left out where the study is not planned; one line where cells of it are not done."""
    here = [result for result in results if result.study == study]
    if here:
        yield Section(heading, [text for text in (_waiting(here), said) if text], content)


def _waiting(results: Results) -> str:
    cells = _unique(results)
    waiting = sum(cell.record is None for cell in cells)
    return f"{waiting} of {len(cells)} cells not run yet." if waiting else ""


def _analyses(results: Results) -> Iterator[Section]:
    views = {
        "figure3": ("natural", "Figure 3: class correlations, natural images"),
        "figure4": ("attacked", "Figure 4: class correlations, attacked images"),
    }
    for study, (view, heading) in views.items():
        records = _records(results, study)
        title = "Absolute differences of class correlations from the teacher's"
        over = f", mean over {len(records)} seeds" * (len(records) > 1)
        if records:
            nets = dict.fromkeys(each["architecture"] for each in records[0]["models"].values())
            title += f" ({' → '.join(nets)}, {records[0]['n']:,} test images)"
        drawn = figures.correlations(records, view, f"{title}, {view} images{over}")
        content: list[Table | Figure] = [likeness_table(records, view)] if records else []
        if drawn:
            content.append(drawn.named(study))
        yield from _section(results, study, heading, content)
    records = _records(results, "figure5")
    content = []
    if records:
        drawn = embedding_figure(records[0], network_name)
        content = [geometry_table(records), drawn.named("figure5")]
    said = f"The picture is of seed {records[0]['seed']}." if len(records) > 1 else ""
    heading = "Figure 5: features of two classes"
    yield from _section(results, "figure5", heading, content, said)


def _records(results: Results, study: str) -> list[Mapping[str, Any]]:
    arm = select(results, (study,), "analysis", role="analysis")
    return [result.record for result in arm.results if result.record]


def _rivals(results: Results, stand_ins: StandIns, scale: str) -> Iterator[Section]:
    content: list[Table | Figure] = list(tables.rival_tables(results, stand_ins))
    arms_of_pairs = [arms for _, arms in tables.rival_arms(results)]
    content += _numbered("rivals", map(figures.rivals_figure, arms_of_pairs))
    content += tables.difference_tables(results)
    content += _numbered("differences", map(figures.rivals_differences, arms_of_pairs))
    if scale == "full":
        content.append(tables.quoted_table())
    yield from _section(results, "rivals", "Rivals", content)


def _numbered(name: str, drawn: Iterable[Figure | None]) -> Iterator[Figure]:
    """The figures that there are, named `name`, `name-2` and so on."""
    for index, figure in enumerate(drawn):
        if figure:
            yield figure.named(name + f"-{index + 1}" * bool(index))


def _masking(results: Results) -> Iterator[Section]:
    """Which models failed a check for masked gradients."""
    lines, passed, diagnoses = [], 0, []
    for cell in _unique(results):
        path = cell.folder / "diagnosis.json"
        if cell.record is None or not path.is_file():
            continue
        diagnoses.append(read_checks(path))
        failed = [check for check in diagnoses[-1] if not check["passed"]]
        passed += not failed
        if failed:
            text = "; ".join(f"{check['name']} ({check['text']})" for check in failed)
            lines.append(Check(_named(cell, cell.record["dataset"]), False, text))
    if passed or lines:
        text = (
            f"{passed} of {passed + len(lines)} models passed every check on a fixed part of the "
            f"test images{images_checked(diagnoses)} (Athalye et al. 2018, Carlini et al. 2019)"
            + ("; these failed some:" if lines else ".")
        )
        yield Section("Masked gradients", [text], [Checks(lines)] if lines else [])


def _named(cell: Result, dataset: str) -> str:
    """The cell in words; its labels call the data by the paper's name."""
    labels = {**cell.labels, "dataset": dataset}
    nets = " → ".join(str(labels[k]) for k in ("teacher", "student") if labels.get(k))
    varied = ", ".join(
        f"{key} {labels[key]}"
        for key in ("reweight", "negatives", "temperature", "source", "dataset")
        if labels.get(key) is not None
    )
    method = labels.get("method", labels.get("role"))
    return ", ".join(
        filter(None, (f"{method} ({labels['role']})", nets, varied, f"seed {cell.seed}"))
    )


def _inconsistencies(results: Results) -> Section:
    """The notes to what was studied, and those to the method."""
    data = paper()
    named = {**data["tables"], "figure2": data["figure2"]}
    notes = [
        f"{_WRITTEN[study]}: {note}"
        for study in dict.fromkeys(result.study for result in results)
        if study in named
        for note in named[study]["notes"]
    ]
    return Section("Where the paper contradicts itself", [*notes, *data["notes"]], [])


def _intro(results: Results, stand_ins: StandIns, scale: str) -> list[str]:
    cells = _unique(results)
    done = sum(cell.record is not None for cell in cells)
    seeds = sorted({cell.seed for cell in cells})
    named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    planned = f"{done} of {len(cells)} cells done, {named}" if cells else "Nothing planned"
    lines = [f"Scale {scale}: {planned}."]
    if stand_ins and any(cell.study != "rivals" for cell in cells):
        standing = ", ".join(
            f"{ours} for {dataset_name(architecture_name(theirs))}"
            for ours, theirs in stand_ins.items()
        )
        lines.append(
            f"Smaller networks and other data stand in for the paper's: {standing}. Its figures "
            "are shown beside ours for the direction of differences, not for their size."
        )
    return [*lines, *attacker(cells), tables.HOW_TO_READ]


def _unique(results: Results) -> list[Result]:
    """A cell that stands in several studies counts once."""
    return list({result.key: result for result in results}.values())


def _markdown(
    title: str, intro: Sequence[str], sections: Sequence[Section], made: Mapping[str, object]
) -> str:
    blocks = [f"# {title}", *intro]
    for section in sections:
        blocks += [f"## {section.heading}", *section.paragraphs]
        for item in section.content:
            if isinstance(item, Figure):
                blocks += [f"![{item.alt}]({item.file})", item.caption]
            else:
                blocks.append(item.markdown().strip())
    if made:
        facts = [f"- {name}: {fact}" for name, fact in written_out(made)]
        blocks += ["## How this was made", "\n".join(facts)]
    return "\n\n".join(blocks) + "\n"

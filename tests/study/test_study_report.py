"""The report of made-up studies: what it says, what it leaves out, and that every link leads."""

import dataclasses
import json
import random
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from scipy import stats

from command_line import refusal
from gacd import config as c
from gacd.report.page import slug
from gacd.storage import write_json
from gacd.study import work
from gacd.study.cells import Cell
from gacd.study.claim_tables import likeness_table
from gacd.study.grids import Entry
from gacd.study.report import write_study_report
from gacd.study.tables import (
    ablation_tables,
    difference_tables,
    pair_tables,
    quoted_table,
    rival_tables,
    teacher_table,
    transfer_tables,
)
from made_up import STAND_INS, Maker, whole_study

STUDIES = (
    "table1",
    "table3",
    "table4",
    "ablation",
    "figure2",
    "figure3",
    "figure4",
    "figure5",
    "rivals",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return whole_study(Maker(tmp_path_factory.mktemp("cells")))


@pytest.fixture(scope="module")
def out(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write(results, folder)
    return folder


def write(results, out, scale="small", stand_ins=STAND_INS):
    write_study_report(results, out, title="Made up", stand_ins=stand_ins, scale=scale)


def waiting(result):
    return dataclasses.replace(result, record=None)


def number(text):
    return float(text.replace("−", "-"))


def rows(table):
    """Cells' texts by the row's name and the column's heading, numbered if it repeats."""
    seen = []
    for column in table.columns:
        count = sum(name.split("#")[0] == column.heading for name in seen)
        seen.append(f"{column.heading}#{count}" if count else column.heading)
    return {str(r[0]): dict(zip(seen, (c.text for c in r), strict=True)) for r in table.rows}


def test_the_files_are_there_and_every_figure_is_linked(out):
    text = (out / "report.md").read_text()
    linked = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert sorted(linked) == [
        f"figures/{n}.svg"
        for n in ("differences", "figure2", "figure3", "figure4", "figure5", "rivals")
    ]
    assert {f"figures/{p.name}" for p in (out / "figures").iterdir()} == set(linked)
    for name in linked:
        assert ET.parse(out / name).getroot().tag.endswith("svg")
    assert len(json.loads((out / "claims.json").read_text())) == 9


def test_every_claim_leads_to_its_evidence(out):
    text = (out / "report.md").read_text()
    headings = {slug(line[3:]) for line in text.splitlines() if line.startswith("## ")}
    links = re.findall(r"\]\(#([^)]+)\)", text)
    assert links == [f"c{i}" for i in range(1, 10)]
    assert set(links) <= headings
    page = (out / "report.html").read_text()
    for link in links:
        assert page.count(f'<a href="#{link}">') == 2  # in the summary, and among the sections
        assert page.count(f'id="{link}"') == 1


def test_markdown_and_page_have_the_same_sections(out):
    text, page = ((out / f"report.{kind}").read_text() for kind in ("md", "html"))
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert re.findall(r'<h2 id="[^"]*">([^<]*)</h2>', page) == headings[:-1]
    assert headings[-1] == "How this was made"
    assert "How this was made" in page


def test_markdown_tables_are_whole(out):
    text = (out / "report.md").read_text()
    for block in text.split("\n\n"):
        if block.startswith("| "):
            assert len({line.count(" | ") for line in block.splitlines()[2:]}) == 1


def test_table_1_has_ours_beside_the_papers(results):
    found = list(pair_tables(results, "table1", STAND_INS))
    assert [table.caption for table in found] == [
        f"{t} → {s}, CIFAR-10 (JPEG)"
        for t in ("wrn-10-1 (for ResNet-18)", "wrn-10-2 (for WRN-34-10)")
        for s in ("wrn-10-1 (for ResNet-18)", "wrn-10-2 (for WRN-34-10)")
    ]
    same = rows(found[0])
    assert list(same) == ["teacher", "no teacher", "KD", "ARD", "GACD+AFT", "GACD"]
    assert same["GACD+AFT"]["paper's natural"] == "82.73"
    assert same["GACD+AFT"]["paper's PGD-20"] == "52.75"
    assert same["teacher"]["paper's natural"] == "76.54"
    assert same["no teacher"]["paper's natural"] == "–"
    assert float(same["GACD+AFT"]["natural"]) == pytest.approx(62.0, abs=0.2)
    assert same["GACD+AFT"]["seeds"] == "3"
    assert rows(found[2])["KD"]["paper's PGD-20"] == "4.63"


def test_table_2_takes_no_figure_of_another_data_set(maker):
    labels = {"teacher": "wrn-10-2", "student": "wrn-10-1", "dataset": "cifar100"}
    made = [
        maker("table2", 0, {"natural": 40, "pgd20": 20}, role="student", method="ard", **labels),
        maker("table2", 0, {"natural": 40, "pgd20": 20}, role="teacher", method="pgd-at", **labels),
    ]
    (table,) = pair_tables(made, "table2", STAND_INS)
    assert not any("paper" in column.heading for column in table.columns)
    paper = {"wrn-10-1": "WRN-16-2", "wrn-10-2": "WRN-40-2"}
    (table,) = pair_tables(made, "table2", paper)
    assert rows(table)["ARD"]["paper's natural"] == "49.27"
    assert rows(table)["teacher"]["paper's natural"] == "60.27"


def test_tables_3_and_4_and_the_ablation(results):
    teachers = teacher_table(results, STAND_INS)
    assert [row["paper's natural"] for row in rows(teachers).values()] == ["76.54", "84.41"]
    stand_ins = {**STAND_INS, "animals": "stl10", "vehicles": "cifar100"}
    animals, vehicles = map(rows, transfer_tables(results, stand_ins))
    assert list(animals) == ["teacher", "KD", "ARD", "GACD"]
    assert animals["teacher"]["paper's natural"] == "48.81"
    assert vehicles["GACD"]["paper's PGD-7"] == "16.02"
    (ablation,) = map(rows, ablation_tables(results, STAND_INS))
    assert {name: row.get("paper's natural") for name, row in ablation.items()} == {
        "ARD, reweighted": "80.59",
        "ARD, not reweighted": "79.05",
        "GACD+AFT, reweighted": "85.35",
        "GACD+AFT, not reweighted": "83.53",
    }


def test_costs_are_relative_to_the_student_trained_alone(results):
    costly = []
    for r in results:
        flops = {"rslad": 250.0, "gacd": 70.0}.get(r.labels.get("method"))
        costly.append(dataclasses.replace(r, record={**r.record, "train_flops": flops or 100.0}))
    (table,) = rival_tables(costly, STAND_INS)
    costs = {name: row["cost"] for name, row in rows(table).items()}
    assert costs["RSLAD"] == "2.50×"
    assert costs["teacher"] == "–"  # is none of the students' rivals
    assert costs["no teacher"] == costs["GACD+AFT"] == "1.00×"


def test_differences_are_paired_and_marked_where_decided(results):
    (table,) = difference_tables(results)
    (accuracies,) = map(rows, rival_tables(results, STAND_INS))
    found = rows(table)
    assert "no teacher" not in found and found.keys() | {"no teacher"} <= accuracies.keys()
    for line in table.rows:
        name, natural = line[0].text, line[1]
        said, _, mark = natural.text.partition(" ")
        ours, alone = (float(accuracies[n]["natural"]) for n in (name, "no teacher"))
        assert number(said) == pytest.approx(ours - alone, abs=0.11)
        low, high = map(number, natural.aside.strip("[]").split(","))
        assert mark == ("▲" if low > 0 else "▼" if high < 0 else "")
    one_seed = [r for r in results if r.seed == 0]
    (table,) = difference_tables(one_seed)
    assert not any(mark in table.markdown().partition("Percentage")[0] for mark in "▲▼")


def test_quoted_figures_stand_at_full_scale_alone(results, tmp_path, out):
    assert "Published elsewhere" not in (out / "report.md").read_text()
    write([waiting(r) for r in results if r.study == "rivals"], tmp_path, scale="full")
    assert quoted_table().markdown().strip() in (tmp_path / "report.md").read_text()


def test_masked_gradients_are_listed_by_model(results, tmp_path):
    failed = {
        "name": "AutoAttack is near PGD", "passed": False, "value": 12.0, "limit": 10.0,
        "text": "12.0 points below pgd20",
    }  # fmt: skip
    moved = []
    for index, result in enumerate(results[:4]):
        folder = tmp_path / str(index)
        folder.mkdir()
        checks = [{**failed, "passed": index != 2}]
        (folder / "diagnosis.json").write_text(json.dumps(checks))
        moved.append(dataclasses.replace(result, folder=folder))
    write(moved, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "3 of 4 models passed every check" in text
    line = next(line for line in text.splitlines() if "12.0 points below pgd20" in line)
    assert "kd (student), wrn-10-1 → wrn-10-1" in line
    assert "seed 0" in line
    assert f"dataset {moved[2].record['dataset']}" in line  # not the paper's


def test_what_is_not_run_is_said_in_a_line(results, tmp_path):
    ablation = [r for r in results if r.study == "ablation"]
    write([waiting(r) if r.seed == 2 else r for r in ablation], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "4 of 12 cells not run yet." in text
    assert "2 of 3" in text


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_any_part_of_a_study_can_be_reported(results, tmp_path, share):
    generator = random.Random(share)
    partly = [r if generator.random() < share else waiting(r) for r in results]
    write(partly, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert all(f"## {name.capitalize()[:5]}" in text for name in ("table1", "figure2", "rivals"))
    if share == 0.0:
        assert not (tmp_path / "figures").exists()
        assert "How this was made" not in text


def test_claims_of_which_nothing_is_planned_take_no_room(results, tmp_path):
    write([r for r in results if r.study == "table3"], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## Claims" not in text and "## C1" not in text
    write([r for r in results if r.study == "ablation"], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "No cell of this study is about C1, C2, C5, C6, C7, C8, C9." in text
    assert re.findall("^## (C.)$", text, re.MULTILINE) == ["C3", "C4"]


def test_autoattack_stands_beside_every_headline_under_pgd(results, tmp_path):
    write(results, tmp_path)
    text = (tmp_path / "report.md").read_text()
    headlines = [line for line in text.splitlines() if "Here: " in line and "PGD-20" in line]
    assert len(headlines) >= 5
    assert all(line.count("AutoAttack") == line.count("PGD-20") for line in headlines)


@pytest.mark.parametrize("study", [*STUDIES, None])
def test_each_study_by_itself_and_none(results, tmp_path, study):
    write([r for r in results if r.study == study], tmp_path, stand_ins={})
    text = (tmp_path / "report.md").read_text()
    assert ("cells done, seeds 0, 1, 2" in text) == (study is not None)
    assert ("Nothing planned" in text) == (study is None)
    assert "contradicts itself" in text


def test_rivals_stand_beside_their_teacher_whatever_else_was_run(results):
    teachers = [r for r in results if r.study == "table1" and r.labels["role"] == "teacher"]
    here = [r for r in results if r.study == "rivals"]
    here += [dataclasses.replace(r, study="rivals") for r in teachers]
    (table,) = rival_tables(here, {})
    assert table.rows[0][0].text == "teacher"
    assert table.markdown() == next(iter(rival_tables(results, {}))).markdown()


def test_rivals_without_a_teacher_have_rows_of_their_own(maker):
    pair = {"teacher": "big", "student": "small", "dataset": "cifar10"}
    kinds = {
        ("undefended", "natural"): ("undefended", 90.0),
        ("baseline", "trades"): ("TRADES, no teacher", 60.0),
        ("baseline", "pgd-at"): ("no teacher", 50.0),
        ("student", "ard"): ("ARD", 70.0),
    }
    made = [
        maker("rivals", 0, {"natural": natural, "pgd20": 20.0}, role=role, method=method, **pair)
        for (role, method), (_, natural) in kinds.items()
    ]
    (table,) = rival_tables(made, {})
    found = {name: row["natural"] for name, row in rows(table).items()}
    assert found == {name: f"{natural:.1f}" for name, natural in kinds.values()}


def test_a_cell_of_several_studies_counts_once(results, out):
    cells = len({r.key for r in results})
    assert cells < len(results)
    assert f"Scale small: {cells} of {cells} cells done" in (out / "report.md").read_text()


def test_each_figure_of_correlations_shows_its_own_view(results, out):
    text = (out / "report.md").read_text()
    records = [r.record for r in results if r.study == "figure3"]
    for number, view in ((3, "natural"), (4, "attacked")):
        section = text.partition(f"## Figure {number}: ")[2].partition("\n## ")[0]
        assert likeness_table(records, view).markdown().strip() in section
        mean = sum(r["correlations"]["gacd"][view]["mean"] for r in records) / len(records)
        assert f"GACD: mean {mean:.3f}, from" in section


def test_figure_5_has_the_geometry_of_every_seed_and_one_picture(results, out):
    section = (out / "report.md").read_text().partition("## Figure 5: ")[2].partition("\n## ")[0]
    records = [r.record for r in results if r.study == "figure5"]
    assert len(records) > 1
    for name, shown in (("teacher", "teacher"), ("natural", "undefended"), ("gacd", "GACD")):
        values = [r["geometry"][name]["silhouette"] for r in records]
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        low, high = np.mean(values) - half, np.mean(values) + half
        cell = f"{np.mean(values):.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")
        assert re.search(rf"\| {shown} \| {re.escape(cell)} \|.*\| {len(records)} \|", section)
    assert f"The picture is of seed {records[0]['seed']}." in section


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("table1", {"natural": "abc"}, 'record.json: not written by .*natural is "abc"'),
        ("table1", {"environment": None}, "record.json: not written by .*environment is null"),
        ("figure3", {"cka": {}}, "analysis.json: not written by .*it has no cka.ard"),
        ("figure5", {"classes": 3}, "analysis.json: not written by .*classes is 3"),
    ],
)
def test_a_record_changed_by_hand_is_named(
    results, tmp_path, monkeypatch, capsys, name, change, message
):
    config = {"config": {"seed": 0, "threat": {"eps": 0.1}}}
    result = next(result for result in results if result.study == name)
    cell = Cell(config=c.Analyze() if name.startswith("figure") else c.Train())
    entry = Entry(study=name, labels=result.labels, seed=result.seed, cell=cell)
    monkeypatch.setattr(work, "chosen", lambda cfg: [entry])
    path = work.Folder(tmp_path).of(cell) / cell.record
    write_json(path, {**result.record, **config, **change})
    assert re.search(message, refusal(capsys, "study", "report", "--out", str(tmp_path)))

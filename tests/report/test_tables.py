"""What the tables say is what the records say."""

import io
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gacd.report.tables import Cell, Column, Table, comparison_table


def record(**changes) -> dict:
    plain = {"model": "net", "method": "gacd", "dataset": "digits", "seed": 0, "n": 360}
    return {**plain, "natural": 95.0, "pgd20": 50.0, "autoattack": 40.0, **changes}


def column(table: Table, heading: str) -> list[str]:
    index = [c.heading for c in table.columns].index(heading)
    return [str(row[index]) for row in table.rows]


class Cells(HTMLParser):
    """The text of the body's cells, row by row."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def printed(table: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue()


def test_a_figure_shows_the_records_own_interval():
    table = comparison_table([record(natural=57.62, intervals={"natural": [54.0, 61.1]})])
    assert column(table, "natural") == ["57.6 [54.0, 61.1]"]
    assert column(table, "PGD-20") == ["50.0"]


def test_sizes_are_stated_and_the_subset_of_autoattack_too():
    table = comparison_table([record(autoattack_n=200)])
    assert "n = 360 test images, AutoAttack on 200 of them." in table.notes
    mixed = comparison_table([record(autoattack_n=200), record(method="ard", n=10000)])
    assert column(mixed, "n") == ["360 (AutoAttack 200)", "10,000"]


def test_the_attacker_is_named():
    """Of a record, or of a line of results.json."""
    grey, half = {"norm": "linf", "eps": 8 / 255}, {"norm": "l2", "eps": 0.5}
    assert "Attacker: linf, eps = 8/255." in comparison_table([record(settings=grey)]).notes
    notes = comparison_table([record(**half), record(**grey)]).notes
    assert [n for n in notes if "Attacker" in n] == [
        "Attacker: l2, eps = 0.5.", "Attacker: linf, eps = 8/255.",
    ]  # fmt: skip


def test_a_row_is_called_by_its_method_and_role():
    table = comparison_table([record(role="teacher"), record(role="student"), record()])
    assert column(table, "method") == ["gacd (teacher)", "gacd (student)", "gacd"]
    assert [c.heading for c in table.columns][-1] == "model"


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.tuples(*[st.floats(0, 100)] * 3), min_size=1, max_size=5),
)
def test_every_rendering_holds_every_number(values):
    names = ("natural", "pgd20", "autoattack")
    records = [
        record(method=f"m{i}", **dict(zip(names, row, strict=True))) for i, row in enumerate(values)
    ]
    table = comparison_table(records)
    expected = [[f"m{i}", *(f"{v:.1f}" for v in row), "net"] for i, row in enumerate(values)]
    html = Cells(table.html()).rows[1:]
    markdown = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.markdown().splitlines()
        if line.startswith("| m") and not line.startswith("| method")
    ]
    terminal = [line.split() for line in printed(table, 200).splitlines() if "net" in line]
    assert html == markdown == terminal == expected


def test_a_narrow_terminal_never_breaks_a_number(results):
    results = [{**r, "model": "a-model-with-quite-a-long-name"} for r in results]
    text = printed(comparison_table(results), 60)
    assert max(map(len, text.splitlines())) <= 60
    for r in results:
        assert re.search(rf"(?<!\S){r['pgd20']:.1f}(?!\S)", text)
    assert text.count("[46.6, 60.4]") == len(results)


def test_a_column_for_every_attack_in_the_order_asked_for():
    names = ("natural", "pgd100x5", "fgsm", "cw", "cw20", "transfer", "worst")
    figures = {name: 90.0 - i for i, name in enumerate(names)}
    intervals = {name: [value - 5, value + 5] for name, value in figures.items()}
    plain = {"model": "net", "method": "gacd", "dataset": "digits", "seed": 0, "n": 360}
    later = {**plain, "method": "ard", "natural": 92.0, "pgd20": 50.0}
    table = comparison_table([{**plain, **figures, "intervals": intervals}])
    headings = ["natural", "PGD-100×5", "FGSM", "CW", "CW-20", "transfer"]
    assert [c.heading for c in table.columns] == ["method", *headings, "model"]
    assert column(table, "PGD-100×5") == ["89.0 [84.0, 94.0]"]
    both = comparison_table([{**plain, **figures, "intervals": intervals}, later], worst=True)
    assert [c.heading for c in both.columns[1:9]] == [*headings, "worst", "PGD-20"]
    assert column(both, "PGD-20") == ["–", "50.0"]
    assert any("every attack" in note for note in both.notes)
    assert not any("every attack" in note or "ascade" in note for note in table.notes)


def test_a_dash_is_explained_where_it_stands():
    lacking = record(method="ard")
    del lacking["autoattack"]
    table = comparison_table([record(), lacking])
    assert column(table, "AutoAttack") == ["40.0", "–"]
    said = "–: not measured; the model's record holds no figure of this attack."
    assert said in table.notes
    assert said not in comparison_table([record(), record()]).notes


def test_a_cascade_is_stated():
    (note, *_) = comparison_table([record(cascade=True)]).notes[1:]
    assert "worst case of its attack and of those before it" in note


def test_many_attacks_on_a_narrow_terminal_keep_their_numbers_and_lose_intervals():
    names = ("natural", "fgsm", "pgd20", "pgd100x5", "cw", "autoattack", "transfer")
    figures = {name: 90.25 - i for i, name in enumerate(names)}
    intervals = {name: [value - 5, value + 5] for name, value in figures.items()}
    table = comparison_table([record(**figures, intervals=intervals)])
    wide, narrow = printed(table, 200), printed(table, 80)
    assert "[85.2, 95.2]" in wide and "wider terminal" not in wide
    assert "[" not in narrow.split("natural")[1].split("n = ")[0] and "wider terminal" in narrow
    for value in figures.values():
        assert re.search(rf"(?<!\S){value:.1f}(?!\S)", narrow)
    assert "PGD-100×5" in narrow and "AutoAttack" in narrow


@pytest.mark.parametrize("columns", [20, 28, 40])
def test_a_very_narrow_terminal_cuts_no_number(columns: int):
    figures = dict.fromkeys(("natural", "pgd20", "autoattack"), 51.25)
    intervals = {name: [46.6, 60.4] for name in figures}
    narrow = printed(comparison_table([record(**figures, intervals=intervals)]), columns)
    assert narrow.count("51.2") == 3 and "…" not in narrow
    assert "AutoAttack" in narrow


def test_four_attacks_on_eighty_columns_break_no_word():
    figures = dict.fromkeys(("natural", "fgsm", "pgd20", "autoattack"), 51.25)
    intervals = {name: [46.6, 60.4] for name in figures}
    about = {"role": "undefended", "model": "wrn-34-10", "parameters": 48_263_952}
    table = comparison_table([record(**figures, intervals=intervals, **about)])
    narrow, wide = printed(table, 80), printed(table, 90)
    assert narrow.count("[46.6, 60.4]") == wide.count("[46.6, 60.4]") == len(figures)
    assert {"(undefended)", "wrn-34-10"} <= set(narrow.split())
    assert "params" not in wide.split("n =")[1]
    assert "48,263,952" in wide and "48,263,952" not in narrow
    assert "Also on a wider terminal, and in the records: params." in narrow


def test_text_is_escaped():
    table = Table("a < b", (Column("x|y"),), ((Cell("<b>|[red]", "& more"),),))
    assert "<b>" not in table.html()
    assert Cells(table.html()).rows == [["x|y"], ["<b>|[red] & more"]]
    assert "| <b>\\|[red] & more |" in table.markdown()
    assert "<b>|[red] & more" in printed(table, 80)


def test_rows_must_fill_their_columns():
    with pytest.raises(ValueError, match="rows of"):
        Table("t", (Column("a"), Column("b")), ((Cell("1"),),))


def test_a_model_of_one_answer_is_named_below_the_table():
    rows = [record(role="teacher"), record(method="kd", role="student", answered_alike=99.5)]
    notes = comparison_table(rows).notes
    assert [note for note in notes if "answer" in note] == [
        "kd (student): one and the same answer to 99.5 % of the test images; "
        "where that happens to be right, no attack can change it."
    ]


def test_parameters_stand_where_they_are_known():
    table = comparison_table([record(parameters=2000), record(method="ard")])
    assert column(table, "params") == ["2,000", "–"]


def test_intervals_are_explained_where_they_stand():
    with_one = [record(intervals={"natural": [1, 9]}), record(method="ard")]
    assert any("binomial" in note for note in comparison_table(with_one).notes)
    assert not any("binomial" in note for note in comparison_table(with_one[1:]).notes)

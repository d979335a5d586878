"""Tables of text: built once from records, shown on a terminal, in Markdown and in HTML."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table as RichTable

Record = Mapping[str, Any]
HEADLINES = ("natural", "pgd20", "autoattack")
_WORST = "worst"
_MISSING = "–"
_NAME_WIDTH = 5  # the least that a terminal's column of names keeps


def number(x: float, places: int, sign: str = "") -> str:
    """With a true minus, where it has one."""
    return f"{x:{sign}.{places}f}".replace("-", "−")


def signed(x: float, places: int = 1) -> str:
    """With its sign, and a true minus."""
    return number(x, places, "+")


def heading(attack: str) -> str:
    """An attack's name in a table: PGD-20 for pgd20, PGD-100×5 for pgd100x5, AutoAttack."""
    if found := re.fullmatch(r"(pgd|cw)(\d+)(?:x(\d+))?", attack):
        kind, steps, restarts = found.groups()
        return f"{kind.upper()}-{steps}" + (f"×{restarts}" if restarts else "")
    return {"fgsm": "FGSM", "cw": "CW", "autoattack": "AutoAttack"}.get(attack, attack)


class Cell(NamedTuple):
    """What a cell says, and what stands beside it in a quieter voice (an interval, a spread)."""

    text: str
    aside: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.aside}".rstrip()


class Column(NamedTuple):
    """A heading, whether the column holds numbers (set flush right), and whether it may be spared.

    A narrow terminal leaves out what may be spared before it breaks a name or hides an interval.
    """

    heading: str
    numeric: bool = False
    spare: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns, a caption above and notes below; nothing is computed here.

    `rich.print(table)` shows it on a terminal; `markdown()` and `html()` write it.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.rows}
        if widths - {len(self.columns)}:
            raise ValueError(f"rows of {sorted(widths)} cells under {len(self.columns)} columns")

    def __rich_console__(
        self, console: "Console", options: "ConsoleOptions"
    ) -> "Iterator[RenderableType]":
        """`rich.print(table)` fits the terminal: where a row is too long, asides go below.

        Where even that would break words, columns that can be spared are left out; where it would
        cut numbers short, the asides of numbers are.
        """
        one_line = self._terminal(" ", gap=1)
        unbounded = options.update(max_width=10_000)
        if console.measure(one_line, options=unbounded).maximum <= options.max_width:
            yield one_line
        elif self._stacked_width() <= options.max_width:
            yield self._terminal("\n", gap=0)
        else:
            fewer = self._without_spare()
            if fewer._stacked_width(_NAME_WIDTH) > options.max_width:
                fewer = fewer._without_asides()
            fits = fewer._stacked_width(_NAME_WIDTH) <= options.max_width
            yield fewer._terminal("\n", gap=0) if fits else fewer._as_list()

    def _as_list(self) -> "RenderableType":
        """A line a number, where a row of them is too wide: half a number misleads."""
        from rich.text import Text

        lines = [self.caption]
        for first, *cells in self.rows:
            lines.append(first.text)
            pairs = zip(self.columns[1:], cells, strict=True)
            lines += [f"  {column.heading} {cell.text}" for column, cell in pairs]
        return Text("\n".join([*lines, *self.notes]))

    def _stacked_width(self, names: int | None = None) -> int:
        """Of the terminal's table with asides below; words get `names`, if not their length."""
        widths = [
            max(len(text) for cell in (Cell(column.heading), *cells) for text in cell)
            if column.numeric or names is None
            else names
            for column, *cells in zip(self.columns, *self.rows, strict=True)
        ]
        return sum(widths) + len(widths) + 1

    def _without_spare(self) -> "Table":
        kept = [not column.spare for column in self.columns]
        if all(kept):
            return self
        spared = ", ".join(column.heading for column in self.columns if column.spare)
        return replace(
            self,
            columns=tuple(compress(self.columns, kept)),
            rows=tuple(tuple(compress(row, kept)) for row in self.rows),
            notes=(*self.notes, f"Also on a wider terminal, and in the records: {spared}."),
        )

    def _without_asides(self) -> "Table":
        rows = tuple(
            tuple(
                Cell(cell.text) if column.numeric else cell
                for column, cell in zip(self.columns, row, strict=True)
            )
            for row in self.rows
        )
        notes = (*self.notes, "Intervals: on a wider terminal, and in the records.")
        return replace(self, rows=rows, notes=notes)

    def _terminal(self, before_aside: str, gap: int) -> "RichTable":
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(self.caption, style="bold"),
            caption=Text("\n".join(self.notes)) if self.notes else None,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
            pad_edge=False,
            padding=(0, gap, 0, 0),
        )
        for column in self.columns:
            table.add_column(
                Text(column.heading),
                justify="right" if column.numeric else "left",
                no_wrap=column.numeric,  # half a number misleads, half a name does not
                overflow="fold",
            )
        for row in self.rows:
            asides = [before_aside + cell.aside if cell.aside else "" for cell in row]
            cells = zip(row, asides, strict=True)
            table.add_row(*(Text.assemble(cell.text, (aside, "dim")) for cell, aside in cells))
        return table

    def markdown(self) -> str:
        """A GitHub table, its caption and notes as paragraphs."""
        head = [column.heading for column in self.columns]
        rule = ["---:" if column.numeric else "---" for column in self.columns]
        lines = [head, rule, *([str(cell) for cell in row] for row in self.rows)]
        table = "\n".join("| " + " | ".join(map(_markdown, line)) + " |" for line in lines)
        return "\n\n".join([self.caption, table, *self.notes]) + "\n"

    def html(self) -> str:
        """A `<table>` in a container of its own, which scrolls sideways on a narrow screen."""
        head = "".join(
            f'<th scope="col"{_numeric(column)}>{escape(column.heading)}</th>'
            for column in self.columns
        )
        body = "\n".join(
            f'<tr><th scope="row">{_html(row[0])}</th>'
            + "".join(
                f"<td{_numeric(column)}>{_html(cell)}</td>"
                for column, cell in zip(self.columns[1:], row[1:], strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in self.notes)
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(self.caption)}">\n'
            f"<table>\n<caption><span>{escape(self.caption)}</span></caption>\n"
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>\n{notes}"
        )


def comparison_table(results: Sequence[Record], *, caption: str = "", worst: bool = False) -> Table:
    """Accuracies in percent of every model of a run, a row each, with the records' own intervals.

    Each record: `model, method, dataset, n`, and an accuracy by attack; optional `role`
    (undefended, teacher, student), `parameters`, `autoattack_n`, `cascade`, `answered_alike`,
    `intervals` (of [low, high] by attack). There is a column for every attack that has an interval
    in some record, in their order, and for natural, PGD-20 and AutoAttack; for `worst` only if
    asked for. Rows keep the records' order. No figure is set in bold: which difference decides
    anything is not for a typeface to say. Several seeds: `gacd seeds`.
    """
    sizes = sorted({_sizes(record) for record in results})
    columns: list[tuple[Column, list[Cell]]] = []

    def add(
        title: str, cells: Iterable[Cell | str], *, numeric: bool = False, spare: bool = False
    ) -> None:
        column = [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells]
        columns.append((Column(title, numeric, spare), column))

    add("method", map(method_cell, results))
    if len(sizes) > 1:
        add("n", map(_size_text, results), numeric=True)
    attacks = [name for name in _attacks(results) if worst or name != _WORST]
    for attack in attacks:
        add(heading(attack), (_accuracy(record, attack) for record in results), numeric=True)
    add("model", (str(record["model"]) for record in results))
    counts = [record.get("parameters") for record in results]
    if any(count is not None for count in counts):
        texts = (_MISSING if count is None else f"{count:,}" for count in counts)
        add("params", texts, numeric=True, spare=True)
    datasets = dict.fromkeys(str(record["dataset"]) for record in results)
    return Table(
        caption=caption or f"Accuracy in % on {', '.join(datasets)}",
        columns=tuple(column for column, _ in columns),
        rows=tuple(zip(*(cells for _, cells in columns), strict=True)),
        notes=tuple(_notes(results, sizes, attacks)),
    )


def method_cell(record: Record) -> Cell:
    """A model's name in the tables of its run: method (role)."""
    role = record.get("role")
    return Cell(str(record["method"]), f"({role})" if role else "")


def _attacks(results: Sequence[Record]) -> list[str]:
    named = ((r, name) for r in results for name in (*(r.get("intervals") or ()), *HEADLINES))
    return list(dict.fromkeys(name for record, name in named if name in record))


def _accuracy(record: Record, key: str) -> Cell:
    if record.get(key) is None:
        return Cell(_MISSING)
    interval = (record.get("intervals") or {}).get(key)
    aside = f"[{interval[0]:.1f}, {interval[1]:.1f}]" if interval else ""
    return Cell(f"{record[key]:.1f}", aside)


def image_count(record: Record, attack: str) -> int:
    """On how many test images an accuracy of a record stands."""
    return int(record.get(f"{attack}_n") or record["n"])


def budgets(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Norm and eps of the attacks on these models, each once; eps in 255ths where that is shorter.

    Of whole records, or of lines of results.json.
    """
    settings = (record.get("settings", record) for record in records)
    found = sorted({(each["norm"], each["eps"]) for each in settings if "eps" in each})
    return [(norm, _budget(eps)) for norm, eps in found]


def _budget(eps: float) -> str:
    grey, percent = (abs(unit * eps - round(unit * eps)) < 1e-6 for unit in (255, 100))
    return f"{255 * eps:.0f}/255" if grey and not percent else f"{eps:.3g}"


def _sizes(record: Record) -> tuple[int, int]:
    """How many images the figures stand on: all attacks but AutoAttack, AutoAttack."""
    return int(record["n"]), image_count(record, "autoattack")


def _size_text(record: Record) -> str:
    n, part = _sizes(record)
    return f"{n:,}" if n == part else f"{n:,} (AutoAttack {part:,})"


def _notes(
    results: Sequence[Record], sizes: Sequence[tuple[int, int]], attacks: Sequence[str]
) -> Iterable[str]:
    if len(sizes) == 1:
        n, part = sizes[0]
        subset = f", AutoAttack on {part:,} of them" if part != n else ""
        yield f"n = {n:,} test images{subset}."
    for norm, eps in budgets(results):
        yield f"Attacker: {norm}, eps = {eps}."
    if any(record.get(attack) is None for record in results for attack in attacks):
        yield f"{_MISSING}: not measured; the model's record holds no figure of this attack."
    if any(record.get("cascade") for record in results):
        yield (
            "Cascade: an image once broken is not attacked again, so each figure is the worst case "
            "of its attack and of those before it."
        )
    for record in results:
        if alike := record.get("answered_alike"):
            yield (
                f"{method_cell(record)}: one and the same answer to {alike:g} % of the test "
                "images; where that happens to be right, no attack can change it."
            )
    if _WORST in attacks:
        yield "worst: right under every attack, on the images that met them all."
    if any(record.get("intervals") for record in results):
        yield "[low, high]: 95 % binomial interval over the test images, one seed."


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _numeric(column: Column) -> str:
    return ' class="number"' if column.numeric else ""


def _html(cell: Cell) -> str:
    aside = f' <span class="aside">{escape(cell.aside)}</span>' if cell.aside else ""
    return escape(cell.text) + aside

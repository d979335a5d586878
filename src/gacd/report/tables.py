"""Tables of text: built once from records, shown on a terminal, in Markdown and in HTML."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import compress
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from gacd.errors import UserError
from gacd.storage import read_json

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table as RichTable

Record = Mapping[str, Any]
_KEYS = ("model", "method", "dataset", "seed", "n", "evaluation", "settings", "environment")


def read_record(path: Path) -> dict[str, Any]:
    """A record of an evaluated model. Raises UserError for any other file."""
    record: dict[str, Any] = read_json(path, *_KEYS)
    return record


HEADLINES = ("natural", "pgd20", "autoattack")
_WORST = "worst"
_MISSING = "–"
_NAME_WIDTH = 5  # the least that a terminal's column of names keeps


def signed(x: float, places: int = 1) -> str:
    """With its sign, and a true minus."""
    return f"{x:+.{places}f}".replace("-", "−")


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
            fits = fewer._stacked_width(_NAME_WIDTH) <= options.max_width
            yield (fewer if fits else fewer._without_asides())._terminal("\n", gap=0)

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
            f"<table>\n<caption>{escape(self.caption)}</caption>\n"
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>\n{notes}"
        )


def comparison_table(results: Sequence[Record], *, caption: str = "", worst: bool = False) -> Table:
    """Accuracies in percent of every model, several seeds of one model gathered in one row.

        one seed:      57.6 [54.0, 61.1]    the interval is the record's own
        several seeds: 57.6 ± 1.2           mean and sample standard deviation over the seeds

    Each record: `model, method, dataset, seed, n`, and an accuracy by attack; optional `role`
    (undefended, teacher, student), `parameters`, `autoattack_n`, `seconds`, `cascade`, `intervals`
    (of [low, high] by attack). There is a column for every attack that has an interval in some
    record, in their order, and for natural, PGD-20 and AutoAttack; for `worst` only if asked for.
    Rows keep the records' order. No figure is set in bold: which difference decides anything is not
    for a typeface to say.

    Raises:
        UserError: no records, a record without a name, or two records of one seed in one row.
    """
    groups = _groups(results)
    several_seeds = any(len(group) > 1 for group in groups)
    sizes = sorted({_sizes(record) for record in results})
    columns: list[tuple[Column, list[Cell]]] = []

    def add(
        title: str, cells: Iterable[Cell | str], *, numeric: bool = False, spare: bool = False
    ) -> None:
        column = [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells]
        columns.append((Column(title, numeric, spare), column))

    def given(key: str) -> bool:
        return any(record.get(key) is not None for record in results)

    datasets = list(dict.fromkeys(str(record["dataset"]) for record in results))
    if len(datasets) > 1:
        add("dataset", (str(group[0]["dataset"]) for group in groups))
    add("method", (_method(group[0]) for group in groups))
    if len(sizes) > 1:
        add("n", (_size_text(group) for group in groups), numeric=True)
    attacks = [name for name in _attacks(results) if worst or name != _WORST]
    for attack in attacks:
        add(heading(attack), (_accuracy(group, attack) for group in groups), numeric=True)
    add("model", (str(group[0]["model"]) for group in groups))
    if given("parameters"):
        counts = [_count(group[0].get("parameters")) for group in groups]
        add("params", counts, numeric=True, spare=True)
    if several_seeds:
        add("seeds", (str(len(group)) for group in groups), numeric=True)
    if given("seconds"):
        add("time", (_seconds(group) for group in groups), numeric=True, spare=True)

    return Table(
        caption=caption or f"Accuracy in % on {', '.join(datasets)}",
        columns=tuple(column for column, _ in columns),
        rows=tuple(zip(*(cells for _, cells in columns), strict=True)),
        notes=tuple(_notes(groups, sizes, _WORST in attacks)),
    )


def _attacks(results: Sequence[Record]) -> list[str]:
    named = ((r, name) for r in results for name in (*(r.get("intervals") or ()), *HEADLINES))
    return list(dict.fromkeys(name for record, name in named if name in record))


def _groups(results: Sequence[Record]) -> list[list[Record]]:
    if not results:
        raise UserError("no results to report: run 'gacd evaluate' first")
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in results:
        missing = {"model", "method", "dataset", "seed", "n"} - record.keys()
        if missing:
            raise UserError(f"results: a record lacks '{min(missing)}': {dict(record)}")
        key = tuple(record.get(part) for part in ("dataset", "role", "model", "method"))
        group = groups.setdefault((*key, record.get("parameters")), [])
        if any(record["seed"] == other["seed"] for other in group):
            raise UserError(
                f"results: two records of {record['model']} by {record['method']} with seed "
                f"{record['seed']}: keep one, or name the models differently"
            )
        group.append(record)
    return list(groups.values())


def _method(record: Record) -> Cell:
    role = record.get("role")
    return Cell(str(record["method"]), f"({role})" if role else "")


def _accuracy(group: Sequence[Record], key: str) -> Cell:
    values = [float(record[key]) for record in group if record.get(key) is not None]
    if not values:
        return Cell(_MISSING)
    text = f"{fmean(values):.1f}"
    if len(group) == 1:
        interval = (group[0].get("intervals") or {}).get(key)
        return Cell(text, f"[{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")
    spread = f"± {stdev(values):.1f}" if len(values) > 1 else ""
    part = f" ({len(values)} of {len(group)} seeds)" if len(values) < len(group) else ""
    return Cell(text, (spread + part).strip())


def _sizes(record: Record) -> tuple[int, int]:
    """How many images the figures stand on: all attacks but AutoAttack, AutoAttack."""
    n = int(record["n"])
    return n, int(record.get("autoattack_n") or n)


def _size_text(group: Sequence[Record]) -> str:
    return "; ".join(
        f"{n:,}" if n == part else f"{n:,} (AutoAttack {part:,})"
        for n, part in sorted({_sizes(record) for record in group})
    )


def _notes(
    groups: Sequence[Sequence[Record]], sizes: Sequence[tuple[int, int]], worst: bool
) -> Iterable[str]:
    if len(sizes) == 1:
        n, part = sizes[0]
        subset = f", AutoAttack on {part:,} of them" if part != n else ""
        yield f"n = {n:,} test images{subset}."
    if any(record.get("cascade") for group in groups for record in group):
        yield (
            "Cascade: an image once broken is not attacked again, so each figure is the worst case "
            "of its attack and of those before it."
        )
    for record in (record for group in groups for record in group):
        if alike := record.get("answered_alike"):
            yield (
                f"{_method(record)}: one and the same answer to {alike:g} % of the test images; "
                "where that happens to be right, no attack can change it."
            )
    if worst:
        yield "worst: right under every attack, on the images that met them all."
    if any(record.get("intervals") for group in groups if len(group) == 1 for record in group):
        yield "[low, high]: 95 % binomial interval over the test images, one seed."
    seeds = sorted({len(group) for group in groups if len(group) > 1})
    if seeds:
        yield (
            f"±: standard deviation over the {' or '.join(map(str, seeds))} seeds of a row, "
            "the figure before it their mean."
        )


def _count(value: int | None) -> str:
    return _MISSING if value is None else f"{value:,}"


def _seconds(group: Sequence[Record]) -> str:
    values = [float(record["seconds"]) for record in group if record.get("seconds") is not None]
    return f"{fmean(values):,.0f} s" if values else _MISSING


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _numeric(column: Column) -> str:
    return ' class="number"' if column.numeric else ""


def _html(cell: Cell) -> str:
    aside = f' <span class="aside">{escape(cell.aside)}</span>' if cell.aside else ""
    return escape(cell.text) + aside

"""The report: one HTML file that carries its figures and its style and fetches nothing."""

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

from gacd.report.canvas import Figure
from gacd.report.style import CSS
from gacd.report.tables import Table
from gacd.storage import write_bytes


class Check(NamedTuple):
    """One line of a check list; `passed` None says that nothing was decided.

    `link` is the heading of the section that its name leads to.
    """

    name: str
    passed: bool | None
    text: str = ""
    link: str = ""


@dataclass(frozen=True)
class Checks:
    """Lines that say in words whether each passed: a diagnosis, or claims held and not held."""

    lines: Sequence[Check]
    words: tuple[str, str, str] = ("pass", "fail", "not decided")

    def html(self) -> str:
        """A list whose lines begin with their verdict."""
        return '<ul class="checks">\n' + "".join(map(self._line, self.lines)) + "</ul>\n"

    def markdown(self) -> str:
        """A list, each line with its verdict in bold."""
        return "".join(
            f"- **{self._word(line)}**: "
            + (f"[{line.name}](#{slug(line.link)})" if line.link else line.name)
            + (f". {line.text}" if line.text else "")
            + "\n"
            for line in self.lines
        )

    def _word(self, line: Check) -> str:
        return self.words[(True, False, None).index(line.passed)]

    def _line(self, line: Check) -> str:
        verdicts = {True: ("good", "✓"), False: ("bad", "✗"), None: ("open", "?")}
        kind, sign = verdicts[line.passed]
        name = escape(line.name)
        if line.link:
            name = f'<a href="#{slug(line.link)}">{name}</a>'
        text = f'<span class="text">{escape(line.text)}</span>' if line.text else ""
        return (
            f'<li class="{kind}"><strong class="verdict"><span aria-hidden="true">{sign}</span> '
            f'{escape(self._word(line))}</strong><span class="name">{name}</span>{text}</li>\n'
        )


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs of plain text, then tables, figures and check lists in their order."""

    heading: str
    paragraphs: Sequence[str] = ()
    content: Sequence[Table | Figure | Checks] = ()


def write_report(
    path: Path,
    *,
    title: str,
    intro: Sequence[str],
    sections: Sequence[Section],
    provenance: Mapping[str, object] | None = None,
) -> None:
    """Write the page, and its figures that have a name beside it. All text is plain and escaped.

    `provenance` is what the record says of its making (commit, versions, hardware, date);
    mappings inside it are written out.

    Raises:
        UserError: a file cannot be written.
    """
    for item in (item for section in sections for item in section.content):
        if isinstance(item, Figure) and item.name:
            write_bytes(path.parent / item.file, item.image)
    ids = _ids([section.heading for section in sections])
    links = "".join(
        f'<li><a href="#{name}">{escape(section.heading)}</a></li>'
        for name, section in zip(ids, sections, strict=True)
    )
    nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n' if len(sections) > 2 else ""
    body = "".join(map(_section, ids, sections))
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{_paragraphs(intro, "lead")}{nav}</header>
<main>
{body}</main>
{_footer(provenance or {})}</body>
</html>
"""
    write_bytes(path, page.encode())


# The browser itself refuses anything that is not in the file.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Below this width the figures' second drawing is shown; style.py has the same number.
_PHONE = "(max-width: 640px)"


def _section(name: str, section: Section) -> str:
    content = "".join(map(_content, section.content))
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(section.heading)}</h2>\n'
        f"{_paragraphs(section.paragraphs)}{content}</section>\n"
    )


def _content(item: Table | Figure | Checks) -> str:
    return _figure(item) if isinstance(item, Figure) else item.html()


def _figure(figure: Figure) -> str:
    wide, narrow = (
        f"data:{figure.media_type};base64,{base64.b64encode(image).decode('ascii')}"
        for image in (figure.image, figure.narrow)
    )
    return (
        f'<figure>\n<div class="card"><picture><source media="{_PHONE}" srcset="{narrow}">'
        f'<img src="{wide}" alt="{escape(figure.alt)}" style="max-width: {figure.width}px">'
        f"</picture></div>\n<figcaption>{escape(figure.caption)}</figcaption>\n</figure>\n"
    )


def _footer(provenance: Mapping[str, object]) -> str:
    if not provenance:
        return ""
    pairs = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n"
        for name, value in written_out(provenance)
    )
    return f"<footer>\n<h2>How this was made</h2>\n<dl>\n{pairs}</dl>\n</footer>\n"


def written_out(values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Facts and what they say in one line each."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield name, ", ".join(f"{key} {text}" for key, text in value.items())
        elif isinstance(value, list | tuple):
            yield name, ", ".join(map(str, value))
        else:
            yield name, str(value)


def _paragraphs(texts: Iterable[str], kind: str = "") -> str:
    opening = f'<p class="{kind}">' if kind else "<p>"
    return "".join(f"{opening}{escape(text)}</p>\n" for text in texts)


def slug(heading: str) -> str:
    """The fragment name of a heading."""
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section"


def _ids(headings: Iterable[str]) -> list[str]:
    """A fragment name for each heading, no two the same."""
    names: list[str] = []
    for heading in headings:
        first = slug(heading)
        name, count = first, 2
        while name in names:
            name, count = f"{first}-{count}", count + 1
        names.append(name)
    return names

"""The page, parsed: it stands alone, it is accessible, it says what the records say."""

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gacd.errors import UserError
from gacd.report.page import Check, Checks, Section, write_report

VOID = {"meta", "link", "img", "source", "br"}


class Page(HTMLParser):
    """Every tag with its attributes, the text, and whether all tags close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data

    def all(self, *names: str) -> list[dict]:
        return [attrs for tag, attrs in self.tags if tag in names]


@pytest.fixture(scope="module")
def parsed(page: Path) -> Page:
    return Page(page.read_text(encoding="utf-8"))


def test_all_tags_close_and_there_is_no_script(parsed):
    assert parsed.open == []
    assert parsed.all("script") == []


def test_every_picture_has_words(parsed):
    images = parsed.all("img")
    assert len(images) == len(parsed.all("figcaption")) == 3
    assert all(len(image["alt"]) > 20 for image in images)


def test_ids_are_unique_and_every_link_and_label_finds_one(parsed):
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) == 5
    assert [link["href"] for link in parsed.all("a")] == [f"#{name}" for name in ids]
    assert [section["aria-labelledby"] for section in parsed.all("section")] == ids


def test_nothing_is_fetched(parsed):
    used = [attrs[key] for _, attrs in parsed.tags for key in ("src", "srcset") if key in attrs]
    assert len(used) == 6
    for source in used:
        head, data = source.split(",", 1)
        assert head in ("data:image/svg+xml;base64", "data:image/png;base64")
        assert base64.b64decode(data, validate=True)
    assert [link["href"] for link in parsed.all("link")] == ["data:,"]


def test_the_numbers_are_the_records(parsed, results):
    for r in results:
        for key in ("natural", "pgd20", "autoattack"):
            assert f"{r[key]:.1f} [" in parsed.text
    assert "n = 360 test images, AutoAttack on 200 of them." in parsed.text


def test_verdicts_are_words(parsed):
    for line in ("✓ passMore steps", "✗ failA large budget", "? not decidedTransfer"):
        assert line in parsed.text
    claims = Checks([Check("C1", False), Check("C2", True)], words=("held", "not held", "open"))
    assert "✗ not heldC1" in Page(claims.html()).text
    assert "✓ heldC2" in Page(claims.html()).text


def test_the_footer_says_how_it_was_made(parsed):
    assert "How this was made" in parsed.text
    assert "0123456789abcdef" * 4 in parsed.text
    assert "gacd 0.1.0, torch 2.15.0" in parsed.text


def test_text_is_escaped(parsed, page):
    assert "Robust <students> & teachers" in parsed.text
    assert "<students>" not in page.read_text(encoding="utf-8")


def test_headings_without_letters_still_get_an_id(tmp_path):
    sections = [Section("ε"), Section("ε"), Section("a"), Section("a 2"), Section("a")]
    path = tmp_path / "report.html"
    write_report(path, title="t", intro=(), sections=sections)
    ids = [attrs["id"] for _, attrs in Page(path.read_text()).tags if "id" in attrs]
    assert ids == ["section", "section-2", "a", "a-2", "a-3"]


def test_a_page_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "file" / "report.html", title="t", intro=(), sections=[])

"""Pages of tables and interval plots, written as Markdown and as one HTML file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sarm.contracts.manifest import write_atomically
from sarm.report.render import cell, html, markdown, picture, shown, table

# Characters of a value that a page shows, of which the last ones count, and of its own sentences, which begin with what matters.
_LIMIT, _PROSE = 400, 4000


@dataclass(frozen=True, kw_only=True)
class Dots:
    """Values with 95 % intervals on one scale, and a line (chance, or no difference) to read them against."""

    rows: Sequence[Mapping[str, Any]]
    """`{name, value, ci95, label}`, `line` where the row has one, and `own` where it is the row that the others stand beside."""
    low: float
    high: float
    zero: float | None = None
    """Where one line goes through all rows."""

    def placed(self) -> list[dict[str, Any]]:
        """The rows with positions in per cent of the width; a row without an interval is a point."""
        placed = []
        for row in self.rows:
            start, end = (self._place(end) for end in row.get("ci95") or (row["value"], row["value"]))
            line = row.get("line", self.zero)
            places = {"at": self._place(row["value"]), "start": start, "width": end - start}
            placed.append({"own": False, **row, **places, "line": None if line is None else self._place(line)})
        return placed

    def _place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with a sentence, a plot and a table; what is empty is left out."""

    title: str
    text: str = ""
    dots: Dots | None = None
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report for people."""

    title: str
    facts: Mapping[str, Any]
    notes: Sequence[str]
    sections: Sequence[Section]
    pictures: Mapping[str, str] = field(default_factory=dict)
    """Caption -> SVG text."""


def write_page(page: Page, folder: Path) -> tuple[Path, Path]:
    """Write report.md and report.html into an existing folder."""
    markdown, html = folder / "report.md", folder / "report.html"
    write_atomically(markdown, to_markdown(page))
    write_atomically(html, to_html(page))
    return markdown, html


def to_html(page: Page) -> str:
    """One self-contained page."""
    cut = _cut(page)
    pictures = [picture(caption, svg) for caption, svg in cut.pictures.items()]
    return html("page", title=cut.title, facts=cut.facts, notes=cut.notes, sections=cut.sections, pictures=pictures)


def to_markdown(page: Page) -> str:
    """The same without the plots."""
    cut = _cut(page)
    parts: list[str] = []
    for section in cut.sections:
        parts += [f"## {cell(section.title)}", cell(section.text)]
        if section.rows:
            parts.append(table(section.columns, ([cell(value) for value in row] for row in section.rows)))
    return markdown(cut.title, cut.facts, cut.notes, parts)


def _cut(page: Page) -> Page:
    """The page as texts of bounded length."""

    def text(value: Any) -> str:
        return shown(value, _LIMIT)

    def prose(value: str) -> str:
        return shown(value)[:_PROSE]

    sections = [
        replace(
            section,
            title=text(section.title),
            text=prose(section.text),
            rows=[[text(value) for value in row] for row in section.rows],
        )
        for section in page.sections
    ]
    facts = {text(name): text(value) for name, value in page.facts.items()}
    return replace(
        page, title=text(page.title), facts=facts, notes=[prose(note) for note in page.notes], sections=sections
    )

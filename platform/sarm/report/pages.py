"""Pages of tables and interval plots, written as Markdown and as one HTML file without scripts that asks the network for nothing.

Names come from data, so they are escaped by the template engine and by `escape_markdown`.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sarm.contracts.manifest import write_atomically
from sarm.data.sources.shown_text import clean_text, escape_markdown
from sarm.report.report import escaping_templates, number


@dataclass(frozen=True, kw_only=True)
class Dots:
    """Values with 95 % intervals on one scale, and a line (chance, or no difference) to read them against."""

    rows: Sequence[Mapping[str, Any]]
    """`{name, value, ci95}`, and `line` where the row has one."""
    low: float
    high: float
    zero: float | None = None
    """Where one line goes through all rows."""

    def placed(self) -> list[dict[str, Any]]:
        """The rows with positions in per cent of the width."""
        return [
            {
                **row,
                "at": self._place(row["value"]),
                "start": self._place(row["ci95"][0]),
                "width": self._place(row["ci95"][1]) - self._place(row["ci95"][0]),
                "line": None if (line := row.get("line", self.zero)) is None else self._place(line),
            }
            for row in self.rows
        ]

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
    environment = escaping_templates(Path(__file__).parent)
    environment.filters.update(shown=_shown)
    pictures = {
        caption: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        for caption, svg in page.pictures.items()
    }
    return environment.get_template("page.html.j2").render(page=page, pictures=pictures)


def to_markdown(page: Page) -> str:
    """The same without the plots."""
    facts = " · ".join(f"{_cell(name)} {_cell(value)}" for name, value in page.facts.items())
    parts = [f"# {_cell(page.title)}", facts, *(f"> {_cell(note)}" for note in page.notes)]
    for section in page.sections:
        parts += [f"## {_cell(section.title)}", _cell(section.text)]
        if section.rows:
            lines = [
                section.columns,
                ["---"] * len(section.columns),
                *([_cell(v) for v in row] for row in section.rows),
            ]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def share(value: float | None) -> str:
    """A share or score as a percentage with one decimal."""
    return "n/a" if value is None else f"{100 * value:.1f} %".replace("-", "−")


def span(ends: Sequence[float]) -> str:
    """A 95 % interval of shares."""
    return f"{share(ends[0])} to {share(ends[1])}"


def _shown(value: Any) -> str:
    return clean_text(number(value), 400)


def _cell(value: Any) -> str:
    return escape_markdown(_shown(value))

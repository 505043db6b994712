"""The renderer of all pages, as HTML and as Markdown; the one place where texts are cleaned and escaped for them.

Texts and names come from data, so they are hostile until shown otherwise. Whatever a template shows passes `_finalize`, which takes
out control characters and direction overrides, and then autoescape; whatever Markdown shows passes `cell`. A page is one file that
asks the network for nothing, as artifact viewers show it inside a sandbox; its policy lets no script run but the one given here.
"""

import base64
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sarm.data.sources.shown_text import clean_text, escape_markdown
from sarm.report.numbers import number, seconds, share, signed, span

TEMPLATES = Path(__file__).parent / "templates"
# What TeX would act on, and what keeps the braces of a field even.
_TEX = {
    **{character: f"\\{character}" for character in "#$%&_"},
    **{"\\": r"\textbackslash{}", "{": r"\textbraceleft{}", "}": r"\textbraceright{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
}
HARM_NOTICE = "may contain harmful text"


def html(
    template: str,
    *,
    title: str,
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
    script: str = "",
    asks_server: bool = False,
    **values: Any,
) -> str:
    """One self-contained page of a template that extends `base`; `script`, a constant of this program, is the only one that may run.

    `asks_server` lets it ask the server that the page came from, and no other.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(f"{template}.html.j2")
        .render(
            title=title,
            facts=facts,
            notes=notes,
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            asks_server=asks_server,
            harm_notice=HARM_NOTICE,
            **values,
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        # By default Jinja2 escapes nothing.
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, share=share, span=span, signed=signed, seconds=seconds)
    return environment


def _finalize(value: Any) -> Any:
    # What a macro made has been through here.
    return clean_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def shown(value: Any, limit: int | None = None) -> str:
    """A value as text for people, of which at most `limit` characters from the end."""
    return clean_text(number(value), limit)


def cell(value: Any) -> str:
    """A value as one line of text with nothing left that Markdown or HTML would act on."""
    return escape_markdown(shown(value))


def markdown(title: str, facts: Mapping[str, Any], notes: Sequence[str], parts: Iterable[str]) -> str:
    """A page for viewers that render Markdown, and for pull requests; empty parts are left out."""
    line = " · ".join(f"{cell(name)} {cell(value)}" for name, value in facts.items())
    head = [f"# {cell(title)}", line, *(f"> {cell(note)}" for note in notes)]
    return "\n\n".join(part for part in (*head, *parts) if part) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bibtex(kind: str, key: str, fields: Mapping[str, str]) -> str:
    """A BibTeX entry whose values are text and no commands; `key` holds letters, digits and hyphens alone, empty fields are left out."""
    lines = [f"  {name} = {{{_tex(value)}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])


def _tex(value: str) -> str:
    return "".join(_TEX.get(character, character) for character in " ".join(clean_text(value).split()))


def picture(caption: str, svg: str) -> dict[str, Any]:
    """An SVG as the source of an <img>: there it can run no script, and its ids do not meet those of other figures."""
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    return {
        "caption": caption,
        "anchor": "figure-" + re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-"),
        "source": "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(),
        "wide": size is not None and float(size[1]) > 2.5 * float(size[2]),
    }

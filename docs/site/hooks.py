"""The pages of the site that are not Markdown files of docs/: those of the tree's other folders, and the tutorials, which are notebooks.

Links are written as they hold in the repository. Here those that leave docs/ are turned to where the site has the page, and to plain text
where it has none.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
BORROWED = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "cluster/README.md": "cluster.md",
}
"""Where the site has pages that lie outside docs/."""
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s#]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the borrowed pages and the notebooks."""
    for source, page in BORROWED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for notebook in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        text, _ = MarkdownExporter().from_filename(str(notebook))
        files.append(File.generated(config, f"tutorials/{notebook.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page that leave docs/."""
    site = page.file.src_uri
    source = next((name for name, place in BORROWED.items() if place == site), f"docs/{site}")
    return turned(markdown, source, site)


def turned(markdown: str, source: str, site: str) -> str:
    """The text of the page `source` of the repository, with its links as they hold at `site`; links to what the site lacks become text."""

    def turn(match: re.Match[str]) -> str:
        image, text, target, anchor = match.group(1), match.group(2), match.group(3), match.group(4) or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return match.group(0)
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if place in BORROWED:
            place = BORROWED[place]
        elif place.startswith("docs/"):
            place = place.removeprefix("docs/")
        else:
            return text
        place = re.sub(r"\.ipynb$", ".md", place)
        return f"{image}[{text}]({posixpath.relpath(place, posixpath.dirname(site) or '.')}{anchor})"

    # What stands in code is no link.
    parts = re.split(r"(^```.*?^```\s*$|`[^`\n]+`)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if place % 2 else _LINK.sub(turn, part) for place, part in enumerate(parts))

"""The pages of the site: which they are, where their links lead, and what they quote. The build itself: `make test-site`."""

import ast
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

import sarm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = os.environ.get("SARM_SITE", "")
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
# Pages of the site that lie elsewhere in the tree: `BORROWED` of docs/site/hooks.py, which imports what is not locked.
_TREE = ast.parse((DOCS / "site" / "hooks.py").read_text())
BORROWED: dict[str, str] = next(
    ast.literal_eval(node.value)
    for node in _TREE.body
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "BORROWED"
)


class _Config(yaml.SafeLoader):
    """Of mkdocs' file, whose tags for functions mean nothing here."""


_Config.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def _navigation() -> list[str]:
    def pages(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict | list):
            for one in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(one)

    return list(pages(yaml.load((ROOT / "mkdocs.yml").read_text(), _Config)["nav"]))


def test_every_page_is_in_the_navigation_once_and_nothing_else() -> None:
    there = {path.name for path in DOCS.glob("*.md")} | {f"tutorials/{path.stem}.md" for path in NOTEBOOKS}
    named = _navigation()
    assert sorted(named) == sorted(there | set(BORROWED.values()))
    assert all((ROOT / source).exists() for source in BORROWED)


def test_the_reference_has_every_public_name_and_every_integration() -> None:
    shown = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    assert {f"{home}.{name}" for name, home in sarm._HOMES.items()} - set(shown) == set()
    frameworks = {path.stem for path in (ROOT / "platform" / "sarm" / "integrations").glob("*.py")}
    frameworks -= {"__init__", "source", "vllm", "vllm_explanations", "vllm_models", "vllm_pooling"}
    assert {name for name in frameworks if not any(f"integrations.{name}" in one for one in shown)} == set()
    assert [one for one in shown if not _is_there(one)] == []


def _is_there(name: str) -> bool:
    """A module, or something that one defines at its top."""
    path = ROOT / "platform" / name.replace(".", "/")
    if path.with_suffix(".py").exists():
        return True
    defined = ast.parse(path.parent.with_suffix(".py").read_text()).body
    return any(getattr(node, "name", "") == path.name for node in defined)


@cache
def _texts_of_the_code() -> tuple[str, ...]:
    """Every text of the package, with an ellipsis where a value is put in."""
    texts: list[str] = []
    for path in (ROOT / "platform").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return tuple(texts)


QUOTED = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
OF_OTHERS = {
    "Actor with class name: … has constructor arguments in the object store and max_restarts > 0": "Ray writes it",
}


@pytest.mark.parametrize("message", [one for one in QUOTED if one not in OF_OTHERS])
def test_a_message_that_troubleshooting_quotes_is_one_of_the_code(message: str) -> None:
    # Values that stand beside each other in the code are one ellipsis on the page.
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    assert any(re.search(pattern, text, re.DOTALL) for text in _texts_of_the_code()), message


def test_troubleshooting_quotes_what_is_said_and_not_what_any_text_has() -> None:
    assert len(QUOTED) >= 30
    assert set(OF_OTHERS) <= set(QUOTED)
    assert [one for one in QUOTED if max(map(len, one.split("…"))) < 12] == []


@pytest.mark.parametrize("page", sorted(DOCS.glob("images/concept-*.svg")), ids=lambda path: path.stem)
def test_pictures_of_concepts_are_for_light_and_dark_and_say_what_they_show(page: Path) -> None:
    text = page.read_text()
    assert "prefers-color-scheme:dark" in text
    assert re.search(r"<title>[^<]{30,}</title>", text)
    assert not re.search(r"(?:href|src|url)\s*[=(]\s*[\"']?https?:", text)


def test_links_of_notebooks_lead_somewhere() -> None:
    for notebook in NOTEBOOKS:
        for cell in json.loads(notebook.read_text())["cells"]:
            for target in re.findall(r"\]\(([^)\s#]+)", "".join(cell["source"])):
                assert "://" in target or (notebook.parent / target).exists(), f"{notebook.name}: {target}"


@pytest.mark.skipif(not SITE, reason="make test-site builds the site and sets SARM_SITE")
def test_the_built_site_asks_for_nothing_from_elsewhere() -> None:
    pages = sorted(Path(SITE).rglob("*.html"))
    assert len(pages) >= len(_navigation())
    wanted = r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=\"(?:https?:)?//|<link\b[^>]*rel=\"(?:stylesheet|preload|preconnect|icon|dns-prefetch)\"[^>]*href=\"(?:https?:)?//|<link\b[^>]*href=\"(?:https?:)?//[^>]*rel=\"(?:stylesheet|preload|preconnect|icon)\""
    assert {page.name: found.group(0) for page in pages if (found := re.search(wanted, page.read_text()))} == {}
    styles = sorted(Path(SITE).rglob("*.css"))
    assert [path.name for path in styles if re.search(r"url\(\s*[\"']?(?:https?:)?//|@import", path.read_text())] == []


def _hosts(page: Path, work: Path) -> set[str]:
    """Whom a browser asks when it shows a page; the browser's own requests are among them."""
    log = work / f"{page.stem}.json"
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--log-net-log={log}", f"--user-data-dir={work / page.stem}",
        "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=3000", "--dump-dom", page.absolute().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert "<h1" in done.stdout
    return set(re.findall(r'"url":"https?://([^/"]+)', log.read_text()))


@pytest.mark.skipif(not (SITE and shutil.which("chromium")), reason="needs make test-site and chromium")
def test_pages_in_a_browser_ask_the_network_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.html").write_text("<h1>Nothing.</h1>")
    (tmp_path / "asking.html").write_text('<h1>Something.</h1><img src="http://elsewhere.invalid/x.png">')
    own = _hosts(tmp_path / "empty.html", tmp_path)
    assert "elsewhere.invalid" in _hosts(tmp_path / "asking.html", tmp_path) - own
    for page in ("index.html", "start-here.html", "reference.html", "concepts.html"):
        assert _hosts(Path(SITE) / page, tmp_path) - own == set(), page

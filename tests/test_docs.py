"""What the documentation names is there."""

import re
from pathlib import Path

import pytest

import sarm

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLATFORM = ROOT / "platform"
# What the paths of scripts are given from.
ROOTS = [ROOT, ROOT / "tests", PLATFORM, PLATFORM / "sarm"]

on_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@on_every_page
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)\s#]*)#?([^)\s]*)\)", page.read_text()):
        if "://" in target:
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, f"{target}#{anchor}"


@on_every_page
def test_scripts_and_modules_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text()
    scripts = set(re.findall(r"(?:`|python |pytest )([a-z_]+/[a-z_/]+\.py)\b", text))
    assert {name for name in scripts if not any((root / name).exists() for root in ROOTS)} == set()
    modules = set(re.findall(r"`(sarm(?:\.[a-z_]+)+)`", text))
    assert {name for name in modules if not _is_module(name)} == set()


def _is_module(name: str) -> bool:
    """A module, a package, or something in one."""
    path = PLATFORM / name.replace(".", "/")
    return (
        path.is_dir()
        or path.with_suffix(".py").exists()
        or path.parent.with_suffix(".py").exists()
        or name.removeprefix("sarm.") in sarm.__all__
    )


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

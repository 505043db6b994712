"""`docs/compatibility.md` lists what is read and run; its tables are written by the tests that try each row.

A test ends with `assert_listed("backbones", header, rows)`. With `SARM_WRITE_DOCS=1` the table is written instead of compared.
"""

import os
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"


def assert_listed(section: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """The table between the page's comments `<!-- section -->` and `<!-- /section -->` has these rows and no others."""
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
    opening, closing = f"<!-- {section} -->\n", f"\n<!-- /{section} -->"
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(opening)
    listed, closed, after = rest.partition(closing)
    assert closed, f"{PAGE.name} has no section {section}"
    if os.environ.get("SARM_WRITE_DOCS") == "1":
        PAGE.write_text(before + opening + table + closing + after, encoding="utf-8")
    else:
        assert listed == table, f"The table {section} differs: SARM_WRITE_DOCS=1 writes it."

"""How long a browser takes to open feature pages of 1,000 features, and whether anything of 40 hostile strings runs or leaves the page.

make bench BENCH=pages      (needs node, playwright-core on NODE_PATH and chromium)
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.report import browser  # noqa: E402
from tests.report.hostile import STRINGS, store  # noqa: E402

from sarm.interpret.feature_data import features  # noqa: E402
from sarm.report.feature_pages import write_feature_pages  # noqa: E402
from sarm.settings.contexts import PagesSettings  # noqa: E402

OUT = Path("outputs/bench/pages.json")
NUM_FEATURES = 1000
PROSE = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 8


def main() -> None:
    if why := browser.missing():
        sys.exit(f"pages: {why}")
    texts = [f"{string} {PROSE}" for string in STRINGS]
    found = features(
        store(NUM_FEATURES, texts, 40), np.eye(NUM_FEATURES), np.linspace(-1, 1, NUM_FEATURES), PagesSettings()
    )
    with tempfile.TemporaryDirectory() as folder:
        files = write_feature_pages(found, STRINGS[0], {"model": STRINGS[1]}, [STRINGS[2]], Path(folder))[:-1]
        opened = browser.open_pages(files)
        sizes = [path.stat().st_size for path in files]
    index, *pages = opened
    figures = {
        "features": index["rows"],
        "index_milliseconds": index["milliseconds"],
        "index_bytes": sizes[0],
        "slowest_page_milliseconds": max(page["milliseconds"] for page in pages),
        "largest_page_bytes": max(sizes[1:]),
        "strings": len(STRINGS),
        "ran": sum(page["hit"] is not None or bool(page["dialogs"]) for page in opened),
        "requests": sum(len(page["outside"]) for page in opened),
    }
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):28s}{value:12,}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

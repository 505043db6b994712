"""Headless Chromium through playwright-core, where both are there."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).parent / "open_pages.js"


def missing() -> str:
    """Why no browser can be started here; empty if one can."""
    if not (chromium() and shutil.which("node")):
        return "needs node and chromium"
    tried = subprocess.run(["node", "-e", "require('playwright-core')"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "needs playwright-core: npm install playwright-core, and NODE_PATH"


def chromium() -> str | None:
    """The browser: what `CHROMIUM` names, else the first on the path."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def open_pages(files: Sequence[Path]) -> list[dict[str, Any]]:
    """What each page did: milliseconds until it was drawn, requests that left it, dialogs, and what its script can do."""
    command = ["node", str(_SCRIPT), str(chromium()), *(str(path.absolute()) for path in files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]

"""Progress lines, and pages for who sits before the terminal."""

import os
import sys
import time
import webbrowser


def say(message: str) -> None:
    """One progress line with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def open_page(address: str) -> None:
    """Open a page in a browser, where somebody can see it; on a machine without a display nothing is opened, not even a browser of the terminal."""
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(address)

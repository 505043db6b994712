"""Progress lines."""

import time


def say(message: str) -> None:
    """One progress line with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)

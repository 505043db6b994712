"""How far the actors of a pass are."""

import time
from typing import NamedTuple

_PRINT_EVERY_SECONDS = 5.0


class Source(NamedTuple):
    """What all actors of one pass have to read, for their progress lines."""

    name: str
    num_rows: int


class Progress:
    """Prints how far an actor is, every few seconds."""

    def __init__(self, source: Source):
        self._source, self._rows, self._tokens = source, 0, 0
        self._started = self._printed = time.monotonic()

    def add(self, rows: int, tokens: int) -> None:
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens
        now = time.monotonic()
        if now - self._printed >= _PRINT_EVERY_SECONDS or self._rows >= self._source.num_rows:
            self._printed = now
            elapsed = now - self._started
            left = elapsed * max(0.0, self._source.num_rows / max(1, self._rows) - 1)
            rate = self._tokens / max(elapsed, 1e-9)
            print(
                f"{self._source.name} {self._rows:,} of {self._source.num_rows:,} rows  {rate:,.0f} tokens/s  {left:.0f} s left",
                flush=True,
            )

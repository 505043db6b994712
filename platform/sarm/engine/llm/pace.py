"""How many requests a server is sent at once: additive increase, multiplicative decrease (Chiu and Jain 1989), and closed times."""

import asyncio
import contextlib
import time
from types import TracebackType


class Pace:
    """A gate for requests; `async with pace` holds a place. The limit rises by one a round of successes and halves at a 429."""

    def __init__(self, most: int):
        self.most, self.limit = most, float(most)
        self.running = 0
        self.num_throttled = 0
        self._closed_until = 0.0
        self._halved_at = -1.0
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> "Pace":
        async with self._changed:
            while True:
                if (delay := self._closed_until - time.monotonic()) > 0:
                    # Not a plain sleep: the condition's lock must be free meanwhile.
                    await _wait(self._changed, delay)
                elif self.running >= max(1, int(self.limit)):
                    await self._changed.wait()
                else:
                    self.running += 1
                    return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        async with self._changed:
            self.running -= 1
            self._changed.notify_all()

    def throttled(self, sent: float, wait: float) -> None:
        """A request sent at `sent` (monotonic) met a 429: nothing is sent for `wait` seconds, then at most half as much at once.

        Requests that were on their way when the limit was halved say nothing new about it.
        """
        self.num_throttled += 1
        self._closed_until = max(self._closed_until, time.monotonic() + wait)
        if sent > self._halved_at:
            self.limit, self._halved_at = max(1.0, self.limit / 2), time.monotonic()

    def succeeded(self) -> None:
        """A request was answered."""
        self.limit = min(float(self.most), self.limit + 1 / self.limit)


async def _wait(condition: asyncio.Condition, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(condition.wait(), seconds)

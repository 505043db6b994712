"""The most memory that a stage takes: this process and all that it started."""

import contextlib
import threading
from collections.abc import Iterator

import psutil


class PeakMemory:
    """Largest resident memory seen of this process and its descendants, a local Ray cluster included; in bytes."""

    peak = 0

    def sample(self) -> None:
        total = 0
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                memory = process.memory_info()
                # Every process maps Ray's object store: shared pages would be counted many times.
                total += memory.rss - getattr(memory, "shared", 0)
        self.peak = max(self.peak, total)


@contextlib.contextmanager
def peak_memory(interval: float = 1.0) -> Iterator[PeakMemory]:
    """Sample memory in the background while the body runs."""
    memory, stop = PeakMemory(), threading.Event()

    def watch() -> None:
        while not stop.wait(interval):
            memory.sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        stop.set()
        thread.join()
        memory.sample()

"""A sign of life from a process that loads: nodes that have just booted read gigabytes of weights before their first block."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from sarm.contracts.manifest import write_atomically

LOADING = "loading-"
_BEAT_SECONDS = 5.0
# What Ray's own threads and this one do in the meantime stays below these.
_LEAST_CPU_SHARE, _LEAST_BYTES = 0.02, 1 << 20


class _Done(NamedTuple):
    """What a process has done since it began."""

    cpu_seconds: float
    memory: int
    moved_bytes: int
    """Read and written."""

    def is_beyond(self, before: "_Done", seconds: float) -> bool:
        """Whether the process got anywhere in so many seconds."""
        moved = max(abs(self.memory - before.memory), self.moved_bytes - before.moved_bytes)
        return self.cpu_seconds - before.cpu_seconds > _LEAST_CPU_SHARE * seconds or moved > _LEAST_BYTES


@contextlib.contextmanager
def loading(folder: Path) -> Iterator[None]:
    """While the body runs, a file in `folder` changes every few seconds in which this process computes, reads or takes memory.

    A load that hangs does none of these, so its file stands still.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{LOADING}{socket.gethostname()}-{os.getpid()}.json"
    stop = threading.Event()

    def watch() -> None:
        before, since, beats = _done(), time.monotonic(), 0
        write_atomically(path, str(beats), sync=False)
        while not stop.wait(_BEAT_SECONDS):
            now = _done()
            if now.is_beyond(before, time.monotonic() - since):
                before, since, beats = now, time.monotonic(), beats + 1
                write_atomically(path, str(beats), sync=False)

    thread = threading.Thread(target=watch, name="loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink(missing_ok=True)


def _done() -> _Done:
    process = psutil.Process()
    times = process.cpu_times()
    moved = None
    # Not every system counts them, or tells.
    with contextlib.suppress(AttributeError, psutil.Error):
        moved = process.io_counters()
    return _Done(
        cpu_seconds=times.user + times.system,
        memory=process.memory_info().rss,
        moved_bytes=getattr(moved, "read_chars", 0) + getattr(moved, "write_chars", 0),
    )

"""What an actor uses of its machine: time of forward passes, cores, memory."""

import contextlib
import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30


class ForwardClock:
    """Seconds of forward passes: on a GPU between two events of its stream, for which the host does not wait."""

    def __init__(self, device: torch.device):
        self._is_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around one forward pass; one that raises does not count."""
        began = self._now()
        yield
        self._spans.append((began, self._now()))

    def seconds(self) -> float:
        """Of the passes since this was asked last. On a GPU they must have ended."""
        spans, self._spans = self._spans, []
        if self._is_gpu:
            return float(sum(began.elapsed_time(ended) for began, ended in spans) / 1000)
        return float(sum(ended - began for began, ended in spans))

    def _now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Usage:
    """Cores and memory of this process."""

    def __init__(self) -> None:
        self._cpu_seconds = _cpu_seconds()

    def taken(self) -> dict[str, float]:
        """`cpu_seconds` since this was asked last, and the largest `rss` and `gpu_memory` so far, in bytes."""
        before, self._cpu_seconds = self._cpu_seconds, _cpu_seconds()
        return {
            "cpu_seconds": self._cpu_seconds - before,
            "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            "gpu_memory": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
        }


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next layer: it would hand temporaries of megabytes back to the system and fault them in again.

    Does nothing under another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)


def _cpu_seconds() -> float:
    times = psutil.Process().cpu_times()
    seconds: float = times.user + times.system
    return seconds


def device_of_worker() -> torch.device:
    """The GPU that Ray gave this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

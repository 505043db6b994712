"""Metrics as TensorBoard's event files, beside MLflow (`--tensorboard`).

Each process that logs writes a file of its own, and TensorBoard reads the files of a folder as one run. So no server is needed, and
workers need not know of each other.
"""

import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SECONDS_BETWEEN_WRITES = 5
_writers: dict[tuple[Path, bool], Any] = {}
_lock = threading.Lock()


def log(folder: Path, metrics: Mapping[str, float], step: int, *, goes_on: bool) -> None:
    """Add numbers at a step to the files of a folder; they are written every few seconds, and by `close_all`.

    With `goes_on` they are of a training that may have been started again: what an earlier process logged from its first step on counts no more.
    """
    with _lock:
        if (folder, goes_on) not in _writers:
            # Seconds of imports, for those who asked for it.
            from tensorboardX import SummaryWriter

            _writers[folder, goes_on] = SummaryWriter(
                str(folder),
                purge_step=step if goes_on else None,
                flush_secs=_SECONDS_BETWEEN_WRITES,
                # The library names files by second and host alone, and two writers of one file would break it.
                filename_suffix=f".{uuid.uuid4().hex[:12]}",
            )
        writer = _writers[folder, goes_on]
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)


def close_all() -> None:
    """Write what this process has not written yet."""
    with _lock:
        for writer in _writers.values():
            writer.close()
        _writers.clear()

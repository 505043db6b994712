"""A thread of its own sends MLflow its records, in order: training never waits for a server, and an outage loses nothing.

Every record is in a file before it is in memory. The file is emptied once MLflow has all of it. If a process is killed, or
ends while MLflow is away, the next process on the same outputs sends what it left.
"""

import atexit
import contextlib
import fcntl
import json
import os
import socket
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from mlflow.exceptions import MlflowException

from sarm.engine.mlflow.mlflow_calls import MAX_METRICS, WAITS, Record, is_away, send
from sarm.engine.mlflow.moved_database import database_of
from sarm.engine.terminal import say

# How long the end of a process waits for a server that does not answer.
LAST_SECONDS = 15.0
_SUFFIX = ".jsonl"


class Outbox:
    """Records of one process for one run."""

    def __init__(self, uri: str, run_id: str, folder: Path):
        self._uri, self._run_id = uri, run_id
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{run_id}.{socket.gethostname()}-{os.getpid()}-{threading.get_native_id()}{_SUFFIX}"
        self._file = _locked(self._path, create=True)
        assert self._file is not None
        self._header = {"uri": uri, "run_id": run_id, "folder": str(folder.absolute())}
        self._write(self._header)
        self._queue: deque[Record] = deque()
        self._last_steps: dict[str, int] = {}
        self._changed = threading.Condition()
        self._refused: MlflowException | None = None
        self._num_failures = 0
        self._is_closing = self._has_sent_left = False
        self._thread = threading.Thread(target=self._send_all, name=f"mlflow {run_id}", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Take a record; it is sent in the background."""
        with self._changed:
            self._write(record)
            self._queue.append(record)
            self._changed.notify_all()

    def flush(self, seconds_away: float = 0.0) -> bool:
        """Wait until MLflow has everything, but at most `seconds_away` while it does not answer; returns whether it has.

        Raises MlflowException for a record that it refused.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._queue or self._num_failures > 0)
            if self._queue and seconds_away:
                self._changed.wait_for(lambda: not self._queue, seconds_away)
            refused, self._refused = self._refused, None
            if refused is not None:
                raise refused
            return not self._queue

    def close(self, seconds_away: float = LAST_SECONDS) -> bool:
        """Flush and end; what could not be sent stays in the file. Returns whether everything was sent."""
        with contextlib.suppress(MlflowException):
            self.flush(seconds_away)
        with self._changed:
            self._is_closing = True
            is_sent = not self._queue
            self._changed.notify_all()
        if is_sent:
            self._path.unlink(missing_ok=True)
        assert self._file is not None
        self._file.close()
        return is_sent

    def _write(self, record: Record) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _send_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closing)
                if self._is_closing:
                    return
                records = _together(self._queue)
            try:
                # Left records go first. Otherwise the steps of a killed process would count as logged already, and be left out.
                if not self._has_sent_left and not send_left(self._path.parent, self._run_id):
                    self._wait("what an ended process left could not be sent")
                    continue
                self._has_sent_left = True
                send(self._uri, self._run_id, records, self._last_steps)
            except Exception as error:
                # Any error at all: if this thread ended, every flush would wait for ever.
                if is_away(error):
                    self._wait(str(error))
                    continue
                # One that MLflow will never take must not hold up the others.
                self._sent(len(records), _refusal(error))
            else:
                self._sent(len(records), None)

    def _sent(self, count: int, refused: MlflowException | None) -> None:
        with self._changed:
            if self._num_failures:
                say(f"MLflow at {self._uri} answers again")
            self._num_failures = 0
            for _ in range(count):
                self._queue.popleft()
            if refused is not None:
                self._refused = refused
            if not self._queue and self._file is not None and not self._file.closed:
                self._file.truncate(0)
                self._file.seek(0)
                self._write(self._header)
            self._changed.notify_all()

    def _wait(self, reason: str) -> None:
        with self._changed:
            if not self._num_failures:
                say(
                    f"MLflow at {self._uri} does not answer ({reason[:80]}): what is logged waits in {self._path.parent}"
                )
            wait = WAITS[min(self._num_failures, len(WAITS) - 1)]
            self._num_failures += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_closing, wait)


def _together(queue: Sequence[Record]) -> list[Record]:
    """The first records that are sent as one: metrics that follow each other, else one."""
    found: list[Record] = []
    for record in queue:
        if found and (record["kind"] != "metrics" or len(found) == MAX_METRICS):
            break
        found.append(record)
        if record["kind"] != "metrics":
            break
    return found


_open: dict[tuple[str, str, Path], Outbox] = {}
_lock = threading.Lock()


def outbox(uri: str, run_id: str, folder: Path) -> Outbox:
    """This process's outbox of a run."""
    with _lock:
        if (found := _open.get((uri, run_id, folder))) is None:
            found = _open[uri, run_id, folder] = Outbox(uri, run_id, folder)
        return found


def _refusal(error: Exception) -> MlflowException:
    if isinstance(error, MlflowException):
        return error
    refusal = MlflowException(str(error))
    # The caller must be able to recognise a full disk.
    refusal.__cause__ = error
    return refusal


def flush_run(uri: str, run_id: str, folder: Path) -> None:
    """Send what this process and ended ones have for a run, as far as MLflow answers; raises MlflowException for what it refused."""
    with _lock:
        found = _open.get((uri, run_id, folder))
    if found is not None:
        found.flush()
    send_left(folder, run_id)


@atexit.register
def close_all() -> None:
    """End this process's outboxes; says where the rest lies if MLflow is away."""
    with _lock:
        boxes = [(folder, box) for (_, _, folder), box in _open.items()]
        _open.clear()
    seconds = LAST_SECONDS
    for folder, box in boxes:
        if not box.close(seconds):
            # The other outboxes would only wait for the same server.
            seconds = 0.0
            say(f"MLflow has not got everything: the rest is in {folder}, and the next job on these outputs sends it")
    for folder in {folder for folder, _ in boxes}:
        with contextlib.suppress(OSError):
            folder.rmdir()


def send_left(folder: Path, run_id: str = "*") -> bool:
    """Send what ended processes left in a folder, up to the first that MLflow cannot take now; returns whether it took all."""
    for path in sorted(folder.glob(f"{run_id}.*{_SUFFIX}"), key=lambda path: path.stat().st_mtime):
        with contextlib.suppress(FileNotFoundError):
            if (file := _locked(path, create=False)) is None:
                continue
            with file:
                header, *records = _whole_lines(file)
                if records and (moved := _moved(header, folder)) is not None:
                    if moved.uri is None and (moved.old / path.name).exists():
                        # A copy: the original folder sends these records to the same server.
                        path.unlink(missing_ok=True)
                        continue
                    header["uri"] = moved.uri or header["uri"]
                    records = [moved.record(record) for record in records]
                last_steps: dict[str, int] = {}
                while records:
                    together = _together(records)
                    try:
                        send(header["uri"], header["run_id"], together, last_steps)
                    except Exception as error:
                        if is_away(error):
                            return False
                        # This record alone is lost, and not those after it.
                        say(f"MLflow refused a record of {path}: {str(error)[:200]}")
                    del records[: len(together)]
                path.unlink(missing_ok=True)
    return True


class _Moved(NamedTuple):
    """Where an outbox was written, where it lies now, and its database there; None for a database that is not beside it."""

    old: Path
    here: Path
    uri: str | None

    def record(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with the file that it names, if that lay beside the outbox, where it is now."""
        path = Path(str(record.get("path", "")))
        inside = path.is_relative_to(self.old.parent)
        return {**record, "path": str(self.here.parent / path.relative_to(self.old.parent))} if inside else record


def _moved(header: dict[str, Any], folder: Path) -> _Moved | None:
    """What became of an outbox whose folder was moved or copied; None if it lies where it was written, or does not know."""
    old, here = Path(header.get("folder") or folder), folder.absolute()
    if old == here or (old.exists() and old.samefile(here)):
        return None
    database = database_of(header["uri"])
    beside = database is not None and database.parent == old.parent
    return _Moved(old, here, f"sqlite:///{here.parent / database.name}" if database is not None and beside else None)


def _whole_lines(file: IO[str]) -> list[dict[str, Any]]:
    """The records of a file whose writer may have been killed in the middle of a line."""
    found = []
    for line in file:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found or [{}]


def _locked(path: Path, *, create: bool) -> IO[str] | None:
    """The file, locked as long as it is open; None if another process has it."""
    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
    file = os.fdopen(descriptor, "r+")
    try:
        # Another process can hold a new file only for the moment in which it checks whether the file was left behind.
        fcntl.flock(file, fcntl.LOCK_EX | (0 if create else fcntl.LOCK_NB))
    except OSError as error:
        # Without locks in the file system nobody can tell whether the writer is alive: somebody has to send such a file by hand.
        if isinstance(error, BlockingIOError) or not create:
            file.close()
            return None
    return file

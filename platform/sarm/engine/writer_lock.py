"""One writer for each folder: a file beside the folder says who writes. Others can tell when that writer is gone.

On the owner's machine, its process is looked for. On another machine, the file is watched: the owner increases a counter in it, and an owner
that has not done so for three beats is gone. No clock is compared with another machine's.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from sarm.contracts.manifest import write_atomically
from sarm.contracts.untrusted import read_json
from sarm.settings.checks import UserError

BEAT_SECONDS = 20.0
_BEATS_MISSED = 3


class HeldError(UserError):
    """Another process writes to the folder; `owner` is its name for itself."""

    def __init__(self, message: str, owner: str):
        super().__init__(message)
        self.owner = owner


class WriterLock:
    """Held while the body of `with` runs. Raises HeldError if another process that is alive holds it.

    `owner` is shown to others that find the lock: the submission id of a job, or the name of a stage.
    """

    def __init__(self, folder: Path, owner: str, beat_seconds: float = BEAT_SECONDS):
        self.folder, self.path = folder, folder.with_name(f".{folder.name}.lock")
        self._beat_seconds = beat_seconds
        self._mine: dict[str, Any] = {"owner": owner, **_this_process(), "beat_seconds": beat_seconds, "beat": 0}
        self._mine["id"] = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "WriterLock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            held = self._held()
            if held is None:
                continue
            if not _is_gone(held, self._held):
                raise HeldError(
                    f"{self.folder} is being written by {held.get('owner')} (process {held.get('pid')} on {held.get('host')}). Wait for it or stop it, then run the same command.",
                    str(held.get("owner")),
                )
            self._take_away(held)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if (self._held() or {}).get("id") == self._mine["id"]:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """A link appears with its content or not at all, and only if the name is free. Mounted buckets have no links; there the file is written, which is nearly as safe."""
        temporary = self.path.with_name(f"{self.path.name}.{self._mine['id']}")
        temporary.write_text(json.dumps(self._mine))
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        except OSError:
            with contextlib.suppress(FileExistsError), self.path.open("x") as file:
                file.write(json.dumps(self._mine))
                return True
            return False
        finally:
            temporary.unlink()
        return True

    def _held(self) -> dict[str, Any] | None:
        try:
            return dict(read_json(self.path))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            # Only a crash of the machine can tear the file, and that ended its owner.
            return {}

    def _take_away(self, gone: dict[str, Any]) -> None:
        aside = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            try:
                if aside.read_text() != json.dumps(gone) and gone:
                    # Another process was quicker, and the file that was moved is its lock.
                    with contextlib.suppress(FileExistsError):
                        os.link(aside, self.path)
            finally:
                aside.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            if (self._held() or {}).get("id") != self._mine["id"]:
                # The lock was taken away while this process was frozen; another process writes now.
                return
            self._mine["beat"] += 1
            write_atomically(self.path, json.dumps(self._mine), sync=False)


def _this_process() -> dict[str, Any]:
    # A process number is valid within one boot of one machine, and within one container.
    place = [socket.gethostname()]
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            place.append(os.readlink(source) if source.endswith("pid") else Path(source).read_text().strip())
    me = psutil.Process()
    return {"host": place[0], "place": place, "pid": me.pid, "started": me.create_time()}


def _is_gone(held: dict[str, Any], look: Any) -> bool:
    if not held:
        return True
    if held.get("place") == _this_process()["place"]:
        try:
            # The number may belong to another process by now.
            is_another: bool = abs(psutil.Process(held["pid"]).create_time() - held["started"]) > 1.0
            return is_another
        except psutil.NoSuchProcess:
            return True
    deadline = time.monotonic() + _BEATS_MISSED * float(held["beat_seconds"])
    while time.monotonic() < deadline:
        time.sleep(min(0.5, float(held["beat_seconds"])))
        if look() != held:
            return False
    return True

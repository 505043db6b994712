"""One watch for all replicas of a server: each sends what it reads to the process that has the streams, and asks it for their account."""

import contextlib
import logging
import queue
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from sarm.serve.drift_account import DriftAccount
from sarm.serve.faults import RequestError
from sarm.serve.heads import Heads
from sarm.serve.schemas import DriftQuery
from sarm.serve.variant_routes import Variants
from sarm.serve.watch import MAX_WAITING
from sarm.serve.watched_answers import Origin, Records, Seen, records_of

log = logging.getLogger("sarm.serve")
# Until a call is given up, and until answers are: a watch that died is there again after seconds.
_CALL_SECONDS, _KEPT_SECONDS, _PAUSE_SECONDS = 10.0, 120.0, 0.5
# What Prometheus is told may be so old.
_FRESH_SECONDS = 1.0
_SENDERS = 1024
Batch = list[tuple[Origin, Records]]


@runtime_checkable
class Remote(Protocol):
    """Where the streams are."""

    def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        """What a method of `WatchHost` returns. Raises whatever the way there does."""


class SharedWatch:
    """A replica's end. What it could not hand over for two minutes, or had no room for, goes unwatched, and is counted."""

    def __init__(self, heads: Heads, remote: Remote):
        self._heads, self._remote = heads, remote
        self._sender, self._number = uuid.uuid4().hex, 0
        self._waiting: queue.Queue[tuple[Origin, Sequence[Seen]] | None] = queue.Queue()
        self._num_waiting, self._unwatched, self._counting = 0, 0, threading.Lock()
        self._known: dict[str, float] = {}
        self._known_at, self._is_closed = -1e9, False
        self._thread = threading.Thread(target=self._run, name="shared watch", daemon=True)
        self._thread.start()

    def note(self, origin: Origin, seen: list[Seen]) -> None:
        """Take answers; never waits."""
        with self._counting:
            if self._num_waiting + len(seen) > MAX_WAITING:
                self._unwatched += len(seen)
                return
            self._num_waiting += len(seen)
        self._waiting.put((origin, seen))

    def streams(self, query: DriftQuery) -> list[dict[str, Any]]:
        """The streams that the query names. Raises RequestError while the watch is away."""
        found: list[dict[str, Any]] = self._asked("streams", query.model_dump())
        return found

    def reset(self, query: DriftQuery) -> list[dict[str, str]]:
        """Begin them anew; which they were. Raises RequestError while the watch is away."""
        found: list[dict[str, str]] = self._asked("reset", query.model_dump())
        return found

    def figures(self, latents: tuple[int, ...] = ()) -> dict[str, float]:
        """For Prometheus: the last that are known while the watch is away. `unwatched` are this replica's and the watch's."""
        if time.monotonic() - self._known_at > _FRESH_SECONDS or not {str(one) for one in latents} <= self._known.keys():  # fmt: skip
            with contextlib.suppress(RequestError):
                self._known |= self._asked("figures", latents)
                self._known_at = time.monotonic()
        found = {"alarms": 0.0, "streams": 0.0, "unwatched": 0.0, **{str(one): 0.0 for one in latents}, **self._known}
        return found | {"unwatched": found["unwatched"] + self._unwatched}

    def settled(self) -> None:
        """Wait until everything that came before was handed over."""
        self._waiting.join()

    def close(self) -> None:
        """End the thread, after what waits if the watch takes it."""
        self._is_closed = True
        self._waiting.put(None)
        self._thread.join(10)

    def _asked(self, method: str, *arguments: Any) -> Any:
        try:
            return self._remote.call(method, *arguments, seconds=_CALL_SECONDS)
        # Whatever the cluster fails with: the watch is replaced, or on its way.
        except Exception as error:
            log.warning("the watch of all replicas does not answer: %s", type(error).__name__)
            raise RequestError(503, "watch_away", "the watch of all replicas does not answer; ask again in some seconds") from error  # fmt: skip

    def _run(self) -> None:
        while True:
            entries = [self._waiting.get()]
            with contextlib.suppress(queue.Empty):
                while entries[-1] is not None:
                    entries.append(self._waiting.get_nowait())
            given = [entry for entry in entries if entry is not None]
            num = sum(len(seen) for _, seen in given)
            try:
                if given:
                    self._hand_over([(origin, records_of(origin, seen, self._heads)) for origin, seen in given])
            # Not even a mistake of ours may cost anybody a reward.
            except Exception as error:
                log.error("%d answers go unwatched: %s", num, type(error).__name__)
                log.debug("traceback", exc_info=error)
                with self._counting:
                    self._unwatched += num
            finally:
                with self._counting:
                    self._num_waiting -= num
                for _ in entries:
                    self._waiting.task_done()
            if entries[-1] is None:
                return

    def _hand_over(self, batch: Batch) -> None:
        """Send until it is taken, under the same number, so that it counts once. Raises what the last try did."""
        self._number += 1
        end = time.monotonic() + _KEPT_SECONDS
        while True:
            try:
                self._remote.call("take", self._sender, self._number, batch, seconds=_CALL_SECONDS)
                return
            except Exception:
                if self._is_closed or time.monotonic() > end:
                    raise
                time.sleep(_PAUSE_SECONDS)


@dataclass(frozen=True)
class WatchHost:
    """The end that has the streams, in a process of its own. Its methods are called from several threads."""

    account: DriftAccount
    variants: Variants
    _taken: "OrderedDict[str, int]" = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, sender: str, number: int, batch: Batch) -> None:
        """Take what a replica has read. What is sent again counts once."""
        with self._lock:
            if self._taken.get(sender, 0) >= number:
                return
            self._taken[sender] = number
            self._taken.move_to_end(sender)
            while len(self._taken) > _SENDERS:
                self._taken.popitem(last=False)
            for origin, records in batch:
                self.account.watch.note_records(origin, records)

    def streams(self, query: dict[str, Any]) -> list[dict[str, Any]]:
        """Of `DriftAccount`."""
        # Edits that were posted to replicas are known here by their folder.
        self.variants.look()
        return self.account.streams(DriftQuery(**query))

    def reset(self, query: dict[str, Any]) -> list[dict[str, str]]:
        """Of `DriftAccount`."""
        return self.account.reset(DriftQuery(**query))

    def figures(self, latents: tuple[int, ...]) -> dict[str, float]:
        """Of `DriftAccount`."""
        return self.account.figures(latents)

    def close(self) -> None:
        """End its thread."""
        self.account.close()

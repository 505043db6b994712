"""The engine of a reward server: a queue of answers, and a thread that reads them with the house's one reader pass.

While a batch is computed the next one fills up, so nothing waits for a batch to be full. Answers are held as long as the queue's estimated
wait allows, since holding is what keeps training runs alive, and are refused at once beyond that.
"""

import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from math import isfinite
from typing import NamedTuple

import torch

from sarm.contracts.passes import Cost
from sarm.data.tokens.beginnings import Beginnings
from sarm.passes.reader import Reader, Reading
from sarm.serve.batching import Read, Waiting, cost_of, rows_of, take_batch
from sarm.serve.speed import Speed

# A batch that takes longer has hung.
_DEADLINE_SECONDS = 300.0
_FAILURES_UNTIL_NOT_READY = 3
# After this time it is tried again: who is not ready is sent nothing, and would never read again.
_SECONDS_NOT_READY = 30.0


class OverloadedError(Exception):
    """A queue whose answers would wait too long; `seconds` is the estimated wait."""

    def __init__(self, seconds: float):
        super().__init__(f"the queue is {seconds:.0f} s long")
        self.seconds = seconds


class EngineError(Exception):
    """An answer that the engine could not read; `is_memory` says that there was no room for it, which may pass."""

    def __init__(self, reason: str, *, is_memory: bool = False):
        super().__init__(reason)
        self.is_memory = is_memory


class Tokenised(NamedTuple):
    """The ids of an answer with its prompt, ending in the rewarded token, and how many of them are the prompt's."""

    ids: Sequence[int]
    prompt_tokens: int
    beginnings: Beginnings | None = None
    """Where else it is read."""


class Engine:
    """Reads answers in a thread of its own. Its methods may be called from any thread.

    `threads` are those of a forward pass; `max_wait` in seconds; `cached` is how many readings are kept for answers that come again.
    """

    def __init__(self, reader: Reader, *, threads: int, max_wait: float = 100.0, cached: int = 4096):
        self._reader, self._threads, self._max_wait, self._num_cached = reader, threads, max_wait, cached
        self._changed = threading.Condition()
        self._waiting: list[Waiting] = []
        self._cache: OrderedDict[bytes, Reading] = OrderedDict()
        self._speed, self._queued, self._computing = Speed(reader.batch_tokens), 0, 0
        self._is_stopped, self._busy_since = False, 0.0
        self._failures, self._failed_at = 0, 0.0
        self._dead = ""
        self.cost = Cost()
        """What forward passes have taken since the start."""
        self.read_tokens = 0
        """Tokens of the answers that were read, had each been read alone."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread. The reader is loaded already."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its batch; what waits is failed."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._fail_waiting(EngineError("the server is being stopped"))

    @property
    def waiting(self) -> tuple[int, int]:
        """Answers and tokens that are waiting or being computed."""
        with self._changed:
            return len(self._waiting), self._queued + self._computing

    @property
    def estimated_wait(self) -> float:
        """Seconds until an answer that came now would be computed."""
        with self._changed:
            return self._wait()

    @property
    def fault(self) -> str:
        """Why the engine is not ready; empty if it is."""
        if self._dead or not self._thread.is_alive():
            return self._dead or "the engine's thread does not run"
        is_recent = time.monotonic() - self._failed_at < _SECONDS_NOT_READY
        if self._failures >= _FAILURES_UNTIL_NOT_READY and is_recent:
            return f"the last {self._failures} batches failed"
        since = self._busy_since
        if since and time.monotonic() - since > _DEADLINE_SECONDS:
            return f"a batch has been computed for over {_DEADLINE_SECONDS:.0f} s"
        return ""

    def submit(self, answers: Sequence[Tokenised], timeout: float | None = None) -> "list[Future[Read]]":
        """Queue answers, in order; each future holds a reading, or raises EngineError.

        Raises OverloadedError if they would wait longer than the engine holds answers, or than `timeout` in seconds, EngineError if the
        engine has ended.
        """
        now = time.monotonic()
        queued: list[Waiting] = []
        futures: list[Future[Read]] = []
        with self._changed:
            if self._dead or self._is_stopped:
                raise EngineError(self._dead or "the server is being stopped")
            for answer in answers:
                if answer.beginnings is None and (known := self._cached(answer.ids)) is not None:
                    done: Future[Read] = Future()
                    done.set_result(Read(known))
                    futures.append(done)
                    continue
                own = answer.ids[: answer.prompt_tokens]
                prompt: Hashable = _key(own) if own and answer.beginnings is None else object()
                queued.append(Waiting(answer.ids, len(own), prompt, now, answer.beginnings))
                futures.append(queued[-1].future)
            wait = self._wait()
            if queued and wait > min(self._max_wait, self._max_wait if timeout is None else timeout):
                raise OverloadedError(wait)
            self._waiting += queued
            self._queued += sum(one.tokens for one in queued)
            self._changed.notify_all()
        return futures

    def _wait(self) -> float:
        return (self._queued + self._computing) / self._speed.tokens_per_second

    def _cached(self, ids: Sequence[int]) -> Reading | None:
        if not self._num_cached or (reading := self._cache.get(key := _key(ids))) is None:
            return None
        self._cache.move_to_end(key)
        return reading

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        batch: list[Waiting] = []
        try:
            while batch := self._next():
                self._compute(batch)
                with self._changed:
                    self._computing, self._busy_since = 0, 0.0
        # Whatever ends the thread: nobody may wait for it for ever.
        except BaseException as error:
            self._dead = f"the engine has ended: {type(error).__name__}"
            _fail(batch, EngineError(self._dead))
            self._fail_waiting(EngineError(self._dead))

    def _next(self) -> list[Waiting]:
        """The next batch, which somebody still waits for; none when the engine is stopped."""
        with self._changed:
            while not self._is_stopped:
                batch = take_batch(self._waiting, self._reader.batch_tokens)
                self._queued -= sum(one.tokens for one in batch)
                if awaited := [one for one in batch if one.future.set_running_or_notify_cancel()]:
                    self._computing = sum(one.tokens for one in awaited)
                    self._busy_since = time.monotonic()
                    return awaited
                if not batch:
                    self._changed.wait()
            return []

    def _compute(self, batch: list[Waiting]) -> None:
        """Read a batch; where that fails, its halves, so that an answer fails alone."""
        started, cost = time.monotonic(), Cost()
        try:
            readings = self._reader.read(rows_of(batch, self._reader.row_tokens), cost)
        except Exception as error:
            failure = _failure(error)
        else:
            self._failures = 0
            self._hand_out(batch, readings, started, cost)
            return
        if failure.is_memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) > 1:
            middle = len(batch) // 2
            self._compute(batch[:middle])
            self._compute(batch[middle:])
            return
        self._count_failure()
        _fail(batch, failure)

    def _hand_out(self, batch: list[Waiting], readings: dict[Hashable, Reading], started: float, cost: Cost) -> None:
        seconds, alone = time.monotonic() - started, sum(one.tokens for one in batch)
        with self._changed:
            self._speed.add(alone, seconds)
            self.cost = replace(
                self.cost,
                tokens=self.cost.tokens + cost.tokens,
                padded_tokens=self.cost.padded_tokens + cost.padded_tokens,
                forward_seconds=self.cost.forward_seconds + cost.forward_seconds,
            )
            self.read_tokens += alone
        prompts: set[Hashable] = set()
        for place, one in enumerate(batch):
            reading, computed = readings[place], cost_of(one, prompts)
            prompts.add(one.prompt)
            if not isfinite(reading.reward):
                self._count_failure()
                _fail([one], EngineError(f"the model's reward is {reading.reward}"))
                continue
            self._keep(one.ids, reading)
            columns = one.beginnings.columns if one.beginnings else ()
            beginnings = tuple(readings[place, column] for column in columns)
            _settle(one.future, Read(reading, beginnings, started - one.arrived, seconds, computed))

    def _count_failure(self) -> None:
        self._failures += 1
        self._failed_at = time.monotonic()

    def _keep(self, ids: Sequence[int], reading: Reading) -> None:
        if not self._num_cached:
            return
        with self._changed:
            self._cache[_key(ids)] = reading
            while len(self._cache) > self._num_cached:
                self._cache.popitem(last=False)

    def _fail_waiting(self, error: EngineError) -> None:
        with self._changed:
            lost, self._waiting, self._queued = self._waiting, [], 0
        _fail([one for one in lost if not one.future.cancelled()], error)


def _fail(batch: Sequence[Waiting], error: EngineError) -> None:
    for one in batch:
        _settle(one.future, error)


def _settle(future: "Future[Read]", outcome: Read | EngineError) -> None:
    """Hand an outcome to who waits for it, if anybody still does."""
    try:
        if isinstance(outcome, Read):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
    except InvalidStateError:
        return


def _failure(error: Exception) -> EngineError:
    is_memory = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
    if is_memory:
        return EngineError("the machine has no memory for this answer", is_memory=True)
    # Not the message: it may hold what was sent.
    return EngineError(f"the model failed with {type(error).__name__}")


def _key(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()

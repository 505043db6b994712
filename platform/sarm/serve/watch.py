"""The watch over reward hacking: what every run's answers are paid for, step by step, from the codes that were computed anyway.

It works in a thread of its own, after the answers are out, and whatever fails in it fails there. A step ends when two later ones have begun,
since rollouts of two steps are often under way at once; a run that says no steps has one every so many answers.
"""

import contextlib
import hashlib
import logging
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from sarm.audit.drift import Answer, signals_of, sums_of
from sarm.audit.drift_stream import RECENT_STEPS, Alarm, DriftStream, suspects
from sarm.serve.heads import Heads
from sarm.serve.watch_store import Kept, WatchStore
from sarm.serve.watched_answers import Origin, Record, Records, Seen, records_of, term_of

log = logging.getLogger("sarm.serve")
MAX_STREAMS = 64
_OPEN_STEPS = 2
# A step of more answers is ended: a run that names the same step for ever would fill the memory.
_STEP_ANSWERS = 16_384
# Answers whose texts an alarm can still show, and how many it shows of each latent.
_SHOWABLE, _SHOWN, _SUSPECTS = 1024, 5, 3
# Answers that wait for the thread: beyond them, others go unwatched, and are counted.
MAX_WAITING = 16_384
_RESTORE_SECONDS = 10.0


class Key(NamedTuple):
    """One stream: a training run's split, under one head of one model."""

    run: str
    split: str
    model: str
    """Its identity."""
    variant: str


@dataclass
class Watched:
    """A stream with its open steps."""

    stream: DriftStream
    steps: "OrderedDict[int, list[Answer]]" = field(default_factory=OrderedDict)
    names: dict[int, set[str]] = field(default_factory=dict)
    shown: deque[tuple[int, Record]] = field(default_factory=lambda: deque(maxlen=_SHOWABLE))
    """The latest answers, with their steps."""
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    """Of each alarm, by its place: what its latents are driven by."""


Publish = Callable[[Key, "Watched"], None]


class Watch:
    """All streams of a server. `step_answers` make a step of a run that says none; `silent_S` are the latents that training never saw, if known.

    `decode` makes a text of token ids, for the rollouts that an alarm shows. `publish` is called after every finished step, in the watch's thread.
    """

    def __init__(
        self,
        heads: Heads,
        model: str,
        *,
        step_answers: int,
        decode: Callable[[Sequence[int]], str],
        silent_S: Bool[NDArray[np.bool_], " d_sae"] | None = None,
        store: WatchStore | None = None,
    ):
        self._heads, self._model, self._step_answers, self._decode = heads, model, step_answers, decode
        self._silent_S, self._store = silent_S, store
        self._streams: OrderedDict[Key, Watched] = OrderedDict()
        self._lock = threading.Lock()
        self._waiting: queue.Queue[tuple[Origin, int, Callable[[], Records]] | None] = queue.Queue()
        self._num_waiting, self._counting = 0, threading.Lock()
        self._restored = threading.Event()
        self.publish: Publish | None = None
        self.num_alarms = self.num_unwatched = 0
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def note(self, origin: Origin, seen: Sequence[Seen]) -> None:
        """Take answers; never waits."""
        self._put(origin, len(seen), partial(records_of, origin, seen, self._heads))

    def note_records(self, origin: Origin, records: Records) -> None:
        """Take answers that another process has read; never waits."""
        self._put(origin, max(map(len, records.values()), default=0), lambda: records)

    def _put(self, origin: Origin, num: int, records: Callable[[], Records]) -> None:
        with self._counting:
            if self._num_waiting + num > MAX_WAITING:
                self.num_unwatched += num
                return
            self._num_waiting += num
        self._waiting.put((origin, num, records))

    def close(self) -> None:
        """End the thread, after what waits."""
        self._waiting.put(None)
        self._thread.join(10)

    def settled(self) -> None:
        """Wait until everything that came before is counted."""
        self._restored.wait()
        self._waiting.join()

    @property
    def num_streams(self) -> int:
        """How many runs, splits and variants are watched."""
        with self._lock:
            return len(self._streams)

    def streams(self) -> dict[Key, Watched]:
        """All streams, the latest to have been added to last."""
        with self._lock:
            return dict(self._streams)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Mapping[Key, Watched]]:
        """Keep the streams as they are while the body reads them; soon after a start, once those of before are there."""
        self._restored.wait(_RESTORE_SECONDS)
        with self._lock:
            yield self._streams

    def reset(self, chosen: Callable[[Key], bool]) -> list[Key]:
        """Begin some streams anew; which they were."""
        with self._lock:
            found = [key for key in self._streams if chosen(key)]
            for key in found:
                self._streams[key] = self._new(key)
                if self._store is not None:
                    self._store.forget(key)
        return found

    def last_contributions(self, latents: Sequence[int]) -> list[float]:
        """Mean contributions of latents at the last finished step of the stream that was added to last; zeros without one."""
        with self._lock:
            stream = next(reversed(self._streams.values())).stream if self._streams else DriftStream(1)
            found: list[float] = stream.contributions(np.array(latents, np.int64)).tolist()
        return found

    def _run(self) -> None:
        self._restore()
        self._restored.set()
        while True:
            entry = self._waiting.get()
            try:
                if entry is None:
                    return
                self._take(entry[0], entry[2]())
            # Not even a full disk or a mistake of ours may cost anybody a reward.
            except Exception as error:
                self._pass_over(entry[1] if entry else 0)
                log.error("the watch failed with %s", type(error).__name__)
                log.debug("traceback", exc_info=error)
            finally:
                with self._counting:
                    self._num_waiting -= entry[1] if entry else 0
                self._waiting.task_done()

    def _pass_over(self, num: int) -> None:
        with self._counting:
            self.num_unwatched += num

    def _restore(self) -> None:
        try:
            known = [
                Key(*key) for key in (self._store.keys() if self._store is not None else ()) if key[2] == self._model
            ]
            for key in known[-MAX_STREAMS:]:
                watched = self._read_again(key)
                with self._lock:
                    self._streams[key] = watched
        except Exception as error:
            log.error("what the watch has kept cannot be read: %s", type(error).__name__)
            log.debug("traceback", exc_info=error)

    def _new(self, key: Key) -> Watched:
        seed = int.from_bytes(hashlib.sha256("\x1f".join(key).encode()).digest()[:4], "big")
        return Watched(DriftStream(self._heads.num_latents, seed=seed))

    def _read_again(self, key: Key) -> Watched:
        """A stream as the folder keeps it, from before a restart or since others took its place; a new one where it keeps none."""
        watched = self._new(key)
        if self._store is not None:
            for step in self._store.steps(key):
                watched.stream.add(*step)
            watched.rollouts = self._store.rollouts(key)
        return watched

    def _take(self, origin: Origin, records: Records) -> None:
        finished: list[tuple[Key, Watched]] = []
        with self._lock:
            for variant, own in records.items():
                key = Key(origin.run, origin.split, self._model, variant)
                watched = self._streams.pop(key, None) or self._read_again(key)
                self._streams[key] = watched
                while len(self._streams) > MAX_STREAMS:
                    self._streams.popitem(last=False)
                step = origin.step if origin.step is not None else watched.stream.last_step + 1
                self._open(watched, step, own)
                most = self._step_answers if origin.step is None else _STEP_ANSWERS
                full = max((number for number, answers in watched.steps.items() if len(answers) >= most), default=-1)
                while len(watched.steps) > _OPEN_STEPS or next(iter(watched.steps), full + 1) <= full:
                    self._finish(key, watched)
                    finished.append((key, watched))
        for key, watched in finished:
            if self.publish is not None:
                self.publish(key, watched)

    def _open(self, watched: Watched, step: int, records: Sequence[Record]) -> None:
        """Add answers to their step, or, where it has ended, to the first that is open."""
        if step <= watched.stream.last_step:
            step = next(iter(watched.steps), watched.stream.last_step + 1)
        own = watched.steps.setdefault(step, [])
        names = watched.names.setdefault(step, set())
        watched.steps = OrderedDict(sorted(watched.steps.items()))
        for one in records:
            if one.name is not None and one.name in names:
                continue
            names |= {one.name} if one.name is not None else set()
            # An edited weight may be so large that a contribution is infinite, and so would be every figure from then on.
            if not np.isfinite(one.answer.reward):
                self._pass_over(1)
                continue
            own.append(one.answer)
            watched.shown.append((step, one))

    def _finish(self, key: Key, watched: Watched) -> None:
        step, answers = watched.steps.popitem(last=False)
        watched.names.pop(step, None)
        silent_S = self._silent_S if self._silent_S is not None else watched.stream.silent()
        sums, signals = sums_of(answers), signals_of(answers, silent_S)
        alarm = watched.stream.add(step, sums, signals)
        if self._store is not None:
            self._store.keep(key, watched.stream.num_steps, Kept(step, sums, signals))
        if alarm is not None:
            self.num_alarms += 1
            watched.rollouts.append({"step": step, "rollouts": self._rollouts(watched, alarm)})
            if self._store is not None:
                self._store.keep_rollouts(key, watched.rollouts)
            names = [f"latent {one.latent}" for one in alarm.latents] + list(alarm.signals)
            log.warning("drift at step %d: %s", step, ", ".join(names[:8]))

    def _rollouts(self, watched: Watched, alarm: Alarm) -> list[dict[str, Any]]:
        """The answers of the last steps that most push the alarm's latents, or the first suspects, where they went."""
        found = []
        paid = {one.latent: one.shift for one in [*watched.stream.paid(_SUSPECTS), *alarm.latents]}
        late = [one for step, one in watched.shown if step > alarm.step - RECENT_STEPS]
        for latent in [one.latent for one in alarm.latents][:_SUSPECTS] or suspects(watched.stream, _SUSPECTS):
            sign = -1 if paid.get(latent, 0.0) < 0 else 1
            terms = [(sign * term_of(answer, latent), place) for place, (_, answer, _) in enumerate(late)]
            for term, place in sorted(terms, key=lambda pair: -pair[0])[:_SHOWN]:
                if term > 0:
                    _, answer, ids = late[place]
                    found.append({"latent": latent, "contribution": sign * term, "reward": answer.reward, "text": self._decode(ids.tolist())})  # fmt: skip
        return found

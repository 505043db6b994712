"""Checkpoints of Ray Train workers: when they are due, how all workers write one together, and how they are asked to stop.

A state is copied to host memory between two steps and written by a thread while training goes on; the workers make it visible
together at a later step, once each of them has written its part.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from sarm.data.store.checkpoints import Checkpoint, Checkpoints, Written, alone, snapshot
from sarm.data.store.state_tree import random_state, restore_random_state
from sarm.settings.checks import StoppedError, UserError

# How often, in seconds, a single worker looks at the shared folder.
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_POLLS = 0.05


class WorkerStates:
    """One worker's side of its training's checkpoints: due every `every_steps` steps, or, where that is 0, `every_seconds`.

    Several workers agree by a message from the first, every `steps_between_looks` steps. `notice` says why they must end soon ('' as
    long as they need not); all workers call it together. `beat` is called while a state is waited for.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        every_steps: int,
        every_seconds: float,
        steps_between_looks: int = 10,
        notice: Callable[[], str] = str,
        beat: Callable[[], None] = lambda: None,
    ):
        self._checkpoints, self._every_steps, self._every_seconds = checkpoints, every_steps, every_seconds
        self._notice, self._beat = notice, beat
        self._steps_between_looks = steps_between_looks
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._saved = self._looked = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[Written]] | None = None
        self.seconds = 0.0
        """Time that training stood still for its checkpoints."""

    def latest(self) -> Checkpoint | None:
        """The newest whole state, None if none was ever saved.

        The first worker verifies it for all. Raises UserError if there are states and none can be used.
        """
        answer: list[Checkpoint | UserError | None] = [None]
        if self.rank == 0:
            try:
                answer = [self._checkpoints.latest()]
            except UserError as refused:
                answer = [refused]
        if self.world > 1:
            dist.broadcast_object_list(answer, src=0)
        (found,) = answer
        if isinstance(found, UserError):
            raise found
        return found

    def restore_random(self, found: Checkpoint) -> None:
        """Let this worker's random generators go on as they were, if it had a part in the state; last before the next step."""
        if self._own in found.parts:
            restore_random_state(found.read(self._own)["random"])

    def own_state(self, found: Checkpoint) -> Any:
        """What this worker itself saved; raises UserError if there were fewer workers."""
        return found.read(self._own)["state"]

    def after_step(self, step: int, state: Callable[[], tuple[Any, Any]]) -> None:
        """Save if it is time; `state()` is what all workers have in common (the first's is kept), and what is this worker's own.

        All workers call it after each step. Raises StoppedError, with the state saved, if the workers were asked to stop or noticed
        that they must, and UserError if a state could not be written.
        """
        is_due, stop_reason, is_written = self._look(step)
        if is_written:
            self._commit()
        if stop_reason:
            self.save(step, state)
            self.finish()
            raise StoppedError(f"stopped after step {step}: {stop_reason}; its state is saved")
        if is_due:
            self.save(step, state)

    def save(self, step: int, state: Callable[[], tuple[Any, Any]]) -> None:
        """Begin to save; `finish` waits for the end. All workers call it together."""
        self.finish()
        started = time.monotonic()
        shared, own = state()
        parts = {self._own: {"random": random_state(), "state": own}}
        if self.rank == 0:
            parts["shared"] = shared
        copied = snapshot(parts)
        self._pending = step, self._thread.submit(self._checkpoints.write, step, copied)
        self._saved = time.monotonic()
        self.seconds += self._saved - started

    def finish(self) -> None:
        """Wait until what was saved is on the disk; all workers call it together."""
        if self._pending is None:
            return
        while not all(self._everyone(self._is_written())):
            # Writing a large state to a slow disk is not a hang.
            self._beat()
            time.sleep(_SECONDS_BETWEEN_POLLS)
        self._commit()

    def _commit(self) -> None:
        assert self._pending is not None
        started, (step, future) = time.monotonic(), self._pending
        self._pending = None
        try:
            self._checkpoints.commit(step, future.result(), self._everyone, self.rank == 0)
        except OSError as error:
            raise UserError(
                f"{error}. The state before it is kept: make room, and the same command goes on from there."
            ) from error
        self.seconds += time.monotonic() - started

    def _look(self, step: int) -> tuple[bool, str, bool]:
        """(save now, why to stop now, what was saved is written), the same on all workers."""
        is_due = bool(self._every_steps) and step % self._every_steps == 0
        if self.world == 1:
            if time.monotonic() - self._looked < _SECONDS_BETWEEN_LOOKS:
                return is_due, "", False
            self._looked = time.monotonic()
            return is_due or self._is_late(), self._stop_reason(), self._is_written()
        if step % self._steps_between_looks:
            return is_due, "", False
        answer: list[Any] = [self._is_late(), self._stop_reason()]
        dist.broadcast_object_list(answer, src=0)
        is_written = self._pending is not None and all(self._everyone(self._is_written()))
        return is_due or answer[0], answer[1], is_written

    def _stop_reason(self) -> str:
        notice = self._notice()
        return "it was asked to" if self._checkpoints.is_stop_requested() else notice

    def _is_late(self) -> bool:
        return not self._every_steps and time.monotonic() - self._saved >= self._every_seconds

    def _is_written(self) -> bool:
        return self._pending is not None and self._pending[1].done()

    @property
    def _own(self) -> str:
        return f"rank-{self.rank}"

    def _everyone(self, value: Any) -> list[Any]:
        if self.world == 1:
            return alone(value)
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

"""Checkpoints of Ray Train workers: when they are due, and how all workers write one together."""

import time
from typing import Any

import torch.distributed as dist

from sarm.data.checkpoints import Checkpoint, Checkpoints, alone
from sarm.data.state_tree import random_state, restore_random_state

# Workers agree on the time by a message from the first; this many steps share one.
_STEPS_BETWEEN_LOOKS = 10


class WorkerStates:
    """One worker's side of its training's checkpoints: due every `every_steps` steps, or, where that is 0, `every_seconds`."""

    def __init__(self, checkpoints: Checkpoints, every_steps: int, every_seconds: float):
        self._checkpoints, self._every_steps, self._every_seconds = checkpoints, every_steps, every_seconds
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._written = time.monotonic()

    def latest(self) -> Checkpoint | None:
        """The newest whole state, after which this worker's random generators continue as they were if it had one then."""
        found = self._checkpoints.latest()
        if found is not None and self._own in found.parts:
            restore_random_state(found.read(self._own)["random"])
        return found

    def own_state(self, found: Checkpoint) -> Any:
        """What this worker itself saved; raises UserError if there were fewer workers."""
        return found.read(self._own)["state"]

    def is_due(self, step: int) -> bool:
        """Whether to save after this step; the same answer on all workers."""
        if self._every_steps:
            return step % self._every_steps == 0
        if self.world == 1:
            return time.monotonic() - self._written >= self._every_seconds
        if step % _STEPS_BETWEEN_LOOKS:
            return False
        answer = [time.monotonic() - self._written >= self._every_seconds]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def save(self, step: int, shared: Any, own: Any = None) -> None:
        """Write what all workers have in common (the first worker's is kept) and what is this worker's own."""
        parts = {self._own: {"random": random_state(), "state": own}}
        if self.rank == 0:
            parts["shared"] = shared
        self._checkpoints.save(step, parts, self._everyone if self.world > 1 else alone, self.rank == 0)
        self._written = time.monotonic()

    @property
    def _own(self) -> str:
        return f"rank-{self.rank}"

    def _everyone(self, value: Any) -> list[Any]:
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

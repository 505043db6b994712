"""How far a pass is: in the terminal every few seconds, in MLflow as metrics by block."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from sarm.engine.live.progress_line import pass_line

_PRINT_EVERY_SECONDS = 5.0


class PassProgress:
    """Sums what `num_actors` actors of `threads` cores each say of their blocks."""

    def __init__(
        self,
        name: str,
        num_rows: int,
        log: Callable[[Mapping[str, float], int], None] | None,
        *,
        num_actors: int,
        threads: int,
        use_gpu: bool,
    ):
        self._name, self._num_rows, self._log = name, num_rows, log
        self._num_actors, self._threads, self._use_gpu = num_actors, threads, use_gpu
        self._rows = self._outputs = self._blocks = self._tokens = self._padded = 0
        self._forward = self._cpu = self._rss = self._gpu_memory = 0.0
        self._printed, self._said_blocks = time.monotonic(), 0
        self._began, self._ended = math.inf, 0.0

    def add(self, done: Mapping[str, Any]) -> None:
        """Take in one block."""
        now = time.monotonic()
        self._blocks, self._rows, self._outputs = (
            self._blocks + 1,
            self._rows + done["rows"],
            self._outputs + done["outputs"],
        )
        self._tokens, self._padded = self._tokens + done["tokens"], self._padded + done["padded_tokens"]
        self._forward, self._cpu = self._forward + done["forward_seconds"], self._cpu + done["cpu_seconds"]
        self._rss, self._gpu_memory = max(self._rss, done["rss"]), max(self._gpu_memory, done["gpu_memory"])
        # From the first block on: starting actors and loading the model is not the pass's rate.
        self._began, self._ended = min(self._began, done["began"]), max(self._ended, done["ended"])
        if now - self._printed >= _PRINT_EVERY_SECONDS:
            self._say(now)

    def end(self) -> None:
        """The last line, unless it has been said."""
        if self._said_blocks < self._blocks:
            self._say(time.monotonic())

    def figures(self) -> dict[str, Any]:
        """What the pass took, for the manifest."""
        if not self._blocks:
            return {}
        return {
            "tokens_per_second": round(self._tokens / self._elapsed(), 1),
            "padding_share": round(self._padding(), 4),
            "forward_seconds": round(self._forward, 2),
            **{name: round(value, 3) for name, value in self._use().items()},
        }

    def _elapsed(self) -> float:
        return max(1e-9, self._ended - self._began)

    def _padding(self) -> float:
        return 1 - self._tokens / self._padded if self._padded else 0.0

    def _use(self) -> dict[str, float]:
        """Shares of the actors' cores and GPUs that were at work (a GPU: in forward passes), and memory of the largest actor."""
        seconds = self._elapsed() * self._num_actors
        use = {"cpu_share": self._cpu / seconds / self._threads, "actor_rss_gb": self._rss / 1e9}
        if self._use_gpu:
            use["gpu_share"] = self._forward / seconds
            use["gpu_memory_gb"] = self._gpu_memory / 1e9
        return use

    def _say(self, now: float) -> None:
        self._printed, self._said_blocks = now, self._blocks
        elapsed = self._elapsed()
        rate, left = self._tokens / elapsed, elapsed * max(0.0, self._num_rows / max(1, self._rows) - 1)
        use = self._use()
        figures = [f"{rate:,.0f} tokens/s", f"padding {self._padding():.1%}"]
        if self._use_gpu:
            figures.append(f"GPU {use['gpu_share']:.0%} busy, {use['gpu_memory_gb']:.1f} GB")
        figures.append(f"CPU {use['cpu_share']:.0%} busy, {use['actor_rss_gb']:.1f} GB")
        print(pass_line(self._name, self._rows, self._num_rows, "rows", figures, left), flush=True)
        if self._log is not None:
            metrics = {"rows": self._rows, "tokens": self._tokens, "tokens_per_second": rate, "seconds_left": left}
            metrics |= {"padding_share": self._padding(), **use}
            self._log({f"extraction/{name}": value for name, value in metrics.items()}, self._blocks)

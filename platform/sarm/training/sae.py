"""Training loop of SAEs over phases of activations; plain torch, any number of workers.

N rows, B rows of a step over all workers, D d_in. All workers draw the same order and read their own rows of each batch, one batch ahead,
so what a step sees does not depend on how many there are. Several SAEs (widths, k, seeds) can learn from one read of the rows.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sarm.data.ahead import ahead
from sarm.data.store.shuffled_rows import Cursor, Rows, batches
from sarm.evaluate.sae_quality import Prepare, measure, quality_metrics
from sarm.nn.sae import Sae, standardise
from sarm.settings.sae import SaeSettings
from sarm.training.sae_learner import Learner, Split
from sarm.training.schedule import trapezoid

Log = Callable[[int, dict[str, float]], None]
_LOG_EVERY_SECONDS = 2.0
# Other workers wait for the one that measures: it may take this share of their time.
_MEASURING_SHARE = 0.02


@dataclass(frozen=True)
class Phase:
    """One pass schedule over one kind of activations; `heldout` rows are measured and never trained on.

    `prepare` makes what an SAE reads of both.
    """

    name: str
    rows: Rows
    heldout: Float[Tensor, "rows d_in"]
    epochs: int
    lr: float
    prepare: Prepare = standardise


class SaeTraining:
    """SAEs going through one phase together: one batch at a time, read and standardised once, a step of every SAE on it.

    The configs must agree in `batch_size`. `first_step` is the number of steps before the phase, for the log.
    """

    def __init__(
        self,
        saes: Sequence[Sae],
        phase: Phase,
        sae_configs: Sequence[SaeSettings],
        seed: int,
        device: torch.device | str = "cpu",
        first_step: int = 0,
        split: Split = "rows",
    ):
        sizes = {config.batch_size for config in sae_configs}
        if len(sizes) != 1:
            raise ValueError(
                f"SAEs that share a batch need one batch_size, got {sorted(sizes)}. Pass --sae.batch-size."
            )
        self.learners = [Learner(sae, config, device, split) for sae, config in zip(saes, sae_configs, strict=True)]
        self.place, self.num_steps, self.num_seen = Cursor(seed), first_step, 0
        self._phase, self._configs, self._seed, self._device = phase, sae_configs, seed, device
        self._splits_latents = split == "latents" and self.learners[0].world > 1

    def run(
        self, logs: Sequence[Log], max_steps: int | None = None, after_step: Callable[[], None] = lambda: None
    ) -> None:
        """Train from `place` to the phase's end, or for `max_steps` steps; `after_step` is where a caller saves the state.

        `logs[i](step, metrics)` is called for SAE i on worker 0 every few seconds and at the end. Metrics include the quality on
        held-out rows, unless the dictionary is split: no worker then has all of it.
        """
        total = self._phase.epochs * self._phase.rows.num_rows
        next_log = 0.0
        last_step = None if max_steps is None else self.num_steps + max_steps
        rows = batches(
            rows=self._phase.rows,
            start=self.place,
            epochs=self._phase.epochs,
            batch_size=self._configs[0].batch_size,
            share=self.learners[0].rows_of_a_batch,
            device=self._device,
        )
        for x_BD, size, after in ahead(rows):
            if self.num_steps == last_step:
                return
            x_BD = self._phase.prepare(x_BD)
            # The rate is that of the step's middle, so that neither the first nor the last step is wasted at 0.
            share = (self.num_seen + size / 2) / total
            rates = [self._phase.lr * trapezoid(share, c.warmup_share, c.decay_share) for c in self._configs]
            losses = [learner.step(x_BD, lr, size) for learner, lr in zip(self.learners, rates, strict=True)]
            self.place, self.num_steps, self.num_seen = after, self.num_steps + 1, self.num_seen + size
            is_last = self.num_seen == total or self.num_steps == last_step
            if self.learners[0].rank == 0 and (is_last or time.monotonic() > next_log):
                began = time.monotonic()
                for learner, log, loss, lr in zip(self.learners, logs, losses, rates, strict=True):
                    metrics = {"progress": self.num_seen / total, "loss": float(loss), "lr": lr}
                    metrics["dead_by_clock"] = learner.dead_share()
                    if not self._splits_latents:
                        metrics |= self._quality(learner.sae)
                    log(self.num_steps, metrics)
                next_log = log_after(began, time.monotonic(), self.learners[0].world)
            after_step()

    def _quality(self, sae: Sae) -> dict[str, float]:
        return quality_metrics(measure(sae, self._phase.heldout, self._device, prepare=self._phase.prepare))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the phase depends on, of this worker: loading it continues bit for bit.

        The order of rows is a function of (seed, epoch), so the place stands for the random generator's state.
        """
        return {
            "phase": self._phase.name,
            "seed": self._seed,
            "place": list(self.place),
            "num_steps": self.num_steps,
            "num_seen": self.num_seen,
            "learners": [learner.state_dict() for learner in self.learners],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; raises ValueError if that was another phase, seed or number of SAEs."""
        found = (state["phase"], state["seed"], len(state["learners"]))
        wanted = (self._phase.name, self._seed, len(self.learners))
        if found != wanted:
            raise ValueError(f"the training state is of (phase, seed, SAEs) {found}, this training is {wanted}.")
        for learner, part in zip(self.learners, state["learners"], strict=True):
            learner.load_state_dict(part)
        self.place = Cursor(*state["place"])
        self.num_steps, self.num_seen = state["num_steps"], state["num_seen"]


def log_after(began: float, ended: float, num_workers: int) -> float:
    """When to measure and log again, in seconds of the clock by which the last time `began` and `ended`."""
    rest = (ended - began) * (1 / _MEASURING_SHARE - 1) if num_workers > 1 else 0.0
    return ended + max(_LOG_EVERY_SECONDS, rest)


def train_sae(
    sae: Sae,
    phase: Phase,
    config: SaeSettings,
    seed: int,
    log: Log,
    device: torch.device | str = "cpu",
    first_step: int = 0,
) -> None:
    """Train one SAE in place through one phase."""
    SaeTraining(saes=[sae], phase=phase, sae_configs=[config], seed=seed, device=device, first_step=first_step).run(
        [log]
    )

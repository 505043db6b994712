"""Training loop of the TopK SAE over phases of activations (sentence ends, then chat ends); plain torch, any number of ranks.

N rows, B rows of a step over all ranks, D d_in, S d_sae. All ranks draw the same order and take every world-th row of a step,
so what a step sees does not depend on how many ranks there are.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from sarm.config import Sae
from sarm.nn.losses import VarianceUnexplained, reconstruction_loss
from sarm.nn.sae import Codes, TopKSae, standardise
from sarm.train.schedule import trapezoid

Log = Callable[[int, dict[str, float]], None]
_LOG_EVERY_SECONDS = 2.0


class Rows(Protocol):
    """Where a phase's training rows come from: windows of residual vectors in an order that (seed, epoch) decides."""

    num_rows: int

    def windows(self, seed: int, epoch: int) -> Iterator[Float[Tensor, "rows d_in"]]: ...


@dataclass(frozen=True)
class Phase:
    """One pass schedule over one kind of activations; `heldout` rows are measured and never trained on."""

    name: str
    rows: Rows
    heldout: Float[Tensor, "rows d_in"]
    epochs: int
    lr: float


@dataclass
class LatentCounts:
    """How often and how strongly each latent fires over the rows added."""

    d_sae: int
    num_rows: int = 0
    fired: Tensor = field(init=False)
    total: Tensor = field(init=False)
    peak: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.fired = torch.zeros(self.d_sae, dtype=torch.int64)
        self.total = torch.zeros(self.d_sae, dtype=torch.float64)
        self.peak = torch.zeros(self.d_sae, dtype=torch.float32)

    def add(self, codes: Codes) -> None:
        values, indices = codes.values.detach().cpu().flatten(), codes.indices.cpu().flatten()
        self.num_rows += codes.values.shape[0]
        self.fired.index_add_(0, indices, (values > 0).long())
        self.total.index_add_(0, indices, values.double())
        self.peak.scatter_reduce_(0, indices, values.float(), "amax")

    def alive_share(self) -> float:
        """Share of latents that fired at least once."""
        return float((self.fired > 0).double().mean())

    def l0(self) -> float:
        """Mean number of latents that fire on a row."""
        return float(self.fired.sum()) / max(1, self.num_rows)


class Measured(NamedTuple):
    """Quality on held-out rows."""

    fvu: float | None
    counts: LatentCounts


class _RowLosses(nn.Module):
    """The reconstruction losses as one module, so that gradients of all ranks can be averaged around it."""

    def __init__(self, sae: TopKSae):
        super().__init__()
        self.sae = sae

    def forward(self, x_BD: Tensor) -> Tensor:
        return reconstruction_loss(self.sae.decode(self.sae(x_BD)), x_BD)


def train_sae(
    sae: TopKSae,
    phase: Phase,
    config: Sae,
    seed: int,
    log: Log,
    device: torch.device | str = "cpu",
    first_step: int = 0,
) -> None:
    """Train in place through one phase: Adam, unit-norm decoder rows with the parallel gradient removed, warm-up and decay.

    `log(step, metrics)` is called on rank 0 every few seconds and at the end, with quality on the phase's held-out rows.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sae.to(device)
    losses: nn.Module = _RowLosses(sae)
    if world > 1:
        losses = nn.parallel.DistributedDataParallel(losses)
    optimizer = torch.optim.Adam(sae.parameters(), lr=phase.lr, fused=True)
    seen, total, step, last_log = 0, phase.epochs * phase.rows.num_rows, first_step, 0.0
    for x_BD in _batches(phase, config.batch_size, seed):
        size = x_BD.shape[0]
        # The rate is that of the step's middle, so that neither the first nor the last step is wasted at 0.
        lr = phase.lr * trapezoid((seen + size / 2) / total, config.warmup_share, config.decay_share)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Gradients are averaged over ranks, so each contributes its sum over the step's size.
        loss = losses(standardise(x_BD[rank::world].to(device))).sum() * world / size
        loss.backward()
        sae.remove_parallel_gradient_()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sae.normalise_decoder_()
        step, seen = step + 1, seen + size
        if rank == 0 and ((now := time.monotonic()) - last_log > _LOG_EVERY_SECONDS or seen == total):
            last_log = now
            quality = measure(sae, phase.heldout, device)
            log(step, {"progress": seen / total, "loss": float(loss.detach()), "lr": lr, **quality_metrics(quality)})


def measure(
    sae: TopKSae, h_ND: Float[Tensor, "rows d_in"], device: torch.device | str = "cpu", chunk: int = 4096
) -> Measured:
    """FVU and firing counts on residual vectors."""
    unexplained, counts = VarianceUnexplained(sae.d_in), LatentCounts(sae.d_sae)
    with torch.no_grad():
        for part in h_ND.split(chunk):
            x = standardise(part.to(device))
            codes = sae(x)
            unexplained.add(x, sae.decode(codes))
            counts.add(codes)
    return Measured(unexplained.value(), counts)


def quality_metrics(quality: Measured) -> dict[str, float]:
    """The measured quality under the names that MLflow shows."""
    fvu = {} if quality.fvu is None else {"fvu": quality.fvu}
    alive = quality.counts.alive_share()
    return {**fvu, "l0": quality.counts.l0(), "alive_share": alive, "dead_fraction": 1 - alive}


def _batches(phase: Phase, batch_size: int, seed: int) -> Iterator[Tensor]:
    for epoch in range(phase.epochs):
        generator = torch.Generator().manual_seed(seed + epoch)
        for window in phase.rows.windows(seed, epoch):
            order = torch.randperm(len(window), generator=generator)
            for chosen in order.split(batch_size):
                yield window[chosen]

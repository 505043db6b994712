"""How good an SAE is on rows it was not trained on; each metric has its one definition here or in `sarm.nn.losses`.

N rows, D d_in, S d_sae. L0 is the mean number of latents that fire on a row; the density of a latent is the share of rows on
which it fires; a latent is alive if it fires at all. Explained variance is 1 - FVU.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sarm.nn.losses import VarianceUnexplained, cosine
from sarm.nn.sae import Codes, Sae

_PRE_ACTS_AT_ONCE = 2**24
# What an SAE reads of rows.
Prepare = Callable[[Float[Tensor, "rows d_in"]], Float[Tensor, "rows d_in"]]


@dataclass
class LatentCounts:
    """How often and how strongly each latent fires over the rows added; `peak` is the largest absolute value."""

    d_sae: int
    num_rows: int = 0
    fired: Int[Tensor, " d_sae"] = field(init=False)
    total: Float[Tensor, " d_sae"] = field(init=False)
    peak: Float[Tensor, " d_sae"] = field(init=False)

    def __post_init__(self) -> None:
        self.fired = torch.zeros(self.d_sae, dtype=torch.int64)
        self.total = torch.zeros(self.d_sae, dtype=torch.float64)
        self.peak = torch.zeros(self.d_sae, dtype=torch.float32)

    def add(self, codes: Codes) -> None:
        values, indices = codes.values.detach().cpu().flatten(), codes.indices.cpu().flatten()
        self.num_rows += codes.values.shape[0]
        self.fired.index_add_(0, indices, (values != 0).long())
        self.total.index_add_(0, indices, values.double())
        self.peak.scatter_reduce_(0, indices, values.float().abs(), "amax")

    def __add__(self, other: "LatentCounts") -> "LatentCounts":
        """The counts over the rows of both."""
        both = LatentCounts(self.d_sae, self.num_rows + other.num_rows)
        both.fired, both.total = self.fired + other.fired, self.total + other.total
        both.peak = torch.maximum(self.peak, other.peak)
        return both

    def alive_share(self) -> float:
        """Share of latents that fired at least once."""
        return float((self.fired > 0).double().mean())

    def l0(self) -> float:
        """Mean number of latents that fire on a row."""
        return float(self.fired.sum()) / max(1, self.num_rows)

    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of rows on which each latent fires."""
        return self.fired.double() / max(1, self.num_rows)

    def density_histogram(self, decades: int = 6, bins_per_decade: int = 4) -> tuple[list[float], list[int]]:
        """Edges in log10(density), from -decades to 0, and alive latents between them; rarer ones are in the first bin."""
        edges = torch.linspace(-decades, 0, decades * bins_per_decade + 1, dtype=torch.float64)
        logs = self.density()[self.fired > 0].log10().clamp(-decades, 0)
        counts = torch.histogram(logs, edges).hist if len(logs) else torch.zeros(len(edges) - 1)
        return edges.tolist(), [int(count) for count in counts]


class Measured(NamedTuple):
    """Quality on held-out rows; `fvu` and `cosine` are None without rows to measure on."""

    fvu: float | None
    counts: LatentCounts
    cosine: float | None


def measure(
    sae: Sae,
    h_ND: Float[Tensor, "rows d_in"],
    device: torch.device | str = "cpu",
    chunk: int | None = None,
    prepare: Prepare | None = None,
) -> Measured:
    """FVU, cosine and firing counts on residual vectors, `chunk` rows at a time, of what the SAE takes of them unless `prepare` says what."""
    prepare = prepare or sae.rows_of
    unexplained, counts, cosines = VarianceUnexplained(sae.d_in), LatentCounts(sae.d_sae), 0.0
    with torch.no_grad():
        for part in h_ND.split(chunk or max(1, _PRE_ACTS_AT_ONCE // sae.d_sae)):
            x = prepare(part.to(device))
            codes = sae(x)
            x_hat = sae.decode(codes)
            unexplained.add(x, x_hat)
            counts.add(codes)
            cosines += float(cosine(x_hat, x).double().sum())
    return Measured(unexplained.value(), counts, cosines / counts.num_rows if counts.num_rows else None)


def pca_fvu(train_ND: Float[Tensor, "rows d_in"], unseen_MD: Float[Tensor, "unseen d_in"], rank: int) -> float | None:
    """FVU on unseen rows of the mean and the first `rank` principal components of training rows; None without rows on either side."""
    if not len(train_ND) or not len(unseen_MD):
        return None
    mean_D = train_ND.double().mean(0)
    covariance_DD = torch.cov(train_ND.double().T, correction=0)
    axes_DR = torch.linalg.eigh(covariance_DD).eigenvectors[:, -rank:]
    unexplained = VarianceUnexplained(train_ND.shape[1])
    unexplained.add(unseen_MD, mean_D + (unseen_MD.double() - mean_D) @ axes_DR @ axes_DR.T)
    return unexplained.value()


def quality_metrics(quality: Measured) -> dict[str, float]:
    """The measured quality under the names that MLflow shows."""
    found = {} if quality.fvu is None else {"fvu": quality.fvu, "explained_variance": 1 - quality.fvu}
    if quality.cosine is not None:
        found["cosine"] = quality.cosine
    alive = quality.counts.alive_share()
    return {**found, "l0": quality.counts.l0(), "alive_share": alive, "dead_fraction": 1 - alive}


def count_latents(sae: Sae, parts: Iterable[Float[torch.Tensor, "rows d_in"]]) -> LatentCounts:
    """Counts over parts of rows, as `Sae.rows_of` makes them."""
    counts = LatentCounts(sae.d_sae)
    with torch.no_grad():
        for x_ND in parts:
            counts.add(sae(x_ND))
    return counts

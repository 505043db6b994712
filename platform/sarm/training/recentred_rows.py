"""Rows of turn ends, standardised and moved to where the reward is read.

N rows, D d_in, K kinds of ends. The residual at the rewarded token is nearly constant: of its squared norm only a few hundredths are
variance. Ends behind other sentences, or of other texts, vary alike about another constant. Each kind of a stream is moved to the mean of
the true ends, so that no latent has to tell the kinds apart (and then fires on every answer).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sarm.contracts.tables import KINDS, TRUE_END
from sarm.data.store.activations import ActivationStore
from sarm.data.store.shuffled_rows import RowsOfGroups, ShuffledRows
from sarm.nn.sae import standardise

_ROWS_AT_ONCE = 4096


def kind_means(sources: Sequence[ShuffledRows]) -> Float[Tensor, "kinds d_in"]:
    """Mean of each kind's standardised training rows, in float64, over the first windows of all sources; NaN for a kind that has none there."""
    total = torch.zeros(len(KINDS), sources[0].heldout.shape[1], dtype=torch.float64)
    number = torch.zeros(len(KINDS), dtype=torch.float64)
    for rows in sources:
        window = next(iter(rows.windows(0, 0)))
        for places in torch.arange(len(window)).split(_ROWS_AT_ONCE):
            kinds = window.kinds_at(places)
            total.index_add_(0, kinds, standardise(window[places]).double().cpu())
            number.index_add_(0, kinds, torch.ones(len(places), dtype=torch.float64))
    return total / number[:, None]


@dataclass(frozen=True)
class Recentred:
    """One stream. `shift` [K, D] is what its kinds are moved by, in standardised units."""

    rows: ShuffledRows
    shift: Float[Tensor, "kinds d_in"]

    @property
    def num_rows(self) -> int:
        return self.rows.num_rows

    def window_sizes(self, seed: int, epoch: int) -> list[int]:
        """As those of the stream's own rows."""
        return self.rows.window_sizes(seed, epoch)

    def windows(self, seed: int, epoch: int, first: int = 0) -> Iterator["_RecentredWindow"]:
        """The stream's windows, standardised and moved."""
        return (_RecentredWindow(window, self.shift) for window in self.rows.windows(seed, epoch, first))

    def heldout(self) -> Float[Tensor, "rows d_in"]:
        """The rows that are never trained on, standardised and moved."""
        return moved(self.rows.heldout, self.rows.heldout_kinds.long(), self.shift)

    def heldout_true_ends(self) -> Float[Tensor, "rows d_in"]:
        """Those of them that the reward is read at."""
        return self.heldout()[self.rows.heldout_kinds == KINDS.index(TRUE_END)]

    def true_ends(self, num_rows: int) -> Float[Tensor, "rows d_in"]:
        """Up to `num_rows` true ends of the first window, standardised and moved."""
        window = next(iter(self.rows.windows(0, 0)))
        every = torch.arange(len(window))
        return _RecentredWindow(window, self.shift)[every[window.kinds_at(every) == KINDS.index(TRUE_END)][:num_rows]]


def recentred(rows: ShuffledRows, means_KD: Float[Tensor, "kinds d_in"], centre_D: Float[Tensor, " d_in"]) -> Recentred:
    """The stream with the means of its kinds moved to `centre_D`; a kind without training rows stays where it is."""
    return Recentred(rows, (centre_D - means_KD).nan_to_num(0.0).float())


@dataclass(frozen=True)
class _RecentredWindow:
    window: RowsOfGroups
    shift: Float[Tensor, "kinds d_in"]

    def __len__(self) -> int:
        return len(self.window)

    def __getitem__(self, places: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_in"]:
        return moved(self.window[places], self.window.kinds_at(places), self.shift)


def moved_store(
    store: ActivationStore, shift_KD: Float[Tensor, "kinds d_in"], share: slice = slice(None)
) -> Iterator[Float[Tensor, "rows d_in"]]:
    """All rows of a store that can be standardised, moved, row group after row group; those of the row groups in `share`."""
    for kinds_N, h_ND in store.usable_kinds(share):
        yield moved(h_ND, kinds_N, shift_KD)


def moved(
    h_ND: Float[Tensor, "rows d_in"], kinds_N: Int[Tensor, " rows"], shift_KD: Float[Tensor, "kinds d_in"]
) -> Float[Tensor, "rows d_in"]:
    """Residual vectors, standardised and then moved by what belongs to their kinds."""
    x_ND = standardise(h_ND)
    return x_ND + shift_KD.to(x_ND)[kinds_N.to(x_ND.device)]

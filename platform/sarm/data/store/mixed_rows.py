"""Training rows of several streams dealt out in fixed shares; a stream that is used up begins again, in another order.

N rows, D d_in. Every window has the same number of rows of each stream (the last one what is left), so that where a window begins
follows from its number alone, and a training can be taken up again at any row as with `ShuffledRows`.
"""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sarm.data.store.shuffled_rows import Cursor, Rows, batches

# Between the seeds of two streams, as an epoch's order follows from the sum of seed and epoch.
_SEED_STEP = 1_000_003
_ENDLESS = 1 << 62
_LEAST_WINDOW_ROWS, _CHUNK_ROWS = 16_384, 1_024


class SizedRows(Rows, Protocol):
    """Rows that tell the sizes of their windows without reading them."""

    def window_sizes(self, seed: int, epoch: int) -> list[int]: ...


class Stream(NamedTuple):
    """One source of rows and its share of what is dealt out."""

    rows: SizedRows
    share: float


class MixedRows:
    """`num_rows` rows of the streams in their shares; a window holds whole batches, and is in memory in float32.

    Raises ValueError unless the shares are positive and add up to 1.
    """

    def __init__(self, streams: Sequence[Stream], num_rows: int, batch_size: int):
        if not streams or min(s.share for s in streams) <= 0 or not math.isclose(sum(s.share for s in streams), 1.0):
            raise ValueError(f"expected positive shares that add up to 1, got {[s.share for s in streams]}")
        self.num_rows = num_rows
        self._streams = list(streams)
        self._window_rows = batch_size * math.ceil(_LEAST_WINDOW_ROWS / batch_size)

    def windows(self, seed: int, epoch: int, first: int = 0) -> Iterator[Float[Tensor, "rows d_in"]]:
        """The windows of an epoch: there is one epoch, whose rows are all that there are. Raises ValueError for another."""
        if epoch != 0:
            raise ValueError(f"a mixture has one epoch, got {epoch}")
        begun = quotas(self._shares, self._window_rows)
        walks = [_Walk(s.rows, seed + n * _SEED_STEP, first * begun[n]) for n, s in enumerate(self._streams)]
        for start in range(first * self._window_rows, self.num_rows, self._window_rows):
            size = min(self._window_rows, self.num_rows - start)
            yield torch.cat([walk.take(quota) for walk, quota in zip(walks, quotas(self._shares, size), strict=True)])

    def passes(self) -> list[float]:
        """How often each stream's rows are seen."""
        whole, rest = divmod(self.num_rows, self._window_rows)
        dealt = [
            whole * full + last
            for full, last in zip(quotas(self._shares, self._window_rows), quotas(self._shares, rest), strict=True)
        ]
        return [number / s.rows.num_rows for number, s in zip(dealt, self._streams, strict=True)]

    @property
    def _shares(self) -> list[float]:
        return [s.share for s in self._streams]


def quotas(shares: Sequence[float], num_rows: int) -> list[int]:
    """Whole numbers in these shares that add up to `num_rows`, by largest remainders; ties go to the first."""
    exact = [share * num_rows for share in shares]
    found = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda n: found[n] - exact[n])
    for n in by_remainder[: num_rows - sum(found)]:
        found[n] += 1
    return found


class _Walk:
    """The rows of one stream, epoch after epoch, from the one after the first `taken` on."""

    def __init__(self, rows: SizedRows, seed: int, taken: int):
        epoch, offset = divmod(taken, rows.num_rows)
        ends = list(itertools.accumulate(rows.window_sizes(seed, epoch)))
        window = bisect.bisect_right(ends, offset)
        offset -= ends[window - 1] if window else 0
        self._chunks = batches(rows, Cursor(seed, epoch, window, offset), _ENDLESS, _CHUNK_ROWS)
        self._left: list[Tensor] = []

    def take(self, num_rows: int) -> Float[Tensor, "rows d_in"]:
        while sum(map(len, self._left)) < num_rows or not self._left:
            self._left.append(next(self._chunks).rows)
        rows_ND = torch.cat(self._left)
        self._left = [rows_ND[num_rows:]]
        return rows_ND[:num_rows]

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
from jaxtyping import Float, Int
from torch import Tensor

from sarm.data.store.shuffled_rows import Cursor, Rows, Window, places

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
    """`num_rows` rows of the streams in their shares; a window holds whole batches, whose rows are read when they are asked for.

    Raises ValueError unless the shares are positive and add up to 1.
    """

    def __init__(self, streams: Sequence[Stream], num_rows: int, batch_size: int):
        if not streams or min(s.share for s in streams) <= 0 or not math.isclose(sum(s.share for s in streams), 1.0):
            raise ValueError(f"expected positive shares that add up to 1, got {[s.share for s in streams]}")
        self.num_rows = num_rows
        self._streams = list(streams)
        self._window_rows = batch_size * math.ceil(_LEAST_WINDOW_ROWS / batch_size)

    def windows(self, seed: int, epoch: int, first: int = 0) -> Iterator["MixedWindow"]:
        """The windows of an epoch: there is one epoch, whose rows are all that there are. Raises ValueError for another."""
        if epoch != 0:
            raise ValueError(f"a mixture has one epoch, got {epoch}")
        begun = quotas(self._shares, self._window_rows)
        walks = [_Walk(s.rows, seed + n * _SEED_STEP, first * begun[n]) for n, s in enumerate(self._streams)]
        for start in range(first * self._window_rows, self.num_rows, self._window_rows):
            size = min(self._window_rows, self.num_rows - start)
            dealt = zip(walks, quotas(self._shares, size), strict=True)
            yield MixedWindow([part for walk, quota in dealt for part in walk.take(quota)])

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
        self._chunks = places(rows, Cursor(seed, epoch, window, offset), _ENDLESS, _CHUNK_ROWS)
        self._left: _Part | None = None

    def take(self, num_rows: int) -> list["_Part"]:
        """Where the next rows are."""
        parts: list[_Part] = []
        while num_rows:
            if self._left is None:
                window, chosen, _ = next(self._chunks)
                self._left = _Part(window, chosen)
            window, chosen = self._left
            parts.append(_Part(window, chosen[:num_rows]))
            self._left = _Part(window, chosen[num_rows:]) if len(chosen) > num_rows else None
            num_rows -= len(parts[-1].places)
        return parts


class _Part(NamedTuple):
    """Some rows of a stream's window."""

    window: Window
    places: Int[Tensor, " rows"]


class MixedWindow:
    """Rows of several windows one after the other; a worker that asks for its own alone reads no others."""

    def __init__(self, parts: Sequence[_Part]):
        # Fewer and larger: a batch is read part by part.
        together = itertools.groupby(parts, key=lambda part: id(part.window))
        self._parts = [_joined(list(own)) for _, own in together]
        sizes = torch.tensor([len(part.places) for part in self._parts], dtype=torch.int64)
        self._ends = sizes.cumsum(0)
        self._starts = self._ends - sizes

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def __getitem__(self, places: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_in"]:
        part_B = torch.bucketize(places.contiguous(), self._ends, right=True)
        # Rows of one part together, and then back in the order that was asked for.
        order_B = torch.argsort(part_B, stable=True)
        sizes = torch.bincount(part_B, minlength=len(self._parts)).tolist()
        found = [
            part.window[part.places[places[here] - start]]
            for part, start, here in zip(self._parts, self._starts, order_B.split(sizes), strict=True)
            if len(here)
        ]
        if not found:
            # A worker beyond the last rows of a short batch.
            return self._parts[0].window[self._parts[0].places[:0]]
        rows_BD = torch.cat(found)
        return rows_BD[torch.argsort(order_B).to(rows_BD.device)]


def _joined(parts: Sequence[_Part]) -> _Part:
    return _Part(parts[0].window, torch.cat([part.places for part in parts]))

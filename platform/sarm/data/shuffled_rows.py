"""Training rows of an activations/v1 folder in a random order that can be taken up again at any row.

N rows, D d_in. An epoch takes the row groups in random order, cuts them into windows of about `window_rows`, and takes the rows
of a window in random order. The order follows from store, seed and `window_rows` alone: neither from memory nor from workers,
who all walk the same batches and take every world-th row of each.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from sarm.config import UserError
from sarm.data.activations import ActivationStore, unusable_rows, vectors
from sarm.schema import hash_share

# Of the memory that is free, as rows are not all that a worker holds.
_MEMORY_SHARE = 0.5
_CGROUP = Path("/sys/fs/cgroup")


class Cursor(NamedTuple):
    """A place in the data: rows before it are used up. Four integers, whatever the store's size and the number of workers."""

    seed: int
    epoch: int = 0
    window: int = 0
    offset: int = 0


class Batch(NamedTuple):
    """One worker's rows of a step, in float32; the step's rows over all workers; and the place behind the step."""

    x: Float[Tensor, "rows d_in"]
    size: int
    after: Cursor


class _Group(NamedTuple):
    """A row group with training rows: where it is stored, which of its rows are trained on, where they begin in memory."""

    file: Path
    number: int
    kept: Tensor
    num_kept: int
    start: int


class ShuffledRows:
    """The rows of a store that are trained on.

    Rows whose document hashes below `heldout_share` are left out; at most `max_heldout` of them are in `heldout`. Rows that
    cannot be standardised (NaN, infinite, constant) are left out of both; their ids are in `rejected`, by reason. The store is
    read once to verify it, and kept in 16 bits on `device` where it fits into `memory_bytes`, else read again window by window.

    Raises UserError if a page is damaged or no row is left.
    """

    def __init__(
        self,
        store: ActivationStore,
        heldout_share: float,
        window_rows: int = 1_000_000,
        max_heldout: int = 16_384,
        memory_bytes: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self._store, self._share, self._window_rows = store, heldout_share, window_rows
        budget = free_memory(device) * _MEMORY_SHARE if memory_bytes is None else memory_bytes
        self.is_in_memory = store.num_rows * 2 * store.d_in <= budget
        self._rows: Tensor | None = None
        if self.is_in_memory:
            self._rows = torch.empty(store.num_rows, store.d_in, dtype=store.torch_dtype, device=device)
        self.num_rows = 0
        self.rejected: dict[str, list[int]] = {}
        self._groups: list[_Group] = []
        heldout = [torch.empty(0, store.d_in)]
        for file, number, table in store.row_groups(["row_id", "doc_id", "activation"]):
            rows = vectors(table, store.metadata["dtype"])
            is_heldout = self._is_heldout(table)
            kept = ~is_heldout
            for reason, is_bad in unusable_rows(rows).items():
                if bool(is_bad.any()):
                    ids = table.filter(pa.array(is_bad.numpy())).column("row_id").to_pylist()
                    self.rejected.setdefault(reason, []).extend(ids)
                    kept, is_heldout = kept & ~is_bad, is_heldout & ~is_bad
            if missing := max_heldout - sum(map(len, heldout)):
                heldout.append(rows[is_heldout][:missing].float())
            if num_kept := int(kept.sum()):
                self._groups.append(_Group(file, number, kept, num_kept, self.num_rows))
                if self._rows is not None:
                    self._rows[self.num_rows : self.num_rows + num_kept] = rows[kept].to(device)
                self.num_rows += num_kept
        if self.num_rows == 0:
            bad = f", {self.num_rejected} of them because they are constant, NaN or infinite" if self.rejected else ""
            raise UserError(
                f"all activations of {store.folder} are held out{bad}: they come from too few documents. Add sources."
            )
        self.heldout = torch.cat(heldout)

    @property
    def num_rejected(self) -> int:
        """Rows left out because they cannot be standardised."""
        return sum(map(len, self.rejected.values()))

    def batches(self, start: Cursor, epochs: int, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches from `start` to the end of the last of `epochs`, `batch_size` rows each but for a window's last."""
        epoch, number, offset = start.epoch, start.window, start.offset
        windows = [(e, n) for e in range(epoch, epochs) for n in range(len(self._windows(start.seed, e)))]
        windows = [place for place in windows if place >= (epoch, number)]
        for (epoch, number), (rows, places) in zip(windows, self._ahead(start.seed, windows), strict=True):
            order = torch.randperm(
                len(places), generator=torch.Generator().manual_seed(_seed(start.seed, epoch, number))
            )
            for first in range(offset, len(order), batch_size):
                chosen = places[order[first : first + batch_size]]
                x = rows.index_select(0, chosen[rank::world].to(rows.device)).float()
                after = Cursor(start.seed, epoch, number, first + len(chosen))
                if after.offset == len(order):
                    is_last = number + 1 == len(self._windows(start.seed, epoch))
                    after = Cursor(start.seed, epoch + 1) if is_last else Cursor(start.seed, epoch, number + 1)
                yield Batch(x, len(chosen), after)
            offset = 0

    def rows_before(self, place: Cursor) -> int:
        """How many rows are used up at `place`."""
        windows = self._windows(place.seed, place.epoch)[: place.window]
        return place.epoch * self.num_rows + sum(g.num_kept for window in windows for g in window) + place.offset

    def sample(self, seed: int, num_rows: int) -> Float[Tensor, "rows d_in"]:
        """Some of the first window's rows in float32, neighbours beside each other, for initialising."""
        rows, places = self._read(self._windows(seed, 0)[0])
        return rows.index_select(0, places[:num_rows].to(rows.device)).float().cpu()

    def _windows(self, seed: int, epoch: int) -> list[list[_Group]]:
        """The row groups of each window of an epoch; in stored order where one window holds the whole store."""
        if self._store.num_rows <= self._window_rows:
            return [self._groups]
        windows: list[list[_Group]] = [[]]
        size = 0
        for i in np.random.default_rng([seed, epoch]).permutation(len(self._groups)):
            if size >= self._window_rows:
                windows.append([])
                size = 0
            windows[-1].append(self._groups[i])
            size += self._groups[i].num_kept
        return windows

    def _ahead(self, seed: int, places: list[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The windows' rows, each read while the one before it is trained on."""
        with ThreadPoolExecutor(1) as reader:
            coming = None
            for epoch, number in places:
                submitted = reader.submit(self._read, self._windows(seed, epoch)[number])
                if coming is not None:
                    yield coming.result()
                coming = submitted
            if coming is not None:
                yield coming.result()

    def _read(self, window: list[_Group]) -> tuple[Tensor, Tensor]:
        """16-bit rows, and the places among them of the window's training rows in stored order."""
        if self._rows is not None:
            return self._rows, torch.cat([torch.arange(g.start, g.start + g.num_kept) for g in window])
        rows = torch.empty(sum(g.num_kept for g in window), self._store.d_in, dtype=self._store.torch_dtype)
        first = 0
        for group in window:
            table = self._store.row_group(group.file, group.number, ["activation"])
            rows[first : first + group.num_kept] = vectors(table, self._store.metadata["dtype"])[group.kept]
            first += group.num_kept
        return rows, torch.arange(len(rows))

    def _is_heldout(self, table: pa.Table) -> Tensor:
        # With a salt: training prompts are those that the unsalted hash left over. A document's rows follow each other.
        documents = table.column("doc_id").combine_chunks().dictionary_encode()
        shares = [hash_share(f"sae:{document}") < self._share for document in documents.dictionary.to_pylist()]
        return torch.tensor(shares, dtype=torch.bool)[torch.from_numpy(documents.indices.to_numpy().astype(np.int64))]


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that this process may still take on the device, as far as the machine or its container tells."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


def _seed(seed: int, epoch: int, window: int) -> int:
    return seed + epoch + (window << 32)

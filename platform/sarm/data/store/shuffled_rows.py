"""Training rows of an activations/v1 folder in a random order that can be taken up again at any row.

N rows, D d_in. An epoch takes the row groups in random order, cuts them into windows of about `window_rows`, and takes the rows
of a window in random order. The order follows from store, seed and `window_rows` alone: neither from memory nor from workers,
who all walk the same batches and take every world-th row of each.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import psutil
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from sarm.data.store.activations import ActivationStore, kinds_of, vectors
from sarm.data.store.looked_groups import Workers, look
from sarm.settings.checks import UserError

# Of the memory that is free, as rows are not all that a worker holds.
_MEMORY_SHARE = 0.5
_CGROUP = Path("/sys/fs/cgroup")


class Cursor(NamedTuple):
    """A place in the data: rows before it are used up. Four integers, whatever the store's size and the number of workers."""

    seed: int
    epoch: int = 0
    window: int = 0
    offset: int = 0


@runtime_checkable
class Window(Protocol):
    """Rows that are shuffled among each other: a tensor is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_in"]: ...


@runtime_checkable
class Rows(Protocol):
    """Training rows in windows, from window `first` of the epoch on; which rows are where follows from (seed, epoch)."""

    @property
    def num_rows(self) -> int: ...

    def windows(self, seed: int, epoch: int, first: int = 0) -> Iterator[Window]: ...


class Batch(NamedTuple):
    """The rows of a step that a worker asked for, how many there are for all workers, and the place behind them."""

    rows: Float[Tensor, "batch d_in"]
    num_all_rows: int
    after: Cursor


def batches(
    rows: Rows,
    start: Cursor,
    epochs: int,
    batch_size: int,
    share: slice = slice(None),
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """The batches from `start` to the end of the last epoch; no batch reaches across windows.

    Of each, the rows in `share` are read and no others, on `device`.
    """
    for window, chosen, after in places(rows, start, epochs, batch_size):
        yield Batch(_on_device(window, chosen[share], torch.device(device)), len(chosen), after)


def places(
    rows: Rows, start: Cursor, epochs: int, batch_size: int
) -> Iterator[tuple[Window, Int[Tensor, " batch"], Cursor]]:
    """Of each batch from `start` to the end of the last epoch: its window, which of the window's rows it has, and the place behind them."""
    place = start
    while place.epoch < epochs:
        for window in rows.windows(place.seed, place.epoch, place.window):
            # Of its own, so that a window can be taken up without those before it.
            generator = torch.Generator().manual_seed(place.seed + place.epoch + (place.window << 32))
            order = torch.randperm(len(window), generator=generator)
            while place.offset < len(order):
                chosen = order[place.offset : place.offset + batch_size]
                place = place._replace(offset=place.offset + len(chosen))
                yield window, chosen, place
            place = place._replace(window=place.window + 1, offset=0)
        place = Cursor(place.seed, place.epoch + 1)


def _on_device(window: Window, places: Int[Tensor, " batch"], device: torch.device) -> Float[Tensor, "batch d_in"]:
    if not isinstance(window, RowsOfGroups):
        return window[places].to(device)
    rows = window.stored(places)
    if device.type == "cuda" and rows.device.type == "cpu":
        # Half the bytes of float32, from memory that the card copies by itself.
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True).float()


class _Group(NamedTuple):
    """A row group with training rows: where it is stored, which of its rows are trained on, where they begin in memory."""

    file: Path
    number: int
    kept: Bool[Tensor, " rows"]
    num_kept: int
    start: int


@dataclass(frozen=True)
class RowsOfGroups:
    """16-bit rows, and where among them the training rows of a window's groups are; float32 once asked for."""

    rows: Float[Tensor, "rows d_in"]
    kinds: UInt8[Tensor, " rows"]
    places: Int[Tensor, " places"]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, places: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_in"]:
        return self.stored(places).float()

    def stored(self, places: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_in"]:
        """The rows in 16 bits."""
        return self.rows.index_select(0, self.places[places].to(self.rows.device))

    def kinds_at(self, places: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Which of `KINDS` each row is, by number; 0 where the store does not say."""
        return self.kinds[self.places[places]].long()


class ShuffledRows:
    """The rows of a store that are trained on.

    Rows whose document hashes below `heldout_share` are left out; at most `max_heldout` of them are in `heldout`. Rows that
    cannot be standardised (NaN, infinite, constant) are left out of both; their ids are in `rejected`, by reason. The store is
    verified once, each of the `workers` reading its share, and kept in 16 bits on `device` where it fits into `memory_bytes`, else read
    again window by window.

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
        workers: Workers = Workers(),
    ):
        self._store, self._share, self._window_rows = store, heldout_share, window_rows
        budget = memory_for_rows(device) if memory_bytes is None else memory_bytes
        self.is_in_memory = store.num_rows * 2 * store.d_in <= budget
        self._rows: Tensor | None = None
        self._kinds = torch.zeros(store.num_rows if self.is_in_memory else 0, dtype=torch.uint8)
        if self.is_in_memory:
            self._rows = torch.empty(store.num_rows, store.d_in, dtype=store.torch_dtype, device=device)
        self.num_rows = self._num_held = 0
        self.rejected: dict[str, list[int]] = {}
        self._groups: list[_Group] = []
        self._columns = ["activation", *(["kind"] if store.has_kinds else [])]
        looked = look(store, self._columns, heldout_share, max_heldout, workers, self._hold)
        for file, number, kept, rejected, _ in looked.groups:
            for reason, ids in rejected.items():
                self.rejected.setdefault(reason, []).extend(ids)
            if num_kept := int(kept.sum()):
                self._groups.append(_Group(file=file, number=number, kept=kept, num_kept=num_kept, start=self.num_rows))
                self.num_rows += num_kept
        if self.num_rows == 0:
            bad = f", {self.num_rejected} of them because they are constant, NaN or infinite" if self.rejected else ""
            raise UserError(
                f"all activations of {store.folder} are held out{bad}: they come from too few documents. Add sources."
            )
        if workers.world > 1 and self._rows is not None:
            for group in self._groups:
                table = store.row_group(group.file, group.number, self._columns)
                self._hold(vectors(table, store.metadata["dtype"])[group.kept], kinds_of(table)[group.kept])
        self.heldout, self.heldout_kinds = looked.heldout, looked.heldout_kinds

    @property
    def num_rejected(self) -> int:
        """Rows left out because they cannot be standardised."""
        return sum(map(len, self.rejected.values()))

    def window_sizes(self, seed: int, epoch: int) -> list[int]:
        """Rows of each window of an epoch, without reading any."""
        return [sum(group.num_kept for group in groups) for groups in self._plan(seed, epoch)]

    def windows(self, seed: int, epoch: int, first: int = 0) -> Iterator[RowsOfGroups]:
        """The windows of an epoch, each read while the one before it is trained on."""
        with ThreadPoolExecutor(1) as reader:
            coming = None
            for groups in self._plan(seed, epoch)[first:]:
                submitted = reader.submit(self._read, groups)
                if coming is not None:
                    yield coming.result()
                coming = submitted
            if coming is not None:
                yield coming.result()

    def sample(self, seed: int, num_rows: int) -> Float[Tensor, "rows d_in"]:
        """Some of the first window's rows in stored order, for initialising."""
        window = self._read(self._plan(seed, 0)[0])
        return window[torch.arange(min(num_rows, len(window)))].cpu()

    def _plan(self, seed: int, epoch: int) -> list[list[_Group]]:
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

    def _read(self, groups: list[_Group]) -> RowsOfGroups:
        if self._rows is not None:
            places = torch.cat([torch.arange(g.start, g.start + g.num_kept) for g in groups])
            return RowsOfGroups(self._rows, self._kinds, places)
        size = sum(g.num_kept for g in groups)
        rows = torch.empty(size, self._store.d_in, dtype=self._store.torch_dtype)
        kinds = torch.empty(size, dtype=torch.uint8)
        first = 0
        for group in groups:
            table, here = self._store.row_group(group.file, group.number, self._columns), slice(first, first + group.num_kept)  # fmt: skip
            rows[here] = vectors(table, self._store.metadata["dtype"])[group.kept]
            kinds[here] = kinds_of(table)[group.kept]
            first += group.num_kept
        return RowsOfGroups(rows, kinds, torch.arange(size))

    def _hold(self, rows: Tensor, kinds: Tensor) -> None:
        """Put the next training rows into memory, where the store is held there."""
        if self._rows is None:
            return
        here = slice(self._num_held, self._num_held + len(rows))
        self._rows[here], self._kinds[here] = rows.to(self._rows.device), kinds
        self._num_held += len(rows)


def memory_for_rows(device: torch.device | str = "cpu", num_sharing: int = 1) -> int:
    """Bytes of the device that each of `num_sharing` processes may fill with rows."""
    return int(free_memory(device) * _MEMORY_SHARE / num_sharing)


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that this process may still take on the device, as far as the machine or its container tells."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free: int = psutil.virtual_memory().available
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return free

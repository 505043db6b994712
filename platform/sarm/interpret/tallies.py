"""What is kept of each latent while activations stream past: bounded arrays, the same whatever the order and the sharing out.

S latents, N units (a place of a text, seen by num_chosen + num_rejected + num_text readers of it), A active latents of all units.

Nothing here depends on order: counts and sums are integers (activations in steps of 2^-24, so that adding is associative), the
strongest texts are the first by (-activation, key), and a sample of texts is the first by key, a hash of the text. A text counts
once in both, with its strongest activation, then its first reference. What is dropped has enough better texts in every whole
that its part belongs to, so tallies of parts merge into the tally of the whole.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt64
from numpy.typing import NDArray

from sarm.contracts.tables import ACTIVATION_EDGES

SIDES = ("chosen", "rejected", "text")
# Steps of a sum: exact for float32 from 1 up, and room for 5e11 in total.
_STEPS = 2.0**24
_EDGES = np.array(ACTIVATION_EDGES, np.float32)
NUM_BINS = len(_EDGES) - 1
# Entries that may wait to be sorted in: some 15 MB.
_MAX_WAITING = 1 << 19


class Units(NamedTuple):
    """Places of texts with the latents that are active there, flat: `offset[n]` to `offset[n + 1]` belong to unit n."""

    ref: Int64[NDArray[np.int64], " units"]
    """Where the text can be found again."""
    key: UInt64[NDArray[np.uint64], " units"]
    """Hash of the text that a reader would be shown."""
    readers: Int64[NDArray[np.int64], "units sides"]
    """[N, 3]: how many chosen answers, rejected answers and plain texts it stands for."""
    offset: Int64[NDArray[np.int64], " offsets"]
    latent: Int64[NDArray[np.int64], " entries"]
    value: Float32[NDArray[np.float32], " entries"]


class Kept(NamedTuple):
    """Entries of some latents, flat and in order of rank within a latent."""

    latent: Int64[NDArray[np.int64], " entries"]
    key: UInt64[NDArray[np.uint64], " entries"]
    ref: Int64[NDArray[np.int64], " entries"]
    value: Float32[NDArray[np.float32], " entries"]

    def take(self, which: Bool[NDArray[np.bool_], " which"] | Int64[NDArray[np.int64], " which"]) -> "Kept":
        """Some of the entries."""
        return Kept(self.latent[which], self.key[which], self.ref[which], self.value[which])


def joined(parts: Sequence[Kept]) -> Kept:
    """The entries of all parts."""
    return Kept(
        np.concatenate([part.latent for part in parts]),
        np.concatenate([part.key for part in parts]),
        np.concatenate([part.ref for part in parts]),
        np.concatenate([part.value for part in parts]),
    )


class Slots:
    """The first `num_slots` distinct texts of each latent, by strength or by key."""

    def __init__(self, num_latents: int, num_slots: int, *, by_strength: bool):
        self._by_strength, self._num_slots = by_strength, num_slots
        # Zeros that the system hands out on first touch: latents that never fire cost nothing.
        self._key = np.zeros((num_latents, num_slots), np.uint64)
        self._ref = np.zeros((num_latents, num_slots), np.int64)
        self._value = np.zeros((num_latents, num_slots), np.float32)
        self._used = np.zeros(num_latents, np.int32)
        self._waiting: list[Kept] = []

    def add(self, new: Kept) -> None:
        """Keep what of these entries is among the first of its latent."""
        if self._num_slots == 0:
            return
        last = self._num_slots - 1
        is_full = self._used[new.latent] > last
        if self._by_strength:
            may_enter = ~is_full | (new.value >= self._value[new.latent, last])
        else:
            may_enter = ~is_full | (new.key <= self._key[new.latent, last])
        self._waiting.append(new.take(may_enter))
        # Sorting in costs as much as all that is kept: it is done for many entries at once.
        if sum(len(one.latent) for one in self._waiting) >= _MAX_WAITING:
            self._sort_in()

    def _sort_in(self) -> None:
        new = joined(self._waiting) if self._waiting else None
        self._waiting = []
        if new is None or not len(new.latent):
            return
        touched = np.unique(new.latent)
        first = self._first(self._distinct(joined([self._of(touched), new])))
        rank = place_in_run(first.latent)
        self._key[first.latent, rank] = first.key
        self._ref[first.latent, rank] = first.ref
        self._value[first.latent, rank] = first.value
        self._used[touched] = np.bincount(first.latent, minlength=len(self._used))[touched]

    def all(self) -> Kept:
        """Every entry, by latent and rank."""
        self._sort_in()
        return self._of(np.flatnonzero(self._used))

    def _of(self, latents: Int64[NDArray[np.int64], " latents"]) -> Kept:
        used = self._used[latents]
        latent = np.repeat(latents, used)
        rank = place_in_run(latent)
        return Kept(latent, self._key[latent, rank], self._ref[latent, rank], self._value[latent, rank])

    def _distinct(self, entries: Kept) -> Kept:
        order = np.lexsort((entries.ref, -entries.value, entries.key, entries.latent))
        entries = entries.take(order)
        is_first = np.ones(len(order), bool)
        is_first[1:] = (np.diff(entries.latent) != 0) | (entries.key[1:] != entries.key[:-1])
        return entries.take(is_first)

    def _first(self, entries: Kept) -> Kept:
        if self._by_strength:
            order = np.lexsort((entries.key, -entries.value, entries.latent))
            entries = entries.take(order)
        return entries.take(place_in_run(entries.latent) < self._num_slots)


class Tally:
    """What one place ("sentence", "rewarded") has seen so far."""

    def __init__(self, num_latents: int, num_top: int, num_sampled: int):
        self.num_latents, self.num_top, self.num_sampled = num_latents, num_top, num_sampled
        self.total = np.zeros(len(SIDES), np.int64)
        self.count = np.zeros((len(SIDES), num_latents), np.int64)
        self.histogram = np.zeros((len(SIDES), num_latents, NUM_BINS), np.int64)
        self._sum = np.zeros((len(SIDES), num_latents), np.int64)
        self.top = Slots(num_latents, num_top, by_strength=True)
        self.sample = Slots(num_latents, num_sampled, by_strength=False)

    def add(self, units: Units) -> None:
        """Count these units."""
        self.total += units.readers.sum(0)
        unit = np.repeat(np.arange(len(units.ref)), np.diff(units.offset))
        # Only latents that raise what they are part of count as firing; TopK fills its slots with zeros.
        is_on = units.value > 0
        unit, latent, value = unit[is_on], units.latent[is_on], units.value[is_on]
        steps = np.rint(value.astype(np.float64) * _STEPS).astype(np.int64)
        bins = np.clip(np.searchsorted(_EDGES, value, side="right") - 1, 0, NUM_BINS - 1)
        for side in range(len(SIDES)):
            readers = units.readers[unit, side]
            seen = readers > 0
            if seen.any():
                np.add.at(self.count[side], latent[seen], readers[seen])
                np.add.at(self._sum[side], latent[seen], steps[seen] * readers[seen])
                np.add.at(self.histogram[side], (latent[seen], bins[seen]), readers[seen])
        entries = Kept(latent, units.key[unit], units.ref[unit], value)
        self.top.add(entries)
        self.sample.add(entries)

    def merge(self, other: "Tally") -> None:
        """As if what `other` has seen had been added here."""
        self.total += other.total
        self.count += other.count
        self._sum += other._sum
        self.histogram += other.histogram
        self.top.add(other.top.all())
        self.sample.add(other.sample.all())

    def sums(self) -> Float64[NDArray[np.float64], "sides latents"]:
        """Sum of positive activations of each side and latent, [3, S]."""
        return self._sum / _STEPS


def sampled_deciles(sample: Kept) -> Int64[NDArray[np.int64], " entries"]:
    """Tenth of its latent's sampled activations that each entry lies in, 1 to 10 (the strongest)."""
    order = np.lexsort((sample.key, sample.value, sample.latent))
    ordered = sample.latent[order]
    place = place_in_run(ordered)
    size = np.bincount(ordered, minlength=1)[ordered]
    decile = np.empty(len(order), np.int64)
    decile[order] = place * 10 // size + 1
    return decile


def quantiles(sample: Kept, latent: int) -> list[float]:
    """The nine deciles 0.1 to 0.9 of one latent's sampled activations; empty without any."""
    values = sample.value[np.searchsorted(sample.latent, latent) : np.searchsorted(sample.latent, latent, side="right")]
    return np.quantile(values, np.arange(1, 10) / 10).astype(np.float32).tolist() if len(values) else []


def place_in_run(group: Int64[NDArray[np.int64], " entries"]) -> Int64[NDArray[np.int64], " entries"]:
    """Place of each entry within its run of equal values."""
    if not len(group):
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.r_[True, np.diff(group) != 0])
    return np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))

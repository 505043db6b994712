"""The order of training rows: complete, shuffled, and the same from any place on."""

import itertools
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.store.activation_stores import D_IN, numbered, table_of, write_store

from sarm.contracts.ids import hash_share
from sarm.data.store import looked_groups
from sarm.data.store.activations import ActivationStore, unusable_rows
from sarm.data.store.looked_groups import Workers
from sarm.data.store.shuffled_rows import Cursor, RowsOfGroups, ShuffledRows, batches, free_memory, memory_for_rows
from sarm.settings.checks import UserError

SHARE = 0.3
NUM_ROWS = 120
HELDOUT = [n for n in range(NUM_ROWS) if hash_share(f"sae:doc{n // 3}") < SHARE]
KEPT = [n for n in range(NUM_ROWS) if n not in HELDOUT]
# The whole store in memory, or nothing: the order must not depend on it.
IN_MEMORY, FROM_DISK = 10**9, 0


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    """120 rows in files of 10."""
    folder = tmp_path_factory.mktemp("rows") / "store"
    return ActivationStore(write_store(folder, [table_of(numbered(i, 10), i) for i in range(0, NUM_ROWS, 10)]))


def row_numbers(x: torch.Tensor) -> list[int]:
    return (x[:, 0] * 2).int().tolist()


def walk(rows: ShuffledRows, start: Cursor, epochs: int = 2, batch_size: int = 7) -> list[tuple[list[int], Cursor]]:
    return [(row_numbers(x), place) for x, _, place in batches(rows, start, epochs, batch_size)]


@pytest.mark.parametrize("memory", [IN_MEMORY, FROM_DISK])
@pytest.mark.parametrize("window_rows", [1000, 120, 119, 40, 1])
def test_an_epoch_has_every_training_row_once_and_no_held_out_one(store, window_rows, memory):
    rows = ShuffledRows(store, SHARE, window_rows, memory_bytes=memory)
    walked = walk(rows, Cursor(0), epochs=3, batch_size=7)
    for epoch in range(3):
        seen = [n for numbers, place in walked[:-1] for n in numbers if place.epoch == epoch]
        seen += walked[-1][0] if epoch == 2 else []
        assert sorted(seen) == KEPT
    assert HELDOUT
    assert row_numbers(rows.heldout) == HELDOUT
    assert rows.num_rows == len(KEPT)
    assert rows.is_in_memory == (memory == IN_MEMORY)


@pytest.mark.parametrize("window_rows", [1000, 40])
def test_the_order_does_not_depend_on_memory(store, window_rows):
    one, other = (ShuffledRows(store, SHARE, window_rows, memory_bytes=m) for m in (IN_MEMORY, FROM_DISK))
    assert walk(one, Cursor(3)) == walk(other, Cursor(3))


@pytest.mark.parametrize("memory", [IN_MEMORY, FROM_DISK])
@pytest.mark.parametrize("window_rows", [1000, 40])
def test_from_any_place_come_exactly_the_remaining_rows_in_the_same_order(store, window_rows, memory):
    rows = ShuffledRows(store, SHARE, window_rows, memory_bytes=memory)
    whole = walk(rows, Cursor(5))
    assert len(whole) > 20
    for number, (_, place) in enumerate(whole):
        again = ShuffledRows(store, SHARE, window_rows, memory_bytes=memory) if number % 8 == 0 else rows
        assert walk(again, Cursor(*list(place))) == whole[number + 1 :], place


def test_a_place_is_four_integers_however_far_it_is(store):
    places = [place for _, place in walk(ShuffledRows(store, SHARE, 40), Cursor(5), epochs=30)]
    assert {len(place) for place in places} == {4}
    assert all(isinstance(value, int) for value in places[-1])


@given(stop=st.integers(0, 40), sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_a_place_reached_with_one_batch_size_is_good_for_another(store, stop, sizes):
    rows = ShuffledRows(store, SHARE, 40, memory_bytes=IN_MEMORY)
    whole = [n for numbers, _ in walk(rows, Cursor(1), 1, 1) for n in numbers]
    first = walk(rows, Cursor(1), 1, sizes[0])[:stop]
    place = first[-1][1] if first else Cursor(1)
    assert [n for numbers, _ in first + walk(rows, place, 1, sizes[1]) for n in numbers] == whole


@pytest.mark.parametrize("world", [1, 2, 3])
def test_workers_together_take_the_rows_of_one_in_its_order(store, world):
    """Each worker walks on its own, and takes every world-th row of a batch."""
    whole = walk(ShuffledRows(store, SHARE, 40), Cursor(2))
    workers = [walk(ShuffledRows(store, SHARE, 40), Cursor(2)) for _ in range(world)]
    for number, (numbers, place) in enumerate(whole):
        parts = [worker[number][0][rank::world] for rank, worker in enumerate(workers)]
        woven = [parts[i % world][i // world] for i in range(len(numbers))]
        assert (woven, workers[-1][number][1]) == (numbers, place)


def test_another_epoch_or_seed_gives_another_order(store):
    rows = ShuffledRows(store, SHARE, 40)
    orders = {tuple(n for numbers, _ in walk(rows, Cursor(seed), 1) for n in numbers) for seed in (0, 1, 2)}
    second = tuple(n for numbers, place in walk(rows, Cursor(0)) for n in numbers)
    assert len(orders | {second[: len(KEPT)], second[len(KEPT) :]}) == 4


@pytest.mark.parametrize("window_rows", [1000, 40])
def test_neighbours_in_the_store_are_not_neighbours_in_training(store, window_rows):
    order = [n for numbers, _ in walk(ShuffledRows(store, SHARE, window_rows), Cursor(0), 1) for n in numbers]
    place = {n: i for i, n in enumerate(order)}
    distances = [abs(place[a] - place[b]) for a, b in itertools.pairwise(KEPT)]
    # Two random places among n lie n / 3 apart on average.
    least = min(window_rows, len(KEPT)) / 6
    assert sum(distances) / len(distances) > least


def test_row_groups_of_one_file_are_shuffled_too(tmp_path):
    """One file of eight row groups, windows of two."""
    folder = write_store(tmp_path / "one", [table_of(numbered(0, 80))])
    pq.write_table(
        table_of(numbered(0, 80)), folder / "part-000000.parquet", row_group_size=10, write_page_checksum=True
    )
    rows = ShuffledRows(ActivationStore(folder), 1e-9, window_rows=20)
    first = {n // 10 for n in row_numbers(next(iter(batches(rows, Cursor(0), 1, 20)))[0])}
    starts = {min(n // 10 for n in numbers) for numbers, _ in walk(rows, Cursor(0), 1, 20)}
    assert len(first) == 2
    assert len(starts) == 4
    assert [sorted({n // 10 for n in numbers}) for numbers, _ in walk(rows, Cursor(0), 1, 20)] != [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]


def test_a_store_of_one_window_keeps_its_stored_order_until_it_is_shuffled(store):
    rows = ShuffledRows(store, SHARE)
    assert row_numbers(rows.sample(0, 5)) == KEPT[:5]
    order = torch.randperm(len(KEPT), generator=torch.Generator().manual_seed(4))
    assert [n for numbers, _ in walk(rows, Cursor(3), 2) for n in numbers][len(KEPT) :] == [KEPT[i] for i in order]


def test_no_more_held_out_rows_than_asked_for_are_kept(store):
    rows = ShuffledRows(store, SHARE, max_heldout=4)
    assert row_numbers(rows.heldout) == HELDOUT[:4]
    assert rows.num_rows == len(KEPT), "the others are still not trained on"


@pytest.mark.parametrize("window_rows", [1000, 20])
def test_a_store_whose_every_document_is_held_out_is_refused(store, window_rows):
    with pytest.raises(UserError, match=r"all activations of .* are held out: .*Add sources"):
        ShuffledRows(store, 1.0, window_rows)


def with_bad_rows(folder: Path, dtype: str = "float16") -> ActivationStore:
    x = numbered(0, 30)
    x[2, 3], x[7, 0], x[11, 5] = math.nan, math.inf, -math.inf
    x[13], x[20], x[21, :] = 0.0, -3.5, torch.tensor([0.0, -0.0] * 3)
    return ActivationStore(
        write_store(folder, [table_of(part, first, dtype) for part, first in ((x[:15], 0), (x[15:], 15))])
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("memory", [IN_MEMORY, FROM_DISK])
def test_rows_that_cannot_be_standardised_are_left_out_and_named(tmp_path, memory, dtype):
    rows = ShuffledRows(with_bad_rows(tmp_path / "a", dtype), SHARE, memory_bytes=memory)
    assert rows.rejected == {"not finite": [2, 7, 11], "constant": [13, 20, 21]}
    assert rows.num_rejected == 6
    x = torch.cat([x for x, _, _ in batches(rows, Cursor(0), 1, 4)])
    assert len(x) == rows.num_rows == 24 - len(rows.heldout)
    assert bool(torch.cat([x, rows.heldout]).isfinite().all())


def test_counting_over_a_store_leaves_the_same_rows_out(tmp_path):
    store = with_bad_rows(tmp_path / "a")
    assert sum(map(len, store.usable_vectors())) == 24


def test_workers_that_share_the_row_groups_read_every_row_once(tmp_path):
    store = with_bad_rows(tmp_path / "a")
    every = torch.cat(list(store.usable_vectors()))
    shares = [list(store.usable_vectors(slice(rank, None, 2))) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == len(store.group_places()) // 2 > 0
    assert torch.equal(torch.cat([part for pair in zip(*shares, strict=True) for part in pair]), every)


def test_a_store_of_bad_rows_alone_is_refused(tmp_path):
    store = ActivationStore(write_store(tmp_path / "a", [table_of(torch.full((20, D_IN), math.nan))]))
    with pytest.raises(UserError, match="20 of them because they are constant, NaN or infinite"):
        ShuffledRows(store, SHARE)


@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=4, max_size=4))
def test_a_row_is_unusable_exactly_if_standardising_it_fails(bits):
    row = torch.tensor([bits], dtype=torch.int16).view(torch.float16)
    found = {reason for reason, is_bad in unusable_rows(row).items() if bool(is_bad)}
    x = row.double()
    wanted = "not finite" if not bool(x.isfinite().all()) else "constant" if float(x.max()) == float(x.min()) else None
    assert found == ({wanted} if wanted else set())


@pytest.mark.parametrize("memory", [IN_MEMORY, FROM_DISK])
def test_a_damaged_page_is_noticed_before_the_first_step(tmp_path, memory):
    folder = write_store(tmp_path / "a", [table_of(numbered(i, 10), i) for i in range(0, 50, 10)])
    path = folder / "part-000003.parquet"
    raw = bytearray(path.read_bytes())
    raw[raw.index(numbered(35, 1).half().numpy().tobytes()) + 3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"part-000003\.parquet is damaged.*extract again"):
        ShuffledRows(ActivationStore(folder), SHARE, memory_bytes=memory)


def test_a_page_that_is_damaged_during_training_is_noticed_when_it_is_read(tmp_path):
    folder = write_store(tmp_path / "a", [table_of(numbered(i, 10), i) for i in range(0, 50, 10)])
    rows = ShuffledRows(ActivationStore(folder), SHARE, window_rows=10, memory_bytes=FROM_DISK)
    (folder / "part-000003.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"part-000003\.parquet is damaged"):
        walk(rows, Cursor(0), 1)


def test_the_memory_for_rows_is_shared_out():
    assert free_memory() > 10_000_000
    assert memory_for_rows("cpu", 4) < 0.2 * free_memory()


def test_a_container_s_limit_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    monkeypatch.setattr("sarm.data.store.shuffled_rows._CGROUP", tmp_path)
    assert free_memory() == 600


@pytest.mark.parametrize("memory", [IN_MEMORY, FROM_DISK])
@pytest.mark.parametrize("world", [2, 3])
def test_the_shares_of_all_workers_make_up_each_batch_and_nobody_reads_more(memory, world, store, monkeypatch):
    rows = ShuffledRows(store, SHARE, window_rows=40, memory_bytes=memory)
    whole = list(batches(rows, Cursor(1), 1, 20))
    read: list[int] = []
    stored = RowsOfGroups.stored
    monkeypatch.setattr(RowsOfGroups, "stored", lambda self, places: read.append(len(places)) or stored(self, places))
    for rank in range(world):
        share = slice(rank, None, world)
        for own, (x, size, after) in zip(batches(rows, Cursor(1), 1, 20, share), whole, strict=True):
            assert torch.equal(own.rows, x[share])
            assert (own.num_all_rows, own.after) == (size, after)
    assert sum(read) == sum(len(x) for x, _, _ in whole)


class Together:
    """Workers in threads of one process, each told what all said."""

    def __init__(self, world: int):
        self.world, self._barrier = world, threading.Barrier(world, timeout=60)
        self._said: list[object] = [None] * world

    def run(self, work):
        with ThreadPoolExecutor(self.world) as threads:
            running = [threads.submit(work, Workers(rank, self.world, partial(self._tell, rank))) for rank in range(self.world)]  # fmt: skip
            return [each.exception() or each.result() for each in running]

    def _tell(self, rank: int, value: object) -> list[object]:
        self._said[rank] = pickle.dumps(value)
        self._barrier.wait()
        everyone = [pickle.loads(said) for said in self._said]
        self._barrier.wait()
        return everyone


@pytest.mark.parametrize("memory", [IN_MEMORY, FROM_DISK])
@pytest.mark.parametrize("world", [2, 5, 13])
@pytest.mark.parametrize("max_heldout", [0, 4, 1000])
def test_each_row_group_is_verified_by_one_worker_and_all_know_the_same(
    memory, world, max_heldout, tmp_path, monkeypatch
):
    alone = ShuffledRows(with_bad_rows(tmp_path / "a", "float16"), SHARE, window_rows=8, max_heldout=max_heldout, memory_bytes=memory)  # fmt: skip
    looked: list[int] = []
    plain = looked_groups.unusable_rows
    monkeypatch.setattr(looked_groups, "unusable_rows", lambda rows: looked.append(len(rows)) or plain(rows))
    store = ActivationStore(tmp_path / "a")
    shared = Together(world).run(lambda workers: ShuffledRows(store, SHARE, 8, max_heldout, memory, workers=workers))
    assert sum(looked) == store.num_rows
    for rows in shared:
        assert (rows.num_rows, rows.rejected) == (alone.num_rows, alone.rejected)
        assert torch.equal(rows.heldout, alone.heldout)
        assert torch.equal(rows.heldout_kinds, alone.heldout_kinds)
        for found, wanted in itertools.zip_longest(batches(rows, Cursor(3), 2, 5), batches(alone, Cursor(3), 2, 5)):
            assert torch.equal(found.rows, wanted.rows)
            assert found.after == wanted.after


def test_a_damaged_page_that_one_worker_meets_is_the_error_of_all(tmp_path):
    store = ActivationStore(write_store(tmp_path / "a", [table_of(numbered(i, 10), i) for i in range(0, 60, 10)]))
    content = bytearray(store.files[3].read_bytes())
    content[len(content) // 3] ^= 1
    store.files[3].write_bytes(content)
    errors = Together(3).run(lambda workers: ShuffledRows(store, SHARE, workers=workers))
    assert len(errors) == 3
    assert all(isinstance(error, UserError) and store.files[3].name in str(error) for error in errors)

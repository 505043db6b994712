"""The order of rows of a mixture: in its shares, each stream complete before it begins again, the same from any place on."""

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sarm.data.store.mixed_rows import MixedRows, Stream, quotas
from sarm.data.store.shuffled_rows import Cursor, batches


class Numbered:
    """Rows [stream, number] in windows of up to 100."""

    def __init__(self, stream: int, num_rows: int):
        self.num_rows, self._stream = num_rows, stream

    def window_sizes(self, seed: int, epoch: int) -> list[int]:
        return [min(100, self.num_rows - start) for start in range(0, self.num_rows, 100)]

    def windows(self, seed: int, epoch: int, first: int = 0) -> Iterator[Tensor]:
        for start in range(100 * first, self.num_rows, 100):
            numbers = torch.arange(start, min(start + 100, self.num_rows), dtype=torch.float32)
            yield torch.stack([torch.full_like(numbers, self._stream), numbers], dim=1)


BATCH = 64


def mixture(num_rows: int = 700 * BATCH) -> MixedRows:
    return MixedRows([Stream(Numbered(0, 530), 0.65), Stream(Numbered(1, 7_013), 0.35)], num_rows, BATCH)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 1000))
def test_quotas_are_whole_add_up_and_are_less_than_one_off(weights, num_rows):
    shares = [weight / sum(weights) for weight in weights]
    found = quotas(shares, num_rows)
    assert sum(found) == num_rows
    assert all(abs(number - share * num_rows) < 1 for number, share in zip(found, shares, strict=True))


def test_a_mixture_has_its_shares_and_goes_through_each_stream_before_it_begins_again():
    walked = torch.cat([x for x, _, _ in batches(mixture(), Cursor(3), 1, BATCH)])
    assert len(walked) == 700 * BATCH
    assert float((walked[:, 0] == 0).double().mean()) == pytest.approx(0.65, abs=1e-3)
    for stream, passes in enumerate(mixture().passes()):
        counts = Counter(walked[walked[:, 0] == stream, 1].int().tolist())
        size = (530, 7_013)[stream]
        assert sum(counts.values()) / size == pytest.approx(passes)
        assert set(counts.values()) <= {int(passes), int(passes) + 1}
        assert len(counts) == (size if passes >= 1 else sum(counts.values()))


def test_batches_are_mixed_and_an_order_follows_from_the_seed():
    one, again, other = ([x for x, _, _ in batches(mixture(), Cursor(seed), 1, BATCH)] for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    shares = [float((x[:, 0] == 0).double().mean()) for x in one]
    assert all(0.35 < share < 0.9 for share in shares)


@pytest.mark.parametrize("steps", [1, 255, 256, 257, 600])
def test_a_mixture_is_taken_up_again_at_any_place(steps):
    whole = list(batches(mixture(), Cursor(3), 1, BATCH))
    again = batches(mixture(), whole[steps - 1].after, 1, BATCH)
    for (x, _, place), (wanted, _, at) in itertools.zip_longest(again, whole[steps:]):
        assert torch.equal(x, wanted)
        assert place == at


@pytest.mark.parametrize("shares", [(0.5, 0.4), (1.0, 0.0), (1.5, -0.5)])
def test_shares_that_do_not_add_up_are_refused(shares):
    with pytest.raises(ValueError, match="add up to 1"):
        MixedRows([Stream(Numbered(n, 50), share) for n, share in enumerate(shares)], 100, BATCH)


def test_a_worker_reads_its_own_rows_of_a_window_alone():
    """Of every batch, each of three workers asks the streams for its third, and together they get what one gets."""
    asked: list[int] = []

    class Counting(Numbered):
        def windows(self, seed: int, epoch: int, first: int = 0) -> Iterator[Tensor]:
            return (Counted(window) for window in super().windows(seed, epoch, first))

    class Counted:
        def __init__(self, rows: Tensor):
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, places: Tensor) -> Tensor:
            asked.append(len(places))
            return self.rows[places]

    def walked(share: slice) -> list[Tensor]:
        streams = [Stream(Counting(0, 530), 0.65), Stream(Counting(1, 7_013), 0.35)]
        return [x for x, _, _ in batches(MixedRows(streams, 300 * BATCH, BATCH), Cursor(3), 1, BATCH, share)]

    whole = walked(slice(None))
    assert sum(asked) == 300 * BATCH
    short = walked(slice(BATCH, None, 3))
    assert all(x.shape == (0, 2) for x in short), "a worker for whom no row is left gets none"
    asked.clear()
    parts = [walked(slice(rank, None, 3)) for rank in range(3)]
    assert sum(asked) == 300 * BATCH, "no row twice"
    for one, *thirds in zip(whole, *parts, strict=True):
        for rank, third in enumerate(thirds):
            assert torch.equal(one[rank::3], third)

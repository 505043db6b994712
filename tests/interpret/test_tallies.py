"""Tallies against brute force, and that neither order nor the sharing out changes a bit of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarm.contracts.tables import ACTIVATION_EDGES
from sarm.interpret import tallies
from sarm.interpret.tallies import NUM_BINS, Kept, Tally, Units, quantiles, sampled_deciles

S, TOP, SAMPLED = 4, 3, 5


@pytest.fixture(autouse=True, scope="module", params=[1, 17, 1 << 19], ids=lambda size: f"sorted in by {size}")
def max_waiting(request):
    """However many entries wait to be sorted in."""
    before, tallies._MAX_WAITING = tallies._MAX_WAITING, request.param
    yield
    tallies._MAX_WAITING = before


# Few keys and values, so that ties, repeated texts and full slots are common.
units = st.lists(
    st.tuples(
        st.integers(0, 40),
        st.integers(1, 9),
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
        st.dictionaries(st.integers(0, S - 1), st.sampled_from([-1.0, 0.0, 0.1, 0.5, 0.5000001, 2.0, 3000.0]), max_size=S),
    ),
    max_size=30,
)  # fmt: skip


def as_units(rows):
    return Units(
        ref=np.array([ref for ref, *_ in rows], np.int64),
        key=np.array([key for _, key, *_ in rows], np.uint64),
        readers=np.array([readers for _, _, readers, _ in rows], np.int64).reshape(-1, 3),
        offset=np.cumsum([0, *(len(codes) for *_, codes in rows)]).astype(np.int64),
        latent=np.array([latent for *_, codes in rows for latent in codes], np.int64),
        value=np.array([value for *_, codes in rows for value in codes.values()], np.float32),
    )


def tally_of(*parts):
    tally = Tally(S, TOP, SAMPLED)
    for part in parts:
        tally.add(as_units(part))
    return tally


def state(tally):
    return [tally.total, tally.count, tally.sums(), tally.histogram, *tally.top.all(), *tally.sample.all()]


def assert_same(a, b):
    for left, right in zip(state(a), state(b), strict=True):
        np.testing.assert_array_equal(left, right)


def distinct(rows, latent):
    best = {}
    for ref, key, _, codes in rows:
        value = float(np.float32(codes.get(latent, 0.0)))
        if value > 0:
            best[key] = min(best.get(key, (0.0, 0)), (-value, ref))
    return best


@given(units)
def test_slots_hold_the_strongest_texts_and_those_of_the_lowest_hashes(rows):
    tally = tally_of(rows)
    for latent in range(S):
        best = distinct(rows, latent)
        strongest = sorted((value, key, ref) for key, (value, ref) in best.items())[:TOP]
        sampled = [(value, key, ref) for key, (value, ref) in sorted(best.items())][:SAMPLED]
        for found, expected in ((tally.top.all(), strongest), (tally.sample.all(), sampled)):
            mine = found.latent == latent
            entries = zip(-found.value[mine].astype(float), found.key[mine], found.ref[mine], strict=True)
            assert [(v, int(k), int(r)) for v, k, r in entries] == expected


@given(units)
def test_counts_sums_and_histograms_count_every_reader(rows):
    tally = tally_of(rows)
    for side in range(3):
        assert tally.total[side] == sum(readers[side] for _, _, readers, _ in rows)
        for latent in range(S):
            on = [
                (np.float32(codes[latent]), readers[side]) for _, _, readers, codes in rows if codes.get(latent, 0) > 0
            ]
            assert tally.count[side, latent] == sum(n for _, n in on)
            assert tally.sums()[side, latent] == pytest.approx(sum(float(v) * n for v, n in on), abs=1e-6)
            assert tally.histogram[side, latent].sum() == tally.count[side, latent]


@given(units, units, st.randoms())
def test_any_order_any_batches_and_any_sharing_out_give_the_same_bits(a, b, random):
    whole = tally_of([*a, *b])
    shuffled = [*a, *b]
    random.shuffle(shuffled)
    assert_same(whole, tally_of(*([row] for row in shuffled)))
    left, right = tally_of(a), tally_of(b)
    left.merge(right)
    assert_same(whole, left)


def test_activations_lie_between_the_edges_of_their_bin():
    edges = np.array(ACTIVATION_EDGES, np.float32)
    values = [1e-9, *edges, 1e6]
    tally = tally_of([(0, n, (1, 0, 0), {0: float(v)}) for n, v in enumerate(values)])
    bins = tally.histogram[0, 0]
    assert (bins[0], bins[NUM_BINS - 1]) == (2, 3)
    assert set(bins[1:-1]) == {1}


def test_deciles_and_quantiles_are_those_of_the_sampled_activations():
    value = np.arange(1, 41, dtype=np.float32)
    sample = Kept(np.repeat([2, 3], 20), np.arange(40, dtype=np.uint64), np.zeros(40, np.int64), value)
    assert sampled_deciles(sample).tolist() == 2 * [d for d in range(1, 11) for _ in range(2)]
    assert quantiles(sample, 2)[4] == 10.5
    assert quantiles(sample, 1) == []


def test_memory_does_not_grow_with_the_stream():
    tally = tally_of()
    before = [part.nbytes for part in vars(tally.top).values() if isinstance(part, np.ndarray)]
    rng = np.random.default_rng(0)
    for step in range(20):
        tally.add(
            as_units(
                [(step * 50 + i, int(rng.integers(1 << 60)), (0, 0, 1), {1: float(rng.random())}) for i in range(50)]
            )
        )
    assert [part.nbytes for part in vars(tally.top).values() if isinstance(part, np.ndarray)] == before
    assert len(tally.top.all().latent) == TOP

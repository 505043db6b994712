import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sarm.interpret.contexts import ContextRecord, collect_contexts, merge_contexts
from sarm.schema import CONTEXTS

records = st.lists(
    st.builds(
        lambda doc, side, text, codes: ContextRecord(f"doc{doc}", side, text, list(codes), list(codes.values())),
        st.integers(0, 9),
        st.sampled_from(["chosen", "rejected"]),
        st.sampled_from("abcdefgh"),
        # Values that differ as float64 and not as float32 are ties.
        st.dictionaries(st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.1 + 1e-12, 0.5, 2.0]), max_size=3),
    ),
    max_size=40,
)


def brute_force(all_records, latent, n):
    best = {}
    for r in all_records:
        for i, value in zip(r.latents, r.values, strict=True):
            if i == latent and value > 0:
                entry = (-float(np.float32(value)), r.doc_id, r.side, r.text)
                best[r.text] = min(best.get(r.text, entry), entry)
    return [(-e[0], *e[1:]) for e in sorted(best.values())[:n]]


@settings(max_examples=80, deadline=None)
@given(records, st.integers(1, 4))
def test_collected_contexts_are_the_strongest_distinct_texts(all_records, n):
    table = collect_contexts(all_records, None, n)
    assert table.schema == CONTEXTS
    for latent in range(4):
        rows = [r for r in table.to_pylist() if r["latent"] == latent]
        assert [(r["value"], r["doc_id"], r["side"], r["text"]) for r in rows] == brute_force(all_records, latent, n)
        assert [r["rank"] for r in rows] == list(range(1, len(rows) + 1))


@settings(max_examples=80, deadline=None)
@given(records, records, st.integers(1, 4))
def test_merging_parts_equals_collecting_everything_at_once(a, b, n):
    merged = merge_contexts(collect_contexts(a, None, n), collect_contexts(b, None, n), n)
    assert merged.equals(collect_contexts([*a, *b], None, n))


@settings(max_examples=40, deadline=None)
@given(records, st.randoms())
def test_order_of_records_does_not_matter(all_records, random):
    shuffled = list(all_records)
    random.shuffle(shuffled)
    assert collect_contexts(shuffled, None, 2).equals(collect_contexts(all_records, None, 2))


def test_long_streams_are_pruned_without_losing_the_strongest():
    stream = [ContextRecord(f"d{i:04d}", "text", f"text {i}", [7], [(i * 37) % 1009 + 1.0]) for i in range(1009)]
    assert collect_contexts(stream, [7], 3)["value"].to_pylist() == [1009, 1008, 1007]


def test_a_text_seen_twice_is_kept_once_with_its_maximum():
    table = collect_contexts(
        [ContextRecord("b", "chosen", "same", [1], [1.0]), ContextRecord("a", "rejected", "same", [1], [3.0])], None, 5
    )
    assert table.select(["value", "doc_id"]).to_pylist() == [{"value": 3, "doc_id": "a"}]


def test_only_wanted_latents_that_fire_are_collected():
    record = ContextRecord("a", "text", "t", np.array([1, 2, 3]), np.array([1.0, 0.0, 2.0], np.float32))
    assert collect_contexts([record], {1, 2}, 5)["latent"].to_pylist() == [1]

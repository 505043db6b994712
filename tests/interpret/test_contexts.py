import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from sarm.contracts.tables import CONTEXTS_TABLE
from sarm.interpret.contexts import strongest_texts

ANSWERS = pa.schema(
    [
        ("doc_id", pa.string()),
        ("side", pa.string()),
        ("text", pa.string()),
        ("latents", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float64())),
    ]
)

answers = st.lists(
    st.builds(
        lambda doc, side, text, codes: answer(f"doc{doc}", side, text, codes),
        st.integers(0, 9),
        st.sampled_from(["chosen", "rejected"]),
        st.sampled_from("abcdefgh"),
        # Values that differ as float64 and not as float32 are ties.
        st.dictionaries(st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.1 + 1e-12, 0.5, 2.0]), max_size=3),
    ),
    max_size=40,
)


def answer(doc_id, side, text, codes):
    return {"doc_id": doc_id, "side": side, "text": text, "latents": list(codes), "values": list(codes.values())}


def strongest(rows, n):
    return strongest_texts(pa.Table.from_pylist(rows, schema=ANSWERS), n)


def brute_force(rows, latent, n):
    best = {}
    for row in rows:
        for i, value in zip(row["latents"], row["values"], strict=True):
            if i == latent and value > 0:
                entry = (-float(np.float32(value)), row["doc_id"], row["side"], row["text"])
                best[row["text"]] = min(best.get(row["text"], entry), entry)
    return [(-e[0], *e[1:]) for e in sorted(best.values())[:n]]


@settings(max_examples=80, deadline=None)
@given(answers, st.integers(1, 4))
def test_what_is_kept_are_the_strongest_distinct_texts(rows, n):
    table = strongest(rows, n)
    assert table.schema == CONTEXTS_TABLE
    for latent in range(4):
        of_latent = [r for r in table.to_pylist() if r["latent"] == latent]
        assert [(r["value"], r["doc_id"], r["side"], r["text"]) for r in of_latent] == brute_force(rows, latent, n)
        assert [r["rank"] for r in of_latent] == list(range(1, len(of_latent) + 1))


@settings(max_examples=40, deadline=None)
@given(answers, st.randoms())
def test_order_of_rows_does_not_matter(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert strongest(shuffled, 2).equals(strongest(rows, 2))


def test_a_text_seen_twice_is_kept_once_with_its_maximum():
    table = strongest([answer("b", "chosen", "same", {1: 1.0}), answer("a", "rejected", "same", {1: 3.0})], 5)
    assert table.select(["value", "doc_id"]).to_pylist() == [{"value": 3, "doc_id": "a"}]


def test_silent_latents_and_negative_values_have_no_texts():
    rows = [answer(str(i), "chosen", f"text {i}", {1: value}) for i, value in enumerate((0.5, -2.0, 1.0, 0.0, -0.1))]
    table = pa.Table.from_pylist(rows, schema=ANSWERS)
    assert strongest_texts(table, 3)["value"].to_pylist() == [1.0, 0.5]

import numpy as np
import pyarrow as pa
import pytest

from sarm.contracts.tables import PAIR_SCORES_TABLE
from sarm.interpret.answered import answered_of
from sarm.settings.checks import UserError

D_SAE = 6


def scores_of(*rows) -> pa.Table:
    """PAIR_SCORES of (pair, prompt, chosen latents -> values, rejected latents -> values)."""
    filled = [
        {
            "pair_id": pair,
            "prompt_id": prompt,
            **{f"{side}_latents": list(codes) for side, codes in (("chosen", chosen), ("rejected", rejected))},
            **{f"{side}_values": list(codes.values()) for side, codes in (("chosen", chosen), ("rejected", rejected))},
        }
        for pair, prompt, chosen, rejected in rows
    ]
    columns = {field: pa.array([row.get(field.name) for row in filled], field.type) for field in PAIR_SCORES_TABLE}
    return pa.table({field.name: column for field, column in columns.items()})


A, B, C = {0: 1.0, 3: 2.0}, {1: 0.5, 2: 0.0}, {5: -4.0}
SCORES = scores_of(("p0", "x", A, B), ("p1", "x", A, C), ("p2", "y", B, A))
TEXTS = pa.chunked_array([["a", "a", "b"], ["b", "c", "a"]])


def test_a_response_in_several_pairs_is_there_once_and_the_same_text_to_another_prompt_is_another_response():
    answered = answered_of(SCORES, TEXTS, D_SAE)
    found = list(zip(answered.prompts.tolist(), answered.texts, strict=True))
    assert found == [("x", "a"), ("x", "b"), ("x", "c"), ("y", "b"), ("y", "a")]
    assert answered.pairs.tolist() == [[0, 1], [0, 2], [3, 4]]


def test_codes_stand_with_their_response_and_slots_of_value_0_are_silent():
    dense = answered_of(SCORES, TEXTS, D_SAE).values.toarray()
    assert dense[0].tolist() == dense[4].tolist() == [1, 0, 0, 2, 0, 0]
    assert dense[1].tolist() == [0, 0.5, 0, 0, 0, 0]
    assert dense[2].tolist() == [0, 0, 0, 0, 0, -4]


def test_of_many_pairs_the_same_ones_are_kept_in_any_order(monkeypatch):
    monkeypatch.setattr("sarm.interpret.answered._MAX_PAIRS", 2)
    kept = set(answered_of(SCORES, TEXTS, D_SAE).texts)
    order = [2, 0, 1]
    turned = answered_of(SCORES.take(order), TEXTS.take([*order, *(3 + i for i in order)]), D_SAE)
    assert set(turned.texts) == kept
    assert len(turned.pairs) == 2


def test_scores_without_latents_have_no_codes():
    index = SCORES.schema.get_field_index("chosen_latents")
    bare = SCORES.set_column(index, "chosen_latents", pa.nulls(3, SCORES.schema.field(index).type))
    with pytest.raises(UserError, match="no latents"):
        answered_of(bare, TEXTS, D_SAE)


def test_an_empty_table_has_no_response():
    answered = answered_of(SCORES.slice(0, 0), TEXTS.slice(0, 0), D_SAE)
    assert answered.values.shape == (0, D_SAE)
    assert np.shape(answered.pairs) == (0, 2)

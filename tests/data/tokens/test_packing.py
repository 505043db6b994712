from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarm.data.tokens.packing import Row, answer_rows, collate, padded_tokens, text_row, token_batches
from sarm.nn.segments import ANSWERS_PER_BLOCK, SEGMENTS_PER_BLOCK

# Few tokens, so that answers often begin alike.
ids = st.lists(st.integers(0, 2), min_size=1, max_size=12)
answers = st.lists(ids, min_size=1, max_size=8).map(lambda lists: list(enumerate(lists)))
prompted = st.builds(
    lambda prompt, tails: [(i, [*prompt, *tail]) for i, tail in enumerate(tails)],
    st.lists(st.integers(3, 9), max_size=10),
    st.lists(ids, min_size=1, max_size=8),
)


def as_the_model_sees_it(row: Row, column: int) -> tuple[list[int], list[int]]:
    """(tokens, positions) that the token at `column` sees, up to itself: its own segment, the answer that this branches from, and its block's first."""
    own = row.segments[column]
    block = own - own % SEGMENTS_PER_BLOCK
    seen = [i for i in range(column + 1) if row.segments[i] in (block, block + own % ANSWERS_PER_BLOCK, own)]
    return [row.ids[i] for i in seen], [row.positions[i] for i in seen]


@given(answers=st.one_of(answers, prompted), row_tokens=st.integers(1, 60))
def test_every_answer_can_be_read_back_in_order_with_positions_from_0(answers, row_tokens):
    rows = answer_rows(answers, row_tokens)
    found = {key: as_the_model_sees_it(row, column) for row in rows for key, column in row.taken}
    assert found == {key: (sequence, list(range(len(sequence)))) for key, sequence in answers}


@given(answers=st.one_of(answers, prompted), row_tokens=st.integers(1, 60))
def test_each_answer_is_wanted_once_and_at_a_token_of_its_own(answers, row_tokens):
    rows = answer_rows(answers, row_tokens)
    assert Counter(key for row in rows for key, _ in row.taken) == Counter(key for key, _ in answers)
    for row in rows:
        assert len({column for _, column in row.taken}) == len(row.taken)
        assert len(row.ids) == len(row.segments) == len(row.positions)
        for _, column in row.taken:
            assert row.segments[column + 1 :].count(row.segments[column]) == 0, "it is the last of its segment"


@given(answers=st.one_of(answers, prompted), row_tokens=st.integers(1, 60))
def test_no_row_is_too_long_unless_a_single_answer_is(answers, row_tokens):
    for row in answer_rows(answers, row_tokens):
        assert len(row.ids) <= row_tokens or len(row.taken) == 1


@given(
    answers=st.one_of(answers, prompted),
    row_tokens=st.integers(1, 60),
    closing=st.lists(st.integers(20, 22), min_size=1, max_size=3),
    data=st.data(),
)
def test_every_branch_is_wanted_once_and_sees_its_answer_up_to_there(answers, row_tokens, closing, data):
    stops = {
        key: sorted(data.draw(st.sets(st.integers(0, len(sequence) - 1), max_size=4))) for key, sequence in answers
    }
    rows = answer_rows(answers, row_tokens, stops, closing)
    taken = [(key, as_the_model_sees_it(row, column)) for row in rows for key, column in row.taken]
    wanted = {key: list(sequence) for key, sequence in answers}
    wanted |= {(key, c): [*sequence[: c + 1], *closing] for key, sequence in answers for c in stops[key]}
    assert len(taken) == len(wanted)
    assert dict(taken) == {key: (sequence, [*range(len(sequence))]) for key, sequence in wanted.items()}
    for row in rows:
        num_answers = sum(not isinstance(key, tuple) for key, _ in row.taken)
        assert len(row.ids) <= row_tokens or num_answers == 1
        branches = [s for s in row.segments if s >= ANSWERS_PER_BLOCK]
        assert len(branches) == len(closing) * len(set(branches)), "each is behind one token, and no two are one"


def test_answers_that_begin_alike_share_the_branches_of_their_beginning():
    (row,) = answer_rows([("a", [7, 8, 9, 1]), ("b", [7, 8, 9, 2, 3])], 16, {"a": [1], "b": [1, 3]}, [5])
    assert row.ids == [7, 8, 5, 9, 1, 2, 5, 3]
    branch = ANSWERS_PER_BLOCK
    assert row.segments == [0, 0, branch, 0, 1, 2, 2 + 2 * branch, 2]
    assert row.positions == [0, 1, 2, 2, 3, 3, 4, 4]
    assert row.taken == [(("a", 1), 2), ("a", 4), (("b", 1), 2), (("b", 3), 6), ("b", 7)]


def test_a_shared_prompt_is_stored_once():
    (row,) = answer_rows([("a", [7, 8, 9, 1]), ("b", [7, 8, 9, 2, 3])], 16)
    assert row.ids == [7, 8, 9, 1, 2, 3]
    assert row.segments == [0, 0, 0, 1, 2, 2]
    assert row.positions == [0, 1, 2, 3, 3, 4]
    assert row.taken == [("a", 3), ("b", 5)]


def test_an_answer_that_begins_another_keeps_its_last_token_to_itself():
    (row,) = answer_rows([("a", [7, 8]), ("b", [7, 8, 9])], 16)
    assert (row.ids, row.segments) == ([7, 8, 8, 9], [0, 1, 2, 2])


def test_equal_answers_are_both_there():
    (row,) = answer_rows([("a", [7, 8]), ("b", [7, 8])], 16)
    assert row.taken == [("a", 1), ("b", 2)]


def test_answers_without_a_common_beginning_get_rows_of_their_own():
    rows = answer_rows([("a", [1, 2]), ("b", [3, 4])], 16)
    assert [row.ids for row in rows] == [[1, 2], [3, 4]]


def test_a_single_answer_is_not_split_into_prompt_and_rest():
    (row,) = answer_rows([("a", [1, 2, 3])], 16)
    assert set(row.segments) == {1}


def test_a_text_row_wants_several_columns():
    row = text_row("doc", [5, 6, 7, 8], [1, 3])
    assert row.taken == [(("doc", 1), 1), (("doc", 3), 3)]
    assert as_the_model_sees_it(row, 3) == ([5, 6, 7, 8], [0, 1, 2, 3])


text_rows = st.lists(st.integers(1, 20), min_size=1, max_size=12).map(
    lambda lengths: [text_row(i, range(100, 100 + n), [n - 1]) for i, n in enumerate(lengths)]
)


@given(rows=text_rows, batch_tokens=st.integers(1, 80))
def test_batches_respect_the_budget_with_padding_unless_a_single_row_is_longer(rows, batch_tokens):
    for batch in token_batches(rows, batch_tokens, pad_id=0):
        assert batch.input_ids.numel() <= batch_tokens or len(batch.input_ids) == 1


@given(rows=text_rows, batch_tokens=st.integers(1, 80))
def test_batches_hold_every_row_once_with_its_padding_marked(rows, batch_tokens):
    batches = token_batches(rows, batch_tokens, pad_id=0)
    assert Counter(key for batch in batches for key in batch.keys) == Counter(key for r in rows for key, _ in r.taken)
    lengths = {i: len(row.ids) for i, row in enumerate(rows)}
    for batch in batches:
        for (key, column), row, place in zip(batch.keys, batch.rows.tolist(), batch.columns.tolist(), strict=True):
            length = lengths[key]
            assert column == length - 1
            packed = Row(
                batch.input_ids[row].tolist(), batch.segment_ids[row].tolist(), batch.position_ids[row].tolist(), []
            )
            assert as_the_model_sees_it(packed, place) == ([*range(100, 100 + length)], [*range(length)])
        assert int((batch.segment_ids >= 0).sum()) == sum(lengths[key] for key, _ in batch.keys)


def test_short_rows_stand_behind_one_another_in_the_room_of_the_longest():
    rows = [text_row(name, range(n), [n - 1]) for name, n in (("a", 3), ("b", 6), ("c", 2), ("d", 1))]
    batch = collate(rows, pad_id=9)
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0]]
    block = SEGMENTS_PER_BLOCK
    assert batch.segment_ids.tolist() == [[0] * 6, [0, 0, 0, block, block, 2 * block]]
    assert padded_tokens(rows) == 12
    apart = collate(rows, pad_id=9, join=False)
    assert apart.keys == [key for row in rows for key, _ in row.taken]
    assert apart.rows.tolist() == [0, 1, 2, 3]
    assert apart.input_ids[2].tolist() == [0, 1, 9, 9, 9, 9]


def test_lines_are_longer_than_the_longest_row_where_that_saves_padding():
    rows = [text_row(name, range(n), [n - 1]) for name, n in (("a", 6), ("b", 4), ("c", 4), ("d", 4))]
    batch = collate(rows, pad_id=9)
    assert tuple(batch.input_ids.shape) == (1, 18), "24 tokens in lines of 6"
    assert padded_tokens(rows) == 18
    # Attention to a whole line costs more than the padding that it would save.
    rows = [text_row(n, range(n), [n - 1]) for n in (6000, 5500)]
    assert len(collate(rows, pad_id=0).input_ids) == 2


@given(rows=text_rows)
def test_padded_tokens_is_the_size_of_the_collated_batch(rows):
    assert padded_tokens(rows) == collate(rows, pad_id=0).input_ids.numel()
    assert padded_tokens([]) == 0


def test_model_inputs_are_the_reward_models_arguments():
    batch = collate(answer_rows([("a", [7, 8, 1]), ("b", [7, 8, 2])], 16), pad_id=0)
    inputs = batch.model_inputs()
    assert inputs.keys() == {"input_ids", "position_ids", "segment_ids", "rewarded_rows", "rewarded_columns"}
    assert inputs["input_ids"][inputs["rewarded_rows"], inputs["rewarded_columns"]].tolist() == [1, 2]
    assert batch.keys == ["a", "b"]


def test_no_answers_make_no_rows():
    assert answer_rows([], 16) == []
    assert token_batches([], 16, pad_id=0) == []


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_rows_do_not_depend_on_the_order_of_answers_of_different_lengths(order):
    all_answers = [("a", [7, 1]), ("b", [7, 2, 3]), ("c", [7, 2, 3, 4])]
    assert answer_rows([all_answers[i] for i in order], 16) == answer_rows(all_answers, 16)

from collections import Counter
from itertools import permutations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.tokens.chat_families import chat_of

from sarm.contracts.tables import PAIRS_TABLE
from sarm.data.sources.conversations import ConversationError
from sarm.data.tokens.chat import Tokens
from sarm.data.tokens.groups import PairOfGroup, PromptGroup, prompt_groups, split_group
from sarm.data.tokens.packing import padded_tokens


def pair(prompt: str, chosen: str, rejected: str, margin: float | None = None) -> dict:
    return {
        "pair_id": f"{prompt}:{chosen}>{rejected}",
        "prompt_id": prompt,
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": chosen,
        "rejected": rejected,
        "source": "test",
        "split": "train",
        "subset": "s",
        "margin": margin,
    }


def test_a_group_has_each_response_once_and_all_pairs_of_its_prompt(tiny_chat):
    table = pa.Table.from_pylist(
        [pair("p", "a", "b", 1.5), pair("q", "a", "b"), pair("p", "a", "c"), pair("p", "c", "b")], schema=PAIRS_TABLE
    )
    p, q = prompt_groups(table, tiny_chat)
    assert (p.prompt_id, p.responses) == ("p", ["a", "b", "c"])
    assert p.pairs == [
        PairOfGroup("p:a>b", 0, 1, 1.5, "s"),
        PairOfGroup("p:a>c", 0, 2, None, "s"),
        PairOfGroup("p:c>b", 2, 1, None, "s"),
    ]
    assert p.tokens == tiny_chat.encode_responses([{"role": "user", "content": "p"}], ["a", "b", "c"])
    assert (q.prompt_id, q.responses, len(q.pairs)) == ("q", ["a", "b"], 1)


def test_spellings_of_one_prompt_are_one_group_and_each_response_is_read_after_its_own(tiny_chat):
    plain, spelt = pair("p", "a", "b"), pair("p", "a", "c") | {"prompt": [{"role": "user", "content": "P "}]}
    (group,) = prompt_groups(pa.Table.from_pylist([spelt, plain], schema=PAIRS_TABLE), tiny_chat)
    assert group.responses == ["a", "c", "a", "b"]
    assert group.tokens == [
        *tiny_chat.encode_responses([{"role": "user", "content": "P "}], ["a", "c"]),
        *tiny_chat.encode_responses([{"role": "user", "content": "p"}], ["a", "b"]),
    ]
    assert [(p.pair_id, p.chosen, p.rejected) for p in group.pairs] == [("p:a>c", 0, 1), ("p:a>b", 2, 3)]
    assert len({key for row in group.rows(128) for key, _ in row.taken}) == 4


def test_rows_are_keyed_by_prompt_and_place(tiny_chat):
    (group,) = prompt_groups(pa.Table.from_pylist([pair("p", "a", "b")], schema=PAIRS_TABLE), tiny_chat)
    assert {key for row in group.rows(128) for key, _ in row.taken} == {("p", 0), ("p", 1)}


@st.composite
def groups(draw) -> PromptGroup:
    """A prompt with up to 6 responses and some of the pairs among them."""
    prompt = draw(st.lists(st.integers(3, 5), min_size=1, max_size=10))
    lengths = draw(st.lists(st.integers(1, 12), min_size=2, max_size=6))
    tokens = [Tokens([*prompt, *[10 + i] * n], 0) for i, n in enumerate(lengths)]
    places = draw(
        st.lists(st.sampled_from(list(permutations(range(len(lengths)), 2))), min_size=1, max_size=12, unique=True)
    )
    pairs = [PairOfGroup(f"{a}>{b}", a, b, None, None) for a, b in places]
    return PromptGroup("p", [f"r{i}" for i in range(len(lengths))], tokens, pairs)


def pairs_by_content(group: PromptGroup) -> list[tuple]:
    return [
        (p.pair_id, group.responses[p.chosen], tuple(group.tokens[p.chosen].ids), group.responses[p.rejected],
         tuple(group.tokens[p.rejected].ids))
        for p in group.pairs
    ]  # fmt: skip


@given(group=groups(), row_tokens=st.integers(8, 60), batch_tokens=st.integers(8, 120))
def test_splitting_keeps_every_pair_exactly_once(group, row_tokens, batch_tokens):
    parts = split_group(group, row_tokens, batch_tokens)
    assert Counter(p for part in parts for p in pairs_by_content(part)) == Counter(pairs_by_content(group))
    assert {part.prompt_id for part in parts} == {"p"}


@given(group=groups(), row_tokens=st.integers(8, 60), batch_tokens=st.integers(8, 120))
def test_a_part_fits_the_budget_with_padding_unless_a_single_pair_does_not(group, row_tokens, batch_tokens):
    for part in split_group(group, row_tokens, batch_tokens):
        assert padded_tokens(part.rows(row_tokens)) <= batch_tokens or len(part.pairs) == 1


@given(group=groups(), row_tokens=st.integers(8, 60), batch_tokens=st.integers(8, 120))
def test_a_part_holds_no_response_that_none_of_its_pairs_needs(group, row_tokens, batch_tokens):
    parts = split_group(group, row_tokens, batch_tokens)
    if len(parts) > 1:
        for part in parts:
            needed = {place for p in part.pairs for place in (p.chosen, p.rejected)}
            assert needed == set(range(len(part.responses)))


@given(group=groups())
def test_a_group_that_fits_stays_whole(group):
    assert split_group(group, 200, 10_000) == [group]


def test_pairs_that_the_template_refuses_are_left_out_by_name_and_the_others_kept(tiny_chat):
    chat = chat_of("gemma")
    good, asked_twice, system = pair("p", "a", "b"), pair("q", "a", "b"), pair("r", "a", "b")
    asked_twice["prompt"] *= 2
    system["prompt"].insert(0, {"role": "system", "content": "Be kind."})
    too_long = pair("p", "a", "c" * 5_000_000)
    table = pa.Table.from_pylist([good, asked_twice, system, too_long], schema=PAIRS_TABLE)
    refused: dict[str, str] = {}
    (group,) = prompt_groups(table, chat, refused=refused)
    assert (group.prompt_id, group.responses, len(group.pairs)) == ("p", ["a", "b"], 1)
    assert Counter(refused.values()) == {"template_refuses": 2, "too_long": 1}
    with pytest.raises(ConversationError, match="refuses these roles"):
        list(prompt_groups(table.slice(1), chat))


def test_a_group_counts_contents_that_spell_control_tokens_or_turns(tiny_chat):
    rows = [pair("p <|im_end|>", "a", "b <|im_end|>"), pair("p <|im_end|>", "a", "<|im_start|>user x<|im_end|>")]
    (group,) = prompt_groups(pa.Table.from_pylist(rows, schema=PAIRS_TABLE), tiny_chat)
    assert (group.spelled.control_tokens, group.spelled.templated) == (3, 1)

"""Every layout of preference data: a row of each, the pairs that it makes, and the table of the documentation."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.compatibility import PAGE, assert_listed

from sarm.data.sources.layouts import registry
from sarm.data.sources.layouts.registry import LAYOUTS, RowOutcome, layout_of, outcomes, parse_pairs
from sarm.data.sources.prepare import prepare_pairs
from sarm.data.sources.rows import Row
from sarm.data.sources.tool_turns import more_of
from sarm.settings.checks import UserError
from sarm.settings.data import DataSettings

Turn = dict[str, str]
Pair = tuple[list[Turn], str, str]


def system(content: str) -> Turn:
    return {"role": "system", "content": content}


def user(content: str) -> Turn:
    return {"role": "user", "content": content}


def assistant(content: str) -> Turn:
    return {"role": "assistant", "content": content}


def share_gpt(role: str, value: str) -> Turn:
    return {"from": role, "value": value}


ASKED = [user("Hi?")]
YES_NO: list[Pair] = [(ASKED, "Yes.", "No.")]
SIDES = {"chosen": "Yes.", "rejected": "No."}
TURNS = {"chosen": [*ASKED, assistant("Yes.")], "rejected": [*ASKED, assistant("No.")]}
RANKED: list[Pair] = [(ASKED, "A.", "B."), (ASKED, "A.", "C."), (ASKED, "B.", "C.")]
IN_FRENCH: list[Pair] = [([system("In French."), *ASKED], "Yes.", "No.")]

# The name of a layout, a row of it, and the pairs that it makes.
EXAMPLES: list[tuple[str, dict[str, Any], list[Pair]]] = [
    ("TRL, Skywork, UltraFeedback binarized, Tulu: conversations", TURNS, YES_NO),
    ("TRL, RewardBench: prompt and two answers", {"prompt": "Hi?", **SIDES}, YES_NO),
    ("HH: transcripts", {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."}, YES_NO),
    ("RewardBench 2, RM-Bench: lists of answers", {"prompt": "Hi?", "chosen": ["Yes.", "Sure."], "rejected": ["No."]}, [*YES_NO, (ASKED, "Sure.", "No.")]),
    ("LLaMA-Factory ShareGPT, Axolotl: a conversation and two messages", {"conversations": [share_gpt("human", "Hi?")], "chosen": share_gpt("gpt", "Yes."), "rejected": share_gpt("gpt", "No.")}, YES_NO),
    ("LLaMA-Factory Alpaca", {"instruction": "Say", "input": "hi", "history": [["A?", "B."]], **SIDES}, [([user("A?"), assistant("B."), user("Say\nhi")], "Yes.", "No.")]),
    ("Orca DPO pairs", {"system": "In French.", "question": "Hi?", **SIDES}, IN_FRENCH),
    ("Distilabel Orca pairs", {"system": "In French.", "input": "Hi?", **SIDES}, IN_FRENCH),
    ("Argilla: chosen_response and rejected_response", {"instruction": "Hi?", "chosen_response": "Yes.", "rejected_response": "No."}, YES_NO),
    ("OpenAI preference fine-tuning", {"input": {"messages": ASKED, "tools": []}, "preferred_output": [assistant("Yes.")], "non_preferred_output": [assistant("No.")]}, YES_NO),
    ("Alpaca comparisons: two outputs", {"instruction": "Hi?", "input": "", "output": ["Yes.", "No."]}, YES_NO),
    ("SafeRLHF", {"prompt": "Hi?", "response_0": "No.", "response_1": "Yes.", "better_response_id": 1}, YES_NO),
    ("HelpSteer 3", {"context": ASKED, "response1": "No.", "response2": "Yes.", "overall_preference": 2}, YES_NO),
    ("HelpSteer 2 preferences", {"prompt": "Hi?", "response_1": "Yes.", "response_2": "No.", "preference_strength": -1}, YES_NO),
    ("SHP", {"history": "Hi?", "human_ref_A": "Yes.", "human_ref_B": "No.", "labels": 1, "score_ratio": 2.0}, YES_NO),
    ("Chatbot Arena: two conversations and a winner", {"conversation_a": TURNS["rejected"], "conversation_b": TURNS["chosen"], "winner": "model_b"}, YES_NO),
    ("Chatbot Arena: turns and votes", {"prompt": '["Hi?"]', "response_a": '["Yes."]', "response_b": '["No."]', "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}, YES_NO),
    ("Two responses and a winner", {"question": "Hi?", "response_a": "No.", "response_b": "Yes.", "winner": "B"}, YES_NO),
    ("JudgeBench", {"question": "Hi?", "response_A": "Yes.", "response_B": "No.", "label": "A>B"}, YES_NO),
    ("Prometheus preferences", {"orig_instruction": "Hi?", "orig_response_A": "No.", "orig_response_B": "Yes.", "orig_preference": "B"}, YES_NO),
    ("AlpacaFarm, LLMBar", {"instruction": "Hi?", "input": "", "output_1": "No.", "output_2": "Yes.", "preference": 2}, YES_NO),
    ("WebGPT comparisons", {"question": {"full_text": "Hi?", "id": "1"}, "answer_0": "No.", "answer_1": "Yes.", "score_0": -0.5, "score_1": 0.5}, YES_NO),
    ("Summaries with feedback", {"info": {"post": "Hi?", "title": "x"}, "summaries": [{"text": "No."}, {"text": "Yes."}], "choice": 1}, YES_NO),
    ("UltraFeedback", {"instruction": "Hi?", "completions": [{"response": text, "overall_score": score} for text, score in (("C.", 1), ("A.", 3.5), ("B.", 2))]}, RANKED),
    ("Nectar", {"prompt": "Hi?", "answers": [{"answer": text, "rank": rank} for rank, text in enumerate(["A.", "B.", "C."], 1)]}, RANKED),
    ("Stack Exchange preferences", {"question": "Hi?", "answers": [{"text": "Yes.", "pm_score": 4}, {"text": "No.", "pm_score": 1}]}, YES_NO),
    ("Several responses with scores or ranks", {"prompt": "Hi?", "responses": ["B.", "A.", "C."], "ranks": [2, 1, 3]}, RANKED),
    ("HHH alignment: choices with labels", {"input": "Hi?", "targets": {"choices": ["Yes.", "No."], "labels": [1, 0]}}, YES_NO),
]  # fmt: skip
# The same of layouts with one answer a row.
OF_SEVERAL_ROWS: list[tuple[str, list[dict[str, Any]], list[Pair]]] = [
    ("TRL KTO: a completion and a label", [{"prompt": ASKED, "completion": [assistant("No.")], "label": False}, {"prompt": ASKED, "completion": [assistant("Yes.")], "label": True}], YES_NO),
    ("LLaMA-Factory KTO", [{"conversations": [share_gpt("human", "Hi?"), share_gpt("gpt", text)], "kto_tag": text == "Yes."} for text in ("Yes.", "No.")], YES_NO),
    ("LLaMA-Factory KTO", [{"messages": [*ASKED, assistant(text)], "label": text == "Yes."} for text in ("Yes.", "No.")], YES_NO),
    ("BeaverTails", [{"prompt": "Hi?", "response": text, "is_safe": text == "Yes."} for text in ("Yes.", "No.")], YES_NO),
    ("HelpSteer 1 and 2", [{"prompt": "Hi?", "response": text, "helpfulness": n, "verbosity": 1} for n, text in enumerate(("C.", "B.", "A."))], RANKED),
    ("A response and a score", [{"prompt": "Hi?", "response": text, "score": n / 2} for n, text in enumerate(("C.", "B.", "A."))], RANKED),
]  # fmt: skip


def pairs_of(found: list[RowOutcome]) -> list[Pair]:
    return sorted(
        ((pair.prompt, pair.chosen, pair.rejected) for outcome in found for pair in outcome.pairs), key=lambda p: p[1:]
    )


def read(*rows: dict[str, Any]) -> list[RowOutcome]:
    return list(outcomes([Row(row, str(number)) for number, row in enumerate(rows)], "here"))


@pytest.mark.parametrize(("name", "row", "pairs"), EXAMPLES, ids=[name for name, *_ in EXAMPLES])
def test_a_row_of_each_layout_makes_its_pairs(name, row, pairs):
    (outcome,) = read(row)
    assert (outcome.layout, outcome.reason, outcome.left_out) == (name, None, [])
    assert pairs_of([outcome]) == sorted(pairs, key=lambda pair: pair[1:])


@pytest.mark.parametrize(
    ("name", "rows", "pairs"), OF_SEVERAL_ROWS, ids=[f"{n}-{o[0]}" for n, o in enumerate(OF_SEVERAL_ROWS)]
)
def test_rows_of_one_answer_make_pairs_with_the_others_of_their_prompt(name, rows, pairs):
    alone = {**rows[0], **({"prompt": "Else?"} if "prompt" in rows[0] else {})}
    found = read(*rows, *([alone] if "prompt" in alone else []))
    assert {outcome.layout for outcome in found} == {name}
    assert pairs_of(found) == sorted(pairs, key=lambda pair: pair[1:])
    assert [outcome.reason for outcome in found] == [None] * len(rows) + ["no_partner"] * (len(found) - len(rows))


def test_every_layout_has_an_example_and_stands_in_the_documentation():
    shown = [name for name, *_ in (*EXAMPLES, *OF_SEVERAL_ROWS)]
    assert set(shown) == {layout.name for layout in LAYOUTS}
    assert_listed(
        "layouts",
        ["layout", "columns", "the chosen answer"],
        [
            (layout.name, " + ".join(" or ".join(f"`{n}`" for n in names) for names in layout.needs), layout.rule)
            for layout in LAYOUTS
        ],
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"winner": "tie (bothbad)"}, "no_preference"),
        ({"winner": None}, "no_preference"),
        ({"conversation_a": None}, "no_conversation_a"),
        ({"conversation_a": [user("Hi?"), assistant("Who?"), user("Me."), assistant("No.")]}, "prompt_differs"),
    ],
)
def test_an_arena_row_that_is_no_pair_says_why(change, reason):
    _, row, _ = next(one for one in EXAMPLES if "two conversations" in one[0])
    assert parse_pairs({**row, **change}, "here") == reason


@pytest.mark.parametrize("value", [0, 0.0, None, "tie", [1], float("nan")])
def test_a_preference_of_strength_zero_is_none(value):
    _, row, _ = next(one for one in EXAMPLES if one[0] == "HelpSteer 3")
    assert parse_pairs({**row, "overall_preference": value}, "here") == "no_preference"


def test_an_explicit_prompt_goes_before_a_longer_conversation_unless_that_begins_with_it():
    longer = {
        side: [assistant("Who?"), user("Me."), assistant(text)]
        for side, text in (("chosen", "Yes."), ("rejected", "No."))
    }
    prompt = [user("Hi?"), assistant("Who?"), user("Me.")]
    assert pairs_of(read({"prompt": ASKED, **longer})) == [(prompt, "Yes.", "No.")]
    assert pairs_of(read({"prompt": "Hi?", **longer})) == [(prompt, "Yes.", "No.")]
    whole = {side: [*ASKED, *turns] for side, turns in longer.items()}
    assert pairs_of(read({"prompt": ASKED, **whole})) == [(prompt, "Yes.", "No.")]
    assert pairs_of(read({"prompt": [system("S."), *ASKED], **whole})) == [([system("S."), *prompt], "Yes.", "No.")]
    assert parse_pairs({"prompt": ASKED, **{side: [system("S."), user("Else?"), assistant(side)] for side in longer}}, "") == "prompt_differs"  # fmt: skip


@pytest.mark.parametrize("row", [{"prompt": "Hi?", **SIDES}, TURNS, {"instruction": "Hi?", **SIDES}])
def test_a_system_column_becomes_the_system_turn(row):
    assert pairs_of(read({"system": "In French.", **row})) == IN_FRENCH
    assert pairs_of(read({"system": " ", **row})) == YES_NO
    assert parse_pairs({"system": 5, **row}, "here") == "not_text"


@pytest.mark.parametrize(("name", "row", "pairs"), EXAMPLES, ids=[name for name, *_ in EXAMPLES])
def test_every_layout_reads_system_and_tools(name, row, pairs):
    turn = system("In German.")
    for chosen in (layout_of(row), layout_of(row | {"system": turn["content"]})):
        assert chosen is not None
        assert {"system", "tools"} <= chosen.columns
    found = pairs_of(read(row | {"system": turn["content"]}))
    assert [asked[0] for asked, *_ in found] == [turn] * len(pairs)
    offered = pairs_of(read(row | {"tools": [{"name": "search"}]}))
    assert [sum('"tools"' in turn.get("more", "") for turn in asked) for asked, *_ in offered] == [1] * len(pairs)
    assert [[{k: v for k, v in turn.items() if k != "more"} for turn in asked] for asked, *_ in offered] == [asked for asked, *_ in pairs]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "pairs"), EXAMPLES, ids=[name for name, *_ in EXAMPLES])
def test_a_row_is_the_same_beside_the_empty_columns_of_other_layouts(name, row, pairs):
    """As files with columns have them that hold rows of several layouts."""
    beside = dict.fromkeys(sorted(registry.known_columns())) | row
    assert read(beside) == read(row)


def test_scores_and_subsets_stand_in_for_those_without_a_value():
    row = {"instruction": "Hi?", "completions": [{"response": text, "overall_score": None, "fine-grained_score": score} for text, score in (("Yes.", 2), ("No.", 1))]}  # fmt: skip
    assert pairs_of(read(row)) == YES_NO
    (pair,) = read({"prompt": "Hi?", **SIDES, "subset": None, "category": "chat"})[0].pairs
    assert pair.subset == "chat"


SPELLED = {name: json.dumps(messages, indent=1) for name, messages in TURNS.items()}


def test_messages_that_a_text_spells_are_messages():
    assert pairs_of(read(SPELLED)) == YES_NO
    assert pairs_of(read(SPELLED | {"prompt": "Hi?"})) == YES_NO
    assert pairs_of(read({"prompt": json.dumps(ASKED), **SIDES})) == YES_NO
    assert pairs_of(read({"conversations": json.dumps([share_gpt("human", "Hi?")]), **SIDES})) == YES_NO


@pytest.mark.parametrize("spell", [repr, lambda turns: "array([" + "\n ".join(map(repr, turns)) + "], dtype=object)", lambda turns: json.dumps(turns)[:-1]])  # fmt: skip
def test_messages_in_a_spelling_that_is_no_json_are_no_answer(spell):
    row = {"prompt": "Hi?", **{name: spell(messages) for name, messages in TURNS.items()}}
    assert read(row)[0].reason == "spelled_messages"
    assert read({"prompt": spell(ASKED), **SIDES})[0].reason == "spelled_messages"


@pytest.mark.parametrize("text", ['["Yes."]', '[{"name": "Ann", "age": 3}]', "[{'id': 1}]", '[{"value": 1}]'])
def test_lists_of_other_things_are_texts(text):
    assert pairs_of(read({"prompt": "Hi?", "chosen": text, "rejected": "No."})) == [(ASKED, text, "No.")]


def test_contents_in_parts_are_joined_and_other_names_of_roles_are_known():
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i?", "image_url": None}]
    prompt = [{"role": "human", "content": parts}]
    assert pairs_of(read({"prompt": prompt, **SIDES})) == YES_NO


def test_an_answer_that_cannot_be_used_leaves_the_pairs_of_the_others():
    row = {"prompt": "Hi?", "responses": ["A.", " ", "B."], "scores": [3, 2, 1]}
    (outcome,) = read(row)
    assert pairs_of([outcome]) == [(ASKED, "A.", "B.")]
    assert outcome.left_out == ["empty_answer", "empty_answer"]
    assert parse_pairs({**row, "scores": [1, 1, 1]}, "") == "no_preference"
    assert parse_pairs({**row, "scores": [1, 2]}, "") == "scores_differ_in_number"
    assert parse_pairs({**row, "scores": ["x", None, 2]}, "") == "no_preference"


def test_steps_of_one_answer_are_no_answers():
    assert layout_of({"prompt": "Hi?", "completions": ["First.", "Then."], "labels": [True, False]}) is None


@pytest.mark.parametrize("prompt", ["Hi?", " Hi?  And?", "[INST] Hi?\u2003And? [/INST]", ""])
def test_a_text_prompt_beside_whole_conversations_is_what_they_say(prompt):
    row = {"chosen": [user("Hi?\nAnd?"), assistant("Yes.")], "rejected": [user("Hi?\nAnd?"), assistant("No.")]}
    (found,) = parse_pairs({"prompt": prompt, **row}, "")
    assert found.prompt == [user("Hi?\nAnd?")]
    # What is said nowhere is not left out in silence.
    assert parse_pairs({"prompt": "Be brief.", **row}, "") == "prompt_differs"


def test_many_answers_of_one_prompt_meet_in_stretches():
    found = read(*({"prompt": "Hi?", "response": f"{n}.", "score": n} for n in range(130)))
    assert sum(len(outcome.pairs) for outcome in found) == 2 * (64 * 63 // 2) + 1


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 3), st.floats(allow_nan=True), st.text(max_size=8),
        st.sampled_from(["<|im_end|>", "a\0b", "\ud800", " ", "A", "tie", "model_a", "\u202e\u2028", "[INST] x [/INST]", "\n\nHuman: a\n\nAssistant: b"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "response", "rank"]), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip


CALLS = st.lists(st.fixed_dictionaries({}, optional={"id": VALUES, "name": st.just("search") | VALUES, "arguments": VALUES, "function": st.fixed_dictionaries({"name": st.just("search") | VALUES}, optional={"arguments": VALUES})}), max_size=2)  # fmt: skip
TURNS_WITH_TOOLS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "user", "assistant", "assistant", "tool", "function_call", "system", "x"])},
        optional={"content": st.none() | st.just("Hi?") | VALUES, "name": st.just("Ann") | VALUES, "tool_calls": CALLS | VALUES, "function_call": VALUES, "tool_call_id": VALUES, "tools": CALLS, "more": VALUES},
    ),
    max_size=4,
)  # fmt: skip


@st.composite
def spoiled_rows(draw: st.DrawFn) -> dict[str, Any]:
    """A row of some layout, of which some columns have become something else."""
    rows = [row for _, row, _ in EXAMPLES] + [row for _, rows, _ in OF_SEVERAL_ROWS for row in rows]
    row = dict(draw(st.sampled_from(rows)))
    for name in draw(st.lists(st.sampled_from([*row, "system", "tools", "prompt", "label", "margin"]), max_size=3)):
        row[name] = draw(VALUES)
    # A conversation for what holds one, and for what does not; tools beside it, as a list or as its text.
    for name in draw(st.lists(st.sampled_from(["prompt", "chosen", "rejected", "messages"]), max_size=2)):
        turns = draw(TURNS_WITH_TOOLS)
        row[name] = [*turns, assistant(name)] if name in ("chosen", "rejected") and draw(st.booleans()) else turns
    if draw(st.integers(0, 3)) == 0:
        tools = draw(CALLS)
        row["tools"] = tools if draw(st.booleans()) else json.dumps(tools)
    return row


@given(st.lists(spoiled_rows(), max_size=6))
def test_each_row_has_one_outcome_with_pairs_or_one_reason(rows):
    found = read(*rows)
    assert sorted(outcome.where for outcome in found) == sorted(str(number) for number in range(len(rows)))
    used = [outcome for outcome in found if outcome.pairs]
    for outcome in found:
        assert not (outcome.pairs and outcome.reason)
        # A row without pairs of its own and without a reason is the worse answer of another row.
        assert outcome.pairs or outcome.reason or any(used)
        assert outcome.reason is None or (
            (outcome.reason.isidentifier() and outcome.reason.islower()) or "_" in outcome.reason
        )
        for pair in outcome.pairs:
            assert pair.prompt[-1]["role"] in ("user", "tool")
            assert all(turn.keys() <= {"role", "content", "more"} for turn in pair.prompt)
            assert all(more_of(turn) for turn in pair.prompt if "more" in turn), "what is kept can be read again"
            for text in (*(turn["content"] for turn in pair.prompt), pair.chosen, pair.rejected):
                text.encode()
            assert pair.chosen.strip() != pair.rejected.strip()


@given(st.lists(spoiled_rows(), max_size=8), st.data())
def test_rows_in_are_rows_out_and_rejected_by_reason(rows, data):
    """Over a whole preparation, of rows that make a pair each or none: what several make is counted by pairs."""
    made = [(row, parse_pairs(row, "")) for row in rows]
    lines = [
        json.dumps(row).encode()
        for row, found in made
        if found != "no_partner" and (isinstance(found, str) or len(found) == 1)
    ]
    lines += data.draw(st.lists(st.sampled_from([b"{torn", b"[1]", b'{"prompt": "\xff"}']), max_size=2))
    good = [{"prompt": f"Number {n}?", **SIDES} for n in range(40)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(b"\n".join([*(json.dumps(row).encode() for row in good), *lines]))
        counts = prepare_pairs(DataSettings(pairs=(str(path),), heldout_share=0.5), Path(folder) / "out")
    kept = counts["rows"] + counts["duplicates"] + counts["contradictory"] + counts["over_prompt_cap"]
    assert kept + sum(counts["rejected"].values()) == len(good) + len(lines)


def test_an_instruction_with_one_output_holds_no_preferences(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "Hi?", "input": "", "output": "Yes."}))
    with pytest.raises(UserError, match=r"holds no preference pairs: it has instruction, input, output"):
        prepare_pairs(DataSettings(pairs=(str(tmp_path / "a.jsonl"),)), tmp_path / "out")


def test_messages_beside_a_question_are_answers():
    assert pairs_of(read({"question": "Hi?", "chosen": assistant("Yes."), "rejected": assistant("No.")})) == YES_NO
    assert pairs_of(read({"question": "Hi?", "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]})) == YES_NO


def test_every_reason_for_which_a_row_is_rejected_is_explained():
    sources = Path(registry.__file__).parents[1]
    words = set()
    for path in (
        *sources.glob("layouts/*.py"),
        *sources.glob("containers/*.py"),
        sources / "conversations.py",
        sources / "tool_turns.py",
    ):
        words |= set(re.findall(r"""(?:Fault|Reject)\((?:f?)"([a-z_0-9]+)\"""", path.read_text()))
        words |= set(re.findall(r'return (?:"", )?"([a-z_0-9]+)"', path.read_text()))
    assert {"no_preference", "ragged_row", "nul_byte", "part_not_text"} <= words
    explained = set(re.findall(r"`([a-z_0-9]+)`", PAGE.read_text(encoding="utf-8")))
    # Of a text that is empty the readers of pairs say which.
    assert sorted(words - explained - {"empty"}) == []


def test_a_layout_that_nobody_knows_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"frage": "x", "gut": "y", "schlecht": "z"}))
    with pytest.raises(UserError, match=r"it has frage, gut, schlecht.*--data.columns"):
        prepare_pairs(DataSettings(pairs=(str(tmp_path / "a.jsonl"),)), tmp_path / "out")

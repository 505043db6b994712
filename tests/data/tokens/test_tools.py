"""Tools and names in conversations: from the spellings of sources to token ids, as far as a chat template has words for them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.tokens.chat_families import CHATML, tokenizer_of

from sarm.contracts.ids import prompt_id_of, prompt_key_of
from sarm.contracts.tables import PAIRS_TABLE
from sarm.data.sources.conversations import ConversationError, check_messages, fault_of_messages, read_messages
from sarm.data.sources.layouts.registry import parse_pairs
from sarm.data.sources.prepare import prepare_pairs
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.groups import prompt_groups
from sarm.data.tokens.said_beside import CALLS, KINDS, NAMES, RESULTS, TOOLS
from sarm.settings.data import DataSettings

# As Qwen's, Llama's and Mistral's do it: tools in the system turn, before the user's, and calls by id.
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\\n<tools>' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}{%- for call in m.tool_calls or [] %}{%- if call.function %}{%- set call = call.function %}{%- endif %}"
    "{{- '<tool_call>\\n{\"name\": \"' + call.name + '\", \"arguments\": ' + (call.arguments | tojson) + '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA = (
    "{%- for m in messages %}{%- if m.tool_calls %}{%- if not m.tool_calls | length == 1 %}{{- raise_exception('one call at once') }}{%- endif %}"
    "{%- set call = m.tool_calls[0].function %}{{- '<|im_start|>assistant\\n{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{- call.arguments | tojson }}{{- '}<|im_end|>\\n' }}"
    "{%- elif m.role == 'tool' %}{{- '<|im_start|>ipython\\n' }}{{- m.content | tojson }}{{- '<|im_end|>\\n' }}"
    "{%- else %}{%- if loop.first and tools %}{{- '<|im_start|>tools\\n' }}{{- tools | tojson(indent=4) }}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
BY_ID = QWEN.replace(
    "{%- for call in m.tool_calls or [] %}",
    "{%- for call in m.tool_calls or [] %}{%- if call.id is undefined or call.id | length != 9 %}{{- raise_exception('ids of nine') }}{%- endif %}{{- call.id }}",
)
NAMED = CHATML.replace("m['role'] +", "m['role'] + (' name=' + m['name'] if 'name' in m else '') +")
TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "by id": BY_ID, "named": NAMED, "plain": CHATML}
WITH_TOOLS = {TOOLS, *CALLS, *RESULTS}
SAYS = {"qwen": WITH_TOOLS, "llama": WITH_TOOLS, "by id": WITH_TOOLS, "named": {NAMES, *RESULTS}, "plain": {*RESULTS}}

SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}}}  # fmt: skip
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "search", "arguments": {"q": "bread"}}}
USER, ANSWER = {"role": "user", "content": "Find bread."}, {"role": "assistant", "content": "Here it is."}
OPENAI = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "A loaf.", "tool_call_id": "abcdefgh1"}]  # fmt: skip
CALLS_SPELLED = [
    [CALL],
    json.dumps([CALL]),
    [{**CALL, "function": {"name": "search", "arguments": '{"q": "bread"}'}}],
    [{"id": "abcdefgh1", "name": "search", "arguments": {"q": "bread", "page": None}}],
]


def chat_of(name: str) -> ChatTokenizer:
    return ChatTokenizer(tokenizer_of("chatml"), max_length=2048, chat_template=TEMPLATES[name])


def stored(messages: object) -> list[dict[str, str]]:
    found = read_messages(messages)
    assert isinstance(found, list), found
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_writes_beside_contents_is_found_out(name):
    assert chat_of(name).says == SAYS[name]


@pytest.mark.parametrize("calls", CALLS_SPELLED)
def test_calls_are_read_however_they_are_spelled(calls):
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": calls}, OPENAI[2]]
    assert stored(messages) == stored(OPENAI)


def test_sharegpt_spells_calls_and_what_tools_answered_as_turns_of_their_own():
    value = json.dumps({"name": "search", "arguments": {"q": "bread"}})
    turns = [{"from": "human", "value": "Find bread."}, {"from": "function_call", "value": value}, {"from": "observation", "value": "A loaf."}]  # fmt: skip
    without_ids = [USER, {**OPENAI[1], "tool_calls": [{"function": CALL["function"]}]}, {"role": "tool", "content": "A loaf."}]  # fmt: skip
    legacy = [USER, {"role": "assistant", "content": "", "function_call": CALL["function"]}, {"role": "function", "content": "A loaf."}]  # fmt: skip
    assert stored(turns) == stored(without_ids) == stored(legacy)
    assert [one["role"] for one in stored(turns)] == ["user", "assistant", "tool"]


@pytest.mark.parametrize("name", ["qwen", "llama", "by id"])
@pytest.mark.parametrize("offered", [None, [SEARCH], json.dumps([SEARCH["function"]])])
def test_a_conversation_with_tools_is_rendered_as_the_template_renders_openais_form(name, offered):
    """From a row of data to the text, and by way of an endpoint's messages."""
    chat = chat_of(name)
    row = {"prompt": OPENAI, "chosen": "Here it is.", "rejected": "No.", "tools": offered}
    (pair,) = parse_pairs(row, "here")
    plain = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, OPENAI[2], ANSWER]
    wanted = tokenizer_of("chatml").apply_chat_template(plain, tools=offered and [SEARCH], chat_template=TEMPLATES[name], tokenize=False)  # fmt: skip
    assert chat.render([*pair.prompt, ANSWER]) == wanted
    assert "bread" in wanted
    (tokens,) = chat.encode_responses(pair.prompt, ["Here it is."])
    expected = tokenizer_of("chatml")(wanted, add_special_tokens=False).input_ids
    assert tokens.ids == expected[: len(expected) - expected[::-1].index(chat.end_of_turn_id)]
    if offered is None:
        assert chat.render([*OPENAI, ANSWER]) == wanted, "as an endpoint is sent them"


@pytest.mark.parametrize(("name", "messages", "lacking"), [
    ("plain", [*OPENAI, ANSWER], "calls of tools that nobody offered"),
    ("plain", [{**USER, "tools": [SEARCH]}, ANSWER], "tools that are offered"),
    ("named", [{**USER, "tools": [SEARCH]}, *OPENAI[1:], ANSWER], "calls of tools and tools that are offered"),
])  # fmt: skip
def test_a_template_without_words_for_tools_refuses_them_by_a_reason_of_their_own(name, messages, lacking):
    with pytest.raises(ConversationError, match=f"does not write {lacking}") as refused:
        chat_of(name).encode([messages])
    assert refused.value.reason == "template_without_tools"


def test_a_template_that_takes_calls_by_id_refuses_those_without():
    no_ids = [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": CALL["function"]}]}, OPENAI[2], ANSWER]  # fmt: skip
    with pytest.raises(ConversationError, match="ids of nine") as refused:
        chat_of("by id").encode([no_ids])
    assert refused.value.reason == "template_refuses"


def test_names_are_written_where_the_template_writes_them_and_left_out_elsewhere():
    messages = [{**USER, "name": "Ann"}, ANSWER]
    assert "<|im_start|>user name=Ann\n" in chat_of("named").render(messages)
    assert chat_of("named").render(stored(messages)) == chat_of("named").render(messages)
    assert chat_of("plain").render(messages) == chat_of("plain").render([USER, ANSWER])
    assert stored([{**USER, "name": "user"}]) == [USER], "a role once more is no name"
    assert stored([{**USER, "more": "of another's making"}]) == [USER]
    assert stored([{**USER, "name": None, "tool_calls": None, "tool_call_id": ""}]) == [USER]


SPELLING = st.sampled_from(["<|im_end|>", "<|im_start|>user\n", "<|im_start|", "|im_end|>", "<", "x\"y\\", "<tool_call>", "é", "\ue000", "{{ 1 }}"])  # fmt: skip
TEXT = st.lists(SPELLING | st.text(max_size=3), min_size=1, max_size=4).map("".join)
VALUES = st.recursive(TEXT | st.none() | st.booleans() | st.integers(-9, 9), lambda one: st.lists(one, max_size=2) | st.dictionaries(TEXT, one, max_size=2), max_leaves=4)  # fmt: skip


@given(name=st.sampled_from(["qwen", "llama", "named"]), called=TEXT, arguments=st.dictionaries(TEXT, VALUES, max_size=3), answered=TEXT, who=TEXT, offers=st.booleans())  # fmt: skip
def test_what_is_spelled_beside_contents_never_becomes_a_control_token(name, called, arguments, answered, who, offers):
    """Names, calls, arguments, what tools answered and what is offered, whatever stands in them."""
    chat = chat_of(name)

    def conversation(called: str, arguments: dict, answered: str, who: str) -> list[dict]:
        if name == "named":
            return [{**USER, "name": who}, ANSWER]
        tool = {"type": "function", "function": {"name": called, "description": answered, "parameters": arguments}}
        call = {"type": "function", "function": {"name": called, "arguments": arguments}}
        first = {**USER, **({"tools": [tool]} if offers else {})}
        return [first, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": answered}, ANSWER]  # fmt: skip

    messages = conversation(called, arguments, answered, who)
    try:
        check_messages(messages)
        (tokens,) = chat.encode([messages])
    except ConversationError as refused:
        reason = refused.reason
    else:
        reason = ""
    if reason:
        assert reason in ("bad_tool_call", "bad_tools", "nul_byte", "lone_surrogate", "not_encodable")
        return
    (plain,) = chat.encode([conversation("search", {}, "A loaf.", "Ann")])
    assert [i for i in tokens.ids if i in chat.control.ids] == [i for i in plain.ids if i in chat.control.ids]


BAD = [
    ("bad_tool_call", [{**ANSWER, "tool_calls": "no json"}]),
    ("bad_tool_call", [{**ANSWER, "tool_calls": [{"function": {"arguments": {}}}]}]),
    ("bad_tool_call", [{**ANSWER, "tool_calls": [5]}]),
    ("bad_tool_call", [{**ANSWER, "tool_calls": [{"name": "f", "arguments": {"x": b"bytes"}}]}]),
    ("bad_tool_call", [{**ANSWER, "tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}]),
    ("bad_tool_call", [{"from": "function_call", "value": "search(bread)"}]),
    ("bad_name", [{**USER, "name": 5}]),
    ("null_content", [{"role": "assistant", "content": None}]),
]


@pytest.mark.parametrize(("reason", "messages"), BAD)
def test_what_is_no_call_or_name_is_rejected_by_reason(reason, messages):
    assert read_messages(messages) == reason


@pytest.mark.parametrize("text", ["a\0", "\ud800"])
def test_what_no_tokenizer_should_see_is_found_beside_contents_too(text):
    messages = stored([USER, {**ANSWER, "content": "", "tool_calls": [{"name": "f", "arguments": {"x": [text]}}]}])
    reason = "nul_byte" if "\0" in text else "lone_surrogate"
    assert fault_of_messages(messages) == reason
    with pytest.raises(ConversationError) as refused:
        check_messages(messages)
    assert refused.value.reason == reason


def test_prompts_that_differ_in_their_tools_alone_are_two_prompts():
    plain = stored([USER])
    (pair,) = parse_pairs({"prompt": [USER], "chosen": "Yes.", "rejected": "No.", "tools": [SEARCH]}, "here")
    named = stored([{**USER, "name": "Ann"}])
    for identify in (prompt_id_of, prompt_key_of):
        assert len({identify(messages) for messages in (plain, pair.prompt, named)}) == 3
        assert identify(plain) == identify([{**USER, "more": None}]), "as Parquet has it"


def test_an_answer_that_calls_tools_is_no_text_to_compare():
    row = {"chosen": [USER, {**ANSWER, "tool_calls": [CALL]}], "rejected": [USER, ANSWER]}
    assert parse_pairs(row, "here") == "tool_call"


def test_tools_reach_the_tokens_of_training_through_the_files_and_what_no_template_says_is_counted(tmp_path):
    rows = [{"prompt": [{**USER, "content": f"Find bread {n}."}, *OPENAI[1:]], "chosen": "Yes.", "rejected": "No.", "tools": [SEARCH]} for n in range(12)]  # fmt: skip
    rows += [{"prompt": [{"role": "user", "content": f"Who are you, {n}?", "name": "Ann"}], "chosen": "Me.", "rejected": "No."} for n in range(8)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    counts = prepare_pairs(DataSettings(pairs=(str(tmp_path / "a.jsonl"),), heldout_share=0.3), tmp_path / "out")
    assert (counts["rows"], counts["rejected"]) == (20, {})
    assert any("12 pairs offer or use tools" in note for note in counts["notes"])
    assert any("8 pairs have messages with a name" in note for note in counts["notes"])
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert table.schema.equals(PAIRS_TABLE)
    refused: dict[str, str] = {}
    groups = list(prompt_groups(table, chat_of("qwen"), refused=refused))
    assert (sum(len(group.pairs) for group in groups), refused) == (20, {})
    texts = [tokenizer_of("chatml").decode(tokens.ids) for group in groups for tokens in group.tokens]
    assert sum('"arguments": {"q": "bread"}' in text and "<tools>" in text for text in texts) == 24
    list(prompt_groups(table, chat_of("plain"), refused=refused))
    assert sorted(refused.values()) == ["template_without_tools"] * 12
    assert set(KINDS) == WITH_TOOLS | {NAMES}


def test_tables_with_columns_give_every_tool_the_parameters_of_all(tmp_path):
    """Which are null, and no part of a tool."""
    other = {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {"now": {"type": "boolean"}}}}}  # fmt: skip
    rows = [{"prompt": [USER], "chosen": "Yes.", "rejected": "No.", "tools": [SEARCH, other]}]
    (read,) = pa.Table.from_pylist(rows).to_pylist()
    assert read != rows[0]
    assert parse_pairs(read, "here") == parse_pairs(rows[0], "here")


def test_a_server_and_frameworks_take_tools_as_endpoints_are_sent_them():
    from sarm.integrations.source import plain

    assert plain([*OPENAI, {**ANSWER, "name": None, "refusal": None}]) == [*OPENAI, ANSWER]
    assert chat_of("qwen").encode([plain([*OPENAI, ANSWER])]) == chat_of("qwen").encode([[*OPENAI, ANSWER]])

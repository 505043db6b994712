import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sarm.contracts.tables import CONVERSATIONS_TABLE, MESSAGE
from sarm.data.sources.prepare import prepare_corpus
from sarm.data.sources.rows import Reject
from sarm.data.sources.texts import TextRecord, check_source, open_texts
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.windows import chat_windows
from sarm.settings.checks import UserError
from sarm.settings.data import DataSettings

ASKED = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven."}]
SWAPPED = [{"role": "assistant", "content": "How many?"}, {"role": "user", "content": "Seven."}]


def jsonl(path, *rows: object) -> str:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


def test_conversations_are_read_with_what_is_said_as_their_text(tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", [{**ASKED[0], "name": "x"}, ASKED[1]])
    named = [{**ASKED[0], "more": '{"name": "x"}'}, ASKED[1]]
    assert list(open_texts(spec, "messages")) == [TextRecord("How many?\n\nSeven.", spec, named)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": pa.array([ASKED], pa.list_(MESSAGE))}), path)
    check_source(str(path), "messages")
    assert list(open_texts(str(path), "messages")) == [TextRecord("How many?\n\nSeven.", str(path), ASKED)]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "empty"),
        ([{"role": "system", "content": ""}], "empty"),
        ([{"role": "user", "content": " \n"}], "empty"),
        ([{"role": "user", "content": "a\0"}], "nul_byte"),
        ([{"role": "assistant", "content": "a", "tool_calls": [5]}], "bad_tool_call"),
        ([{"role": "wizard", "content": "a"}], "bad_roles"),
        ([{"role": "user", "content": None}], "null_content"),
        (["a"], "not_text"),
        ({"role": "user"}, "not_a_string"),
    ],
)
def test_what_is_no_conversation_is_rejected_by_reason(tmp_path, messages, reason):
    spec = jsonl(tmp_path / "a.jsonl", messages)
    assert [r.reason for r in open_texts(spec, "messages") if isinstance(r, Reject)] == [reason]


def test_a_list_of_something_else_is_refused(tmp_path):
    pq.write_table(pa.table({"text": [["a"]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="lists of messages with role and content"):
        check_source(str(tmp_path / "a.parquet"))


def test_a_corpus_of_conversations_keeps_the_messages_and_tells_roles_apart(tmp_path):
    spec = jsonl(tmp_path / "a.jsonl", ASKED, SWAPPED, ASKED, "a plain text")
    counts = prepare_corpus(DataSettings(texts=(spec,), text_field="messages"), tmp_path / "out")
    assert (counts["rows"], counts["conversations"], counts["duplicates"]) == (3, 2, 1)
    table = pq.read_table(tmp_path / "out")
    assert table.schema.equals(CONVERSATIONS_TABLE)
    messages = table.column("messages").to_pylist()
    assert [m and [{k: v for k, v in one.items() if k != "more" or v} for one in m] for m in messages] == [ASKED, SWAPPED, None]  # fmt: skip
    assert len(set(table.column("row_id").to_pylist())) == 3


def test_the_window_of_a_conversation_is_the_rendered_one_and_its_final_token_is_taken(tiny_chat: ChatTokenizer):
    (window,) = chat_windows(7, ASKED, tiny_chat)
    assert window.ids.tolist() == tiny_chat.encode([ASKED])[0].ids
    assert window.columns["chat"].tolist() == [len(window.ids) - 1]
    assert window.ids[-1] == tiny_chat.end_of_turn_id
    long = [{"role": "user", "content": "word " * 300}, ASKED[1]]
    (cut,) = chat_windows(7, long, tiny_chat)
    assert (cut.truncated, len(cut.ids), cut.ids[-1]) == (True, tiny_chat.max_length, tiny_chat.end_of_turn_id)
    assert cut.first > 100
    assert chat_windows(7, None, tiny_chat) == []

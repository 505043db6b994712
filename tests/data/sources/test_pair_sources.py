import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from sarm.contracts.tables import PAIRS_TABLE, pa
from sarm.data.sources.built_in import BUILT_IN_PAIRS
from sarm.data.sources.layouts import registry
from sarm.data.sources.layouts.layout import Answers, Layout, RawPair
from sarm.data.sources.layouts.registry import parse_pairs
from sarm.data.sources.pairs import check_source, open_pairs
from sarm.data.sources.rows import Reject
from sarm.settings.checks import UserError

HH_FILE = Path(__file__).parents[4] / "shared/data/hh_rlhf_harmless/pairs.jsonl.gz"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def pair(*, prompt=(user("Hi?"),), chosen="Yes.", rejected="No.", subset=None, margin=None) -> RawPair:
    return RawPair(list(prompt), chosen, rejected, "here", subset, margin)


def parse_pair(fields: dict, source: str) -> RawPair | str:
    """Of a row that makes one pair, this one."""
    found = parse_pairs(fields, source)
    if isinstance(found, str):
        return found
    (only,) = found
    return only


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_message_lists_share_all_but_the_last_message():
    row = {
        "prompt": "Hi?",
        "chosen": [user("Hi?"), assistant("Who?"), user("Me."), assistant("Yes.")],
        "rejected": [user("Hi?"), assistant("Who?"), user("Me."), {**assistant("No."), "score": 3}],
    }
    assert parse_pair(row, "here") == pair(prompt=[user("Hi?"), assistant("Who?"), user("Me.")])


def test_lists_of_the_answer_alone_take_the_prompt_column():
    row = {"prompt": [user("Hi?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}
    assert parse_pair(row, "here") == pair()


def test_strings_with_a_prompt_string_or_list():
    system = {"role": "system", "content": ""}
    assert parse_pair({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}, "here") == pair()
    row = {"prompt": [system, user("Hi?")], "chosen": "Yes.", "rejected": "No."}
    assert parse_pair(row, "here") == pair(prompt=[system, user("Hi?")])


def test_human_and_assistant_turns_are_split_into_messages():
    shared = "\n\nHuman: Hi?\n\nAssistant: Who:\n\n1. me\n\nHuman: Me.\n\nAssistant:"
    expected = pair(prompt=[user("Hi?"), assistant("Who:\n\n1. me"), user("Me.")])
    assert parse_pair({"chosen": f"{shared} Yes.", "rejected": f"{shared} No."}, "here") == expected
    assert parse_pair({"prompt": shared, "chosen": "Yes.", "rejected": "No."}, "here") == expected


@pytest.mark.parametrize("column", ["safer_response_id", "better_response_id"])
@pytest.mark.parametrize("safer", [0, 1])
def test_the_safer_response_is_chosen(column, safer):
    answers = {f"response_{safer}": "Yes.", f"response_{1 - safer}": "No."}
    assert parse_pair({"prompt": "Hi?", **answers, column: safer}, "here") == pair()


def test_safety_goes_before_preference_where_both_are_given():
    row = {"prompt": "Hi?", "response_0": "Yes.", "response_1": "No.", "better_response_id": 1, "safer_response_id": 0}
    assert parse_pair(row, "here") == pair()


def test_subset_or_category_and_margin_are_carried_over():
    row = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
    assert parse_pair({**row, "subset": "a", "margin": 2}, "here") == pair(subset="a", margin=2.0)
    assert parse_pair({**row, "category": "b", "margin": float("nan")}, "here") == pair(subset="b")
    assert parse_pair({**row, "subset": 5, "margin": "wide"}, "here") == pair()


HH = "\n\nHuman: Hi?\n\nAssistant: "


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("no_chosen", {"chosen": None}),
        ("no_rejected", {"rejected": None}),
        ("no_prompt", {"prompt": None}),
        ("not_text", {"chosen": 5}),
        ("not_text", {"prompt": {"text": "Hi?"}}),
        ("not_text", {"prompt": ["Hi?"]}),
        ("null_content", {"prompt": [{"role": "user", "content": None}]}),
        ("not_text", {"chosen": [assistant("Yes.")]}),
        ("nul_byte", {"chosen": "a\0"}),
        ("lone_surrogate", {"prompt": "\ud800"}),
        ("empty_prompt", {"prompt": " "}),
        ("empty_prompt", {"prompt": []}),
        ("empty_prompt", {"chosen": [assistant("Yes.")], "rejected": [assistant("No.")], "prompt": None}),
        ("empty_answer", {"rejected": " \n"}),
        ("empty_answer", {"chosen": [], "rejected": []}),
        ("equal_answers", {"chosen": "No. "}),
        ("prompt_differs", {"chosen": [user("A?"), assistant("Yes.")], "rejected": [user("B?"), assistant("No.")]}),
        ("prompt_differs", {"prompt": None, "chosen": HH + "a\n\nHuman: b\n\nAssistant: c", "rejected": HH + "No."}),
        ("bad_roles", {"chosen": [user("A?"), user("Yes.")], "rejected": [user("A?"), user("No.")]}),
        ("bad_roles", {"prompt": [{"role": "wizard", "content": "x"}]}),
        ("bad_roles", {"prompt": [user("Hi?"), {**assistant(""), "tool_calls": [{"name": "search"}]}]}),
        ("bad_tool_call", {"prompt": [user("Hi?"), {**assistant(""), "tool_calls": [{"arguments": {}}]}]}),
        ("tool_call", {"chosen": {**assistant(""), "tool_calls": [{"name": "search"}]}, "rejected": assistant("No.")}),
        ("part_not_text", {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}),
        ("bad_tools", {"tools": [{"title": "search"}]}),
        ("bad_tools", {"tools": "search"}),
        ("two_system_turns", {"system": "A.", "prompt": [{"role": "system", "content": "B."}, user("Hi?")]}),
        ("bad_roles", {"prompt": [{"role": ["user"], "content": "x"}]}),
        ("bad_roles", {"prompt": [user("Hi?"), assistant("Who?")]}),
    ],
)
def test_a_row_that_is_no_pair_is_rejected_by_reason(reason, change):
    assert parse_pair({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No.", **change}, "here") == reason


@pytest.mark.parametrize("safer", [None, 2, -1, "x", [0]])
def test_a_row_without_a_safer_response_has_no_preference(safer):
    row = {"prompt": "Hi?", "response_0": "a", "response_1": "b", "safer_response_id": safer}
    assert parse_pair(row, "here") == "no_preference"


@pytest.mark.parametrize(("missing", "reason"), [(0, "no_chosen"), (1, "no_rejected")])
def test_a_missing_response_is_named_by_its_side(missing, reason):
    row = {"prompt": "Hi?", "response_0": "a", "response_1": "b", "safer_response_id": 0, f"response_{missing}": None}
    assert parse_pair(row, "here") == reason


def test_a_file_gives_pairs_and_rejects_in_order(tmp_path):
    good = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
    spec = write(tmp_path / "a.jsonl", good, {"prompt": "Hi?", "chosen": "Yes."}, {**good, "chosen": "Sure."})
    with Path(spec).open("a") as file:
        file.write("{torn\n")
    found = list(open_pairs(spec))
    assert [type(item) for item in found] == [RawPair, Reject, RawPair, Reject]
    assert found[1] == Reject("no_rejected", f"{spec}:2")
    assert found[3] == Reject("bad_json", f"{spec}:4")
    assert found[0].source == spec
    assert [item.chosen for item in open_pairs(spec, limit=1)] == ["Yes."]


def test_our_own_pairs_are_read_back(tmp_path):
    row = {
        "pair_id": "p",
        "prompt_id": "q",
        "prompt": [user("Hi?")],
        "chosen": "Yes.",
        "rejected": "No.",
        "source": "x",
        "split": "train",
        "subset": "s",
        "margin": 0.5,
    }
    pq.write_table(pa.Table.from_pylist([row], schema=PAIRS_TABLE), tmp_path / "a.parquet")
    spec = str(tmp_path / "a.parquet")
    assert list(open_pairs(spec)) == [pair(subset="s", margin=0.5)._replace(source=spec)]


@pytest.mark.parametrize(
    "columns",
    [
        {"text": "x"},
        {"prompt": "x", "chosen": "y"},
        {"prompt": "x", "response_0": "y", "response_1": "z"},
    ],
)
def test_columns_of_no_layout_are_refused_with_those_that_are_understood(tmp_path, columns):
    near = "response_0.*safer_response_id" if "response_0" in columns else r"prompt \+ chosen \+ rejected"
    message = f"it has {', '.join(columns)}. Near layouts are .*{near}.*--data.columns"
    with pytest.raises(UserError, match=message):
        open_pairs(write(tmp_path / "a.jsonl", columns))
    pq.write_table(pa.Table.from_pylist([columns]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        check_source(str(tmp_path / "a.parquet"))


def test_a_layout_is_one_entry_read_told_apart_by_columns_and_named_in_errors(tmp_path, monkeypatch):
    ranked = Layout(
        name="Ranked",
        rule="the first",
        needs=(("question",), ("answers", "replies")),
        may_have=(),
        fits=lambda fields: "answers" in fields,
        read=lambda fields: [Answers([user(fields["question"])], *fields["answers"])],
    )
    monkeypatch.setattr(registry, "LAYOUTS", (ranked, *registry.LAYOUTS))
    rows = [{"question": "Hi?", "replies": None, "answers": ["Yes.", "No."], "other": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    spec = str(tmp_path / "a.parquet")
    assert list(open_pairs(spec)) == [pair()._replace(source=spec)]
    with pytest.raises(UserError, match=r"it has replies. Near layouts are question \+ answers or replies\."):
        open_pairs(write(tmp_path / "b.jsonl", {"replies": "x"}))


def test_an_unknown_source_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=f"one of {', '.join(BUILT_IN_PAIRS)}"):
        check_source("demo:openwebtext")


def test_tiny_pairs_are_a_source():
    found = list(open_pairs("tiny:pairs"))
    assert len(found) == 120
    assert all(isinstance(item, RawPair) and item.source == "tiny:pairs" for item in found)


def test_a_data_set_is_read_by_its_columns(monkeypatch):
    row = {"prompt": "Hi?", "chosen": [user("Hi?"), assistant("Yes.")], "rejected": [user("Hi?"), assistant("No.")]}
    data_sets = {"some/pairs": [row] * 30, "some/texts": [{"text": "x"}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: data_sets[name])
    assert list(open_pairs("hf:some/pairs")) == [pair()._replace(source="hf:some/pairs")] * 30
    with pytest.raises(UserError, match="hf:some/texts holds no preference pairs: it has text"):
        list(open_pairs("hf:some/texts"))


def test_real_multi_turn_preferences_are_read():
    if not HH_FILE.exists():
        pytest.skip("the HH harmlessness sample is not beside the repository")
    found = list(open_pairs(str(HH_FILE)))
    pairs = [item for item in found if isinstance(item, RawPair)]
    assert len(found) == 1700
    assert len(pairs) > 1600
    assert any(len(item.prompt) > 1 for item in pairs)
    assert {item.reason for item in found if isinstance(item, Reject)} <= {
        "equal_answers",
        "empty_answer",
        "empty_prompt",
    }

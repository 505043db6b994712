"""`prepare_data --inspect`: what a source is taken for, its rows by reason, and examples with the rewarded token; nothing is written."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sarm.data.sources.inspection import inspect_source
from sarm.settings.checks import UserError
from sarm.settings.inspection import ColumnNames, Inspecting, Template
from sarm.stages.inspect_source import inspect

ROOT = Path(__file__).parents[3]
GOOD = {"prompt": "Hi\x1b[31m?", "response_0": "No.", "response_1": "Yes.", "better_response_id": 1, "category": "x"}


def shown(capsys: pytest.CaptureFixture[str], **settings: object) -> str:
    inspect(Inspecting(**settings))  # type: ignore[arg-type]
    return capsys.readouterr().out


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_preferences_are_shown_with_container_layout_reasons_and_the_rewarded_token(tmp_path, capsys):
    spec = lines(tmp_path / "a.jsonl", GOOD, {**GOOD, "better_response_id": None}, {"prompt": "x"}, [1], GOOD)
    before = sorted(tmp_path.iterdir())
    said = shown(capsys, inspect=spec, examples=1)
    assert sorted(tmp_path.iterdir()) == before
    for words in (
        "container JSON, 1 file", "columns   prompt, response_0, response_1, better_response_id", "taken for preferences",
        "layout    SafeRLHF (3 rows)", "chosen: the response of `safer_response_id`", "rows      5, all that there are", "used      2 rows, 2 pairs",
        f"1 no_preference, first {spec}:2", f"1 unknown_layout, first {spec}:3", f"1 not_an_object, first {spec}:4",
        "Yes.⟦<|im_end|>⟧", "No.⟦<|im_end|>⟧",
    ):  # fmt: skip
        assert words in said, words
    assert said.count("--- chosen") == 1
    assert "\x1b" not in said, "a terminal would act on it"


def test_examples_are_of_different_rows_as_far_as_there_are(tmp_path, capsys):
    many = {"prompt": "first row", "chosen": ["a", "b"], "rejected": ["c", "d"]}
    spec = lines(tmp_path / "a.jsonl", many, {**many, "prompt": "second row"})
    said = shown(capsys, inspect=spec, examples=3)
    assert [said.count(f"{spec}:{row}\n") for row in (1, 2)] == [2, 1]
    assert said.index("second row") < said.rindex("first row")


def test_a_reader_that_has_seen_enough_ends_it_without_a_traceback(tmp_path):
    spec = lines(
        tmp_path / "a.jsonl", *[{"prompt": f"p{i}", "chosen": "c" * 5000, "rejected": "r"} for i in range(400)]
    )
    job = [sys.executable, "jobs/prepare_data.py", "--inspect", spec, "--examples", "400"]
    with subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("source")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_only_so_many_rows_are_looked_at(tmp_path):
    spec = lines(tmp_path / "a.jsonl", *[GOOD] * 30)
    seen = inspect_source(spec, {}, "text", 10)
    assert (seen.num_rows, seen.is_whole, seen.num_used) == (10, False, 10)
    assert inspect_source(spec, {}, "text", 30).is_whole


def test_the_template_of_a_model_says_what_it_refuses_and_cuts(tmp_path, capsys):
    spec = lines(tmp_path / "a.jsonl", {**GOOD, "prompt": "word " * 200}, GOOD)
    said = shown(capsys, inspect=spec, model=Template(name="tiny:llama", max_length=64))
    assert "4 answers encoded, 2 cut at 64 tokens; refused: none" in said
    assert "chosen (its beginning is cut off)" in said
    assert "⟦<|im_end|>⟧" in said


def test_a_template_may_be_given_for_a_model_that_has_none_of_that_kind(tmp_path, capsys):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<|im_start|>*{{ m.role }}*{{ m.content }}<|im_end|>{% endfor %}")  # fmt: skip
    spec = lines(tmp_path / "a.jsonl", GOOD)
    said = shown(capsys, inspect=spec, model=Template(name="tiny:llama", chat_template=str(tmp_path / "own.jinja")))
    assert "<|im_start|>*assistant*Yes.⟦<|im_end|>⟧" in said
    with pytest.raises(UserError, match=r"--model\.chat-template: there is no file"):
        Template(name="tiny:llama", chat_template=str(tmp_path / "none.jinja"))
    with pytest.raises(UserError, match="name must be the model whose template"):
        Template(chat_template=str(tmp_path / "own.jinja"))


def test_names_that_the_template_does_not_write_are_counted(tmp_path, capsys):
    row = {"prompt": [{"role": "user", "content": "Hi?", "name": "Ann"}], "chosen": "Yes.", "rejected": "No."}
    tools = {**row, "prompt": [{"role": "user", "content": "Hi?"}], "tools": [{"name": "search"}]}
    spec = lines(tmp_path / "a.jsonl", row, row, tools)
    said = shown(capsys, inspect=spec, model=Template(name="tiny:llama"))
    assert "4 have messages with a name, which the template does not write" in said
    assert "refused: 2 template_without_tools" in said
    assert "2 pairs have messages with a name" in said


def test_columns_under_other_names_and_texts_and_conversations_are_shown(tmp_path, capsys):
    spec = lines(tmp_path / "a.jsonl", {"q": "Hi?", "good": "Yes.", "bad": "No."})
    with pytest.raises(UserError, match=r"it has q, good, bad.*--data.columns"):
        inspect(Inspecting(inspect=spec))
    said = shown(capsys, inspect=spec, data=ColumnNames(columns="prompt=q,chosen=good,rejected=bad"))
    assert "used      1 rows, 1 pairs" in said
    assert "taken for texts" in shown(capsys, inspect="tiny:texts", rows=3)
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    spec = lines(tmp_path / "b.jsonl", {"messages": turns})
    said = shown(capsys, inspect=spec, data=ColumnNames(text_field="messages"))
    assert "taken for conversations" in said
    assert "--- answer" in said
    with pytest.raises(UserError, match=r"no column 'text'; it has messages. Pass --data.text-field messages"):
        inspect(Inspecting(inspect=spec))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "it holds none"),
        ("a.jsonl", gzip.compress(b'{"text": "x"}', mtime=0), "1 invalid_utf8, first .*a.jsonl:1"),
        ("a.jsonl.gz", b'{"text": "x"}', "1 corrupt_file"),
    ],
    ids=["empty", "packed and named plain", "plain and named packed"],
)
def test_a_file_of_which_nothing_can_be_read_is_not_taken_for_texts(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"no row of .* can be read \({said}.*\)\. Check"):
        inspect(Inspecting(inspect=str(tmp_path / name)))


@pytest.mark.parametrize("spec", ["nothing.csv", "hf:a b", "s3://bucket/x"])
def test_a_source_that_is_not_there_is_one_line(spec):
    with pytest.raises(UserError):
        inspect(Inspecting(inspect=spec))

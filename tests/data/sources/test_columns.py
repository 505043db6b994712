"""Columns under other names: `--data.columns` renames them before any layout is looked for."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sarm.contracts.folders import Folders
from sarm.data.sources.pairs import check_source, open_pairs
from sarm.data.sources.prepare import prepare_pairs
from sarm.settings.checks import UserError
from sarm.settings.data import DataSettings
from sarm.stages import plan

ROW = {"frage": "Hi?", "a": "Yes.", "b": "No.", "info": {"text": "Who?"}, "prompt": "another column", "score": 2}
MAPPED = "prompt=frage, chosen=a ,rejected=b"


def write(tmp_path: Path, row: dict[str, Any], kind: str) -> str:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps(row))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_are_read_under_the_names_that_the_user_gives(tmp_path, kind):
    spec = write(tmp_path, ROW, kind)
    (found,) = open_pairs(spec, columns=DataSettings(columns=MAPPED).column_names)
    assert (found.prompt[0]["content"], found.chosen, found.rejected) == ("Hi?", "Yes.", "No.")
    (found,) = open_pairs(spec, columns={"prompt": "info.text", "chosen": "a", "rejected": "b", "margin": "score"})
    assert (found.prompt[0]["content"], found.margin) == ("Who?", 2.0)


def test_every_layout_can_use_them_and_the_one_that_is_named_goes_first(tmp_path):
    row = {"q": "Hi?", "left": "No.", "right": "Yes.", "vote": "B", "chosen": "x", "rejected": "y"}
    columns = {"question": "q", "response_a": "left", "response_b": "right", "winner": "vote"}
    (found,) = open_pairs(write(tmp_path, row, "jsonl"), columns=columns)
    assert (found.chosen, found.rejected) == ("Yes.", "No.")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"prompt": "fragen"}, r"no column 'fragen', which --data.columns names; it has frage, a, b"),
        ({"promt": "frage"}, r"names promt, which no layout reads together. 'promt' may be prompt"),
        ({"chosen": "a", "human_ref_A": "b"}, "no layout reads together"),
        ({"prompt": "frage", "chosen": "a"}, r"holds no preference pairs.*prompt \+ chosen \+ rejected"),
    ],
)
def test_what_they_name_wrongly_is_refused(tmp_path, columns, words):
    with pytest.raises(UserError, match=words):
        check_source(write(tmp_path, ROW, "jsonl"), columns)


@pytest.mark.parametrize("text", ["prompt", "prompt=", "=a", "prompt=a,prompt=b", "prompt=a,,chosen=b"])
def test_what_is_no_mapping_is_refused(text):
    with pytest.raises(UserError, match=r"--data\.columns"):
        DataSettings(columns=text)


def test_pairs_know_by_which_columns_they_were_read_and_others_are_as_they_were(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(ROW | {"frage": f"Number {n}?"}) + "\n" for n in range(40)))
    mapped = DataSettings(pairs=(str(tmp_path / "a.jsonl"),), columns=MAPPED)
    assert prepare_pairs(mapped, tmp_path / "out")["rows"] == 40
    settings = plan.pairs(Folders(tmp_path), mapped).settings
    assert settings is not None
    assert settings["columns"] == MAPPED
    assert "columns" not in (plan.pairs(Folders(tmp_path), DataSettings()).settings or {})
    assert "columns" not in (plan.corpus(Folders(tmp_path), mapped).settings or {})

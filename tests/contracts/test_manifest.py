import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sarm.contracts import manifest as module
from sarm.contracts.manifest import (
    CLAIM,
    MANIFEST,
    StageFolder,
    finite_or_null,
    read_manifest,
    verify_files,
    write_atomically,
)
from sarm.contracts.untrusted import parse_json
from sarm.settings.checks import UserError

SCHEMA = "corpus/v1"
CONFIG = {"source": "a", "clean": {"max": 3, "min": 1}}


def finish_stage(folder: Path, config=CONFIG, schema=SCHEMA, text="rows", inputs=None) -> StageFolder:
    stage = StageFolder(folder, schema, config, inputs)
    stage.claim()
    (folder / "part-0.txt").write_text(text)
    (folder / "more").mkdir()
    (folder / "more" / "part-1.txt").write_text(text)
    stage.finish({"rows": 2})
    return stage


def test_a_new_or_empty_folder_is_not_finished(tmp_path):
    assert StageFolder(tmp_path / "new", SCHEMA, CONFIG).finished() is None
    (tmp_path / "empty").mkdir()
    assert StageFolder(tmp_path / "empty", SCHEMA, CONFIG).finished() is None


def test_a_finished_stage_is_found_again(tmp_path):
    finish_stage(tmp_path / "a")
    found = StageFolder(tmp_path / "a", SCHEMA, CONFIG).finished()
    assert found == read_manifest(tmp_path / "a", SCHEMA)
    assert (found.schema, found.config, found.counts) == (SCHEMA, CONFIG, {"rows": 2})
    assert found.files.keys() == {"part-0.txt", "more/part-1.txt"}


def test_asking_for_a_finished_stage_changes_no_byte(tmp_path):
    finish_stage(tmp_path / "a")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    StageFolder(tmp_path / "a", SCHEMA, CONFIG).finished()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_tuple_in_the_config_equals_the_list_it_becomes_in_json(tmp_path):
    finish_stage(tmp_path / "a", {"texts": ("x", "y")})
    assert StageFolder(tmp_path / "a", SCHEMA, {"texts": ("x", "y")}).finished() is not None


def test_an_unfinished_stage_is_claimed_anew_and_loses_its_parts_but_not_its_notes(tmp_path):
    first = StageFolder(tmp_path / "a", SCHEMA, CONFIG)
    assert first.claim(run_id="r1") == {}
    first.note(attempt="1")
    (tmp_path / "a" / "part-0.txt").write_text("half")
    (tmp_path / "a" / "more").mkdir()
    (tmp_path / "a" / "more" / "part-1.txt").write_text("half")

    second = StageFolder(tmp_path / "a", SCHEMA, CONFIG)
    assert second.finished() is None
    assert second.claim(host="h2") == {"run_id": "r1", "attempt": "1"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == [CLAIM]
    assert StageFolder(tmp_path / "a", SCHEMA, CONFIG).claim() == {"run_id": "r1", "attempt": "1", "host": "h2"}


@pytest.mark.parametrize("is_finished", [True, False])
def test_another_config_is_refused_naming_the_first_difference(tmp_path, is_finished):
    if is_finished:
        finish_stage(tmp_path / "a")
    else:
        StageFolder(tmp_path / "a", SCHEMA, CONFIG).claim()
    other = StageFolder(tmp_path / "a", SCHEMA, {"source": "b", "clean": {"max": 4, "min": 1}})
    with pytest.raises(UserError, match=r"clean\.max=3, now asked for clean\.max=4\. Pass another --out"):
        other.finished()


def test_a_setting_that_is_new_or_gone_is_a_difference(tmp_path):
    finish_stage(tmp_path / "a")
    with pytest.raises(UserError, match="extra=None, now asked for extra=1"):
        StageFolder(tmp_path / "a", SCHEMA, {**CONFIG, "extra": 1}).finished()
    with pytest.raises(UserError, match="source='a', now asked for source=None"):
        StageFolder(tmp_path / "a", SCHEMA, {"clean": CONFIG["clean"]}).finished()


def test_a_changed_input_is_refused_by_name(tmp_path):
    finish_stage(tmp_path / "in")
    inputs = {"corpus": (tmp_path / "in", SCHEMA)}
    finish_stage(tmp_path / "out", schema="pairs/v1", inputs=inputs)
    assert StageFolder(tmp_path / "out", "pairs/v1", CONFIG, inputs).finished() is not None
    shutil.rmtree(tmp_path / "in")
    finish_stage(tmp_path / "in", text="other rows")
    with pytest.raises(UserError, match="made from another corpus"):
        StageFolder(tmp_path / "out", "pairs/v1", CONFIG, inputs).finished()


def test_an_unfinished_input_is_refused(tmp_path):
    StageFolder(tmp_path / "in", SCHEMA, CONFIG).claim()
    with pytest.raises(UserError, match="unfinished"):
        StageFolder(tmp_path / "out", "pairs/v1", CONFIG, {"corpus": (tmp_path / "in", SCHEMA)})


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no stage of this platform claimed"):
        StageFolder(tmp_path, SCHEMA, CONFIG).finished()
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        StageFolder(tmp_path / "a", SCHEMA, CONFIG).finished()
    with pytest.raises(UserError, match="no folder"):
        read_manifest(tmp_path / "a", SCHEMA)


def test_the_folder_of_another_stage_is_refused(tmp_path):
    finish_stage(tmp_path / "done")
    with pytest.raises(UserError, match=r"expected pairs/v1 in .* got corpus/v1"):
        StageFolder(tmp_path / "done", "pairs/v1", CONFIG).finished()
    StageFolder(tmp_path / "begun", SCHEMA, CONFIG).claim()
    with pytest.raises(UserError, match="unfinished corpus/v1, not pairs/v1"):
        StageFolder(tmp_path / "begun", "pairs/v1", CONFIG).finished()


@pytest.mark.parametrize("content", [b"", b'{"schema": "corpus', b"[1, 2]", b"\xff\xfe", b'{"schema": "corpus/v1"}'])
def test_a_torn_manifest_is_refused(tmp_path, content):
    finish_stage(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match="is not a manifest"):
        read_manifest(tmp_path / "a", SCHEMA)


@pytest.mark.parametrize("content", [b"", b'{"schema": "corpus', b"\xff\xfe"])
def test_a_torn_claim_is_refused(tmp_path, content):
    StageFolder(tmp_path / "a", SCHEMA, CONFIG).claim()
    (tmp_path / "a" / CLAIM).write_bytes(content)
    with pytest.raises(UserError, match="is torn"):
        StageFolder(tmp_path / "a", SCHEMA, CONFIG).finished()


def test_a_claim_that_says_nothing_is_refused(tmp_path):
    (tmp_path / CLAIM).write_text("[]")
    with pytest.raises(UserError, match="is an unfinished None"):
        StageFolder(tmp_path, SCHEMA, CONFIG).finished()


def test_a_reader_refuses_what_is_missing_unfinished_or_of_another_kind(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        read_manifest(tmp_path / "none", SCHEMA)
    StageFolder(tmp_path / "a", SCHEMA, CONFIG).claim()
    with pytest.raises(UserError, match="unfinished"):
        read_manifest(tmp_path / "a", SCHEMA)
    finish_stage(tmp_path / "b")
    with pytest.raises(UserError, match="expected pairs/v1"):
        read_manifest(tmp_path / "b", "pairs/v1")


def test_verify_notices_a_flipped_byte_and_a_missing_file(tmp_path):
    finish_stage(tmp_path)
    found = read_manifest(tmp_path, SCHEMA)
    verify_files(tmp_path, found)
    part = tmp_path / "more" / "part-1.txt"
    part.write_bytes(bytes([part.read_bytes()[0] ^ 1]) + part.read_bytes()[1:])
    with pytest.raises(UserError, match=r"part-1\.txt has changed"):
        verify_files(tmp_path, found)
    part.unlink()
    with pytest.raises(UserError, match=r"part-1\.txt is missing"):
        verify_files(tmp_path, found)


def test_hashes_that_the_writer_already_has_are_not_computed_again(tmp_path, monkeypatch):
    stage = StageFolder(tmp_path, SCHEMA, CONFIG)
    stage.claim()
    (tmp_path / "part.txt").write_text("rows")
    monkeypatch.setattr(module, "sha256_of", lambda path: pytest.fail(f"hashed {path}"))
    assert stage.finish({}, {"part.txt": "abc"}).files == {"part.txt": "abc"}


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    stage = StageFolder(tmp_path / "a", SCHEMA, CONFIG)
    stage.claim()
    (tmp_path / "a" / "part.txt").write_text("rows")

    def break_off(path):
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(module, "sha256_of", break_off)
        with pytest.raises(OSError, match="disk full"):
            stage.finish({})
    assert not (tmp_path / "a" / MANIFEST).exists()
    with pytest.raises(UserError, match="unfinished"):
        read_manifest(tmp_path / "a", SCHEMA)
    assert StageFolder(tmp_path / "a", SCHEMA, CONFIG).finished() is None


def test_figures_that_are_not_numbers_do_not_finish_a_stage(tmp_path):
    stage = StageFolder(tmp_path, SCHEMA, CONFIG)
    stage.claim()
    with pytest.raises(ValueError, match="JSON compliant"):
        stage.finish({"loss": float("nan")})
    assert not (tmp_path / MANIFEST).exists()


def test_a_write_that_breaks_off_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "notes.json"
    write_atomically(path, "old")
    with monkeypatch.context() as broken:
        broken.setattr(module.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, "new")
    assert path.read_text() == "old"


def test_what_json_has_no_number_for_is_null():
    found = finite_or_null({"a": [1.5, float("nan")], "b": (float("inf"), 2, None, "x"), "c": np.float64("nan")})
    assert found == {"a": [1.5, None], "b": [None, 2, None, "x"], "c": None}
    assert parse_json(json.dumps(found)) == found

"""Every kind of file and folder gives the same rows, by its content and whatever it is packed with; what is damaged or unknown says so."""

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tests.compatibility import assert_listed

from sarm.data.sources.containers.column_rows import schema_of
from sarm.data.sources.containers.packing import PACKINGS
from sarm.data.sources.containers.text_rows import json_rows
from sarm.data.sources.extension_types import CANONICAL, foreign_types_of_parquet
from sarm.data.sources.files import FORMATS, file_rows, has_columns
from sarm.data.sources.hub import DataSet, data_set_rows, parse_data_set
from sarm.data.sources.inspection import inspect_source
from sarm.data.sources.pairs import check_source, open_pairs
from sarm.data.sources.places import source_files
from sarm.data.sources.rows import Reject, Row
from sarm.data.sources.texts import TextRecord, open_texts
from sarm.settings.checks import UserError

ROWS = [{"text": f'Text {n}, ü 三 \u2028 "quoted".'} for n in range(5)]
TEXTS = [row["text"] for row in ROWS]


def packed_lz4(content: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "lz4") as stream:
            stream.write(content)
        return path.read_bytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".lz4": packed_lz4,
}


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["n", *rows[0]], delimiter=delimiter)
    writer.writeheader()
    writer.writerows({"n": n, **row} for n, row in enumerate(rows))
    return out.getvalue().encode()


WRITTEN: dict[str, tuple[str, bytes]] = {
    "JSON lines": (".jsonl", as_lines(ROWS)),
    "JSON lines, named .json": (".json", as_lines(ROWS)),
    "JSON lines, named .ndjson": (".ndjson", b"\xef\xbb\xbf" + as_lines(ROWS)),
    "a JSON list": (".json", json.dumps(ROWS).encode()),
    "a JSON list, indented": (".json", json.dumps(ROWS, indent=2).encode()),
    "a JSON list, named .jsonl": (".jsonl", json.dumps(ROWS, indent=1).encode()),
    "a JSON object with rows under `data`": (".json", json.dumps({"version": "1", "data": ROWS}, indent=2).encode()),
    "CSV": (".csv", as_table(ROWS, ",")),
    "CSV with semicolons": (".csv", as_table(ROWS, ";")),
    "TSV": (".tsv", as_table(ROWS, "\t")),
    "text, a blank line between texts": (".txt", "\n\n".join(TEXTS).encode()),
    "text, a line each": (".txt", "\r\n".join(TEXTS).encode()),
}


def texts(spec: Path | str) -> list[str]:
    return [record.text for record in open_texts(str(spec)) if isinstance(record, TextRecord)]


def reasons(path: Path) -> list[str]:
    return [row.reason for row in file_rows(path) if isinstance(row, Reject)]


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("kind", WRITTEN)
def test_a_file_is_read_by_its_content_whatever_it_is_packed_with(tmp_path, kind, packing):
    extension, content = WRITTEN[kind]
    path = tmp_path / f"a{extension}{packing}"
    path.write_bytes(PACKERS[packing](content))
    assert texts(path) == TEXTS
    assert reasons(path) == []


@pytest.mark.parametrize("packing", [packing for packing in PACKERS if packing])
def test_a_packed_file_of_no_further_name_is_taken_for_json(tmp_path, packing):
    for name, content in (("lines", as_lines(ROWS)), ("list", json.dumps(ROWS).encode())):
        (tmp_path / f"{name}{packing}").write_bytes(PACKERS[packing](content))
        assert texts(tmp_path / f"{name}{packing}") == TEXTS


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return out.getvalue()


MEMBERS = {
    "README.txt": b"nothing to read",
    "part/a.json.xz": lzma.compress(json.dumps(ROWS[:2]).encode()),
    "part/b.jsonl": as_lines(ROWS[2:]),
    "part/c.csv": as_table([{"text": "another kind"}], ","),
}


@pytest.mark.parametrize(
    "name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz", "a.tar.zst", "a.tar.lz4", "a.zip"]
)
def test_an_archive_gives_the_rows_of_its_files_of_one_kind(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in MEMBERS.items():
                archive.writestr(member, content)
    else:
        packing = ".gz" if name.endswith(".tgz") else name.removeprefix("a.tar")
        path.write_bytes(PACKERS[packing](tar(MEMBERS)))
    assert texts(path) == TEXTS
    assert reasons(path) == []


@pytest.mark.parametrize("name", ["a.tar", "a.tar.zst", "a.tgz", "a.zip"])
@pytest.mark.parametrize("member", ["data/train.parquet", "state.arrow", "inner.zip", "picture.png", "README.md"])
def test_an_archive_of_files_that_are_not_read_out_of_archives_says_so(tmp_path, name, member):
    path = tmp_path / name
    if name == "a.zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, b"PAR1")
    else:
        path.write_bytes(PACKERS[".gz" if name == "a.tgz" else name.removeprefix("a.tar")](tar({member: b"PAR1"})))
    for look in (lambda: list(file_rows(path)), lambda: check_source(str(path)), lambda: inspect_source(str(path), {}, "text", 9)):  # fmt: skip
        with pytest.raises(UserError, match=f"a.* holds {member}, and of archives .jsonl, .* are read.*Unpack it") as refused:  # fmt: skip
            look()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a.tar.zst", "a.zip", "a.tar"])
def test_an_archive_that_is_something_else_is_corrupt(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing of the kind" * 100)
    assert reasons(tmp_path / name) == ["corrupt_file"]


def test_a_folder_gives_the_files_of_the_kind_that_most_of_its_bytes_are_of(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(as_lines(ROWS[:2]))
    (tmp_path / "in/b.jsonl.gz").write_bytes(gzip.compress(as_lines(ROWS[2:])))
    (tmp_path / "manifest.json").write_text("{}" * 5000)
    (tmp_path / "README.txt").write_text("x" * 9000)
    (tmp_path / "small.txt").write_text("another kind")
    (tmp_path / ".hidden.jsonl").write_bytes(as_lines(ROWS) * 50)
    assert texts(tmp_path) == TEXTS
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="folder without data files"):
        source_files(str(tmp_path / "empty"), ())


def test_a_data_set_that_was_saved_to_disk_is_read(tmp_path):
    saved = datasets.Dataset.from_list([{**row, "n": n} for n, row in enumerate(ROWS)])
    saved.select([4, 0, 2]).save_to_disk(tmp_path / "one", num_shards=2)
    assert texts(tmp_path / "one") == [TEXTS[4], TEXTS[0], TEXTS[2]]
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(tmp_path / "dict")
    assert texts(tmp_path / "dict") == TEXTS
    assert texts(tmp_path / "dict/test") == [TEXTS[1]]
    datasets.DatasetDict({"dev": saved}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match=r"no split train. Pass .*other/dev"):
        source_files(str(tmp_path / "other"), ())
    (tmp_path / "one/data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"lacks files that its state.json names"):
        source_files(str(tmp_path / "one"), ())


def test_an_arrow_file_is_read_as_its_stream_is(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert texts(tmp_path / "a.arrow") == TEXTS
    (tmp_path / "b.arrow").write_bytes(b"ARROW")
    with pytest.raises(UserError, match=r"b.arrow \(5 bytes\) cannot be read as Arrow"):
        check_source(str(tmp_path / "b.arrow"))


def json_column(values: list[Any]) -> pa.Array:
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps(value) for value in values]))


def test_columns_of_arrows_own_extension_types_are_read(tmp_path):
    sides = {"chosen": json_column(["Yes."]), "rejected": json_column(["No."]), "prompt": pa.array(["Hi?"])}
    other = {"uuid": pa.array([b"0" * 16], pa.uuid()), "meta": json_column([{"a": [1]}])}
    pq.write_table(pa.table({**sides, **other}), tmp_path / "a.parquet")
    (found,) = open_pairs(str(tmp_path / "a.parquet"))
    assert (found.chosen, found.rejected) == ("Yes.", "No.")
    pq.write_table(pa.table({"text": json_column(TEXTS)}), tmp_path / "b.parquet")
    assert texts(tmp_path / "b.parquet") == TEXTS


FOREIGN = [b"ray.data.arrow_tensor", b"arrow.py_extension_type", b"some.one", b"arrow.json2"]


def nested(name: bytes, depth: int, beside: str) -> pa.Schema:
    field = pa.field("x", pa.int64(), metadata={b"ARROW:extension:name": name, b"ARROW:extension:metadata": b"{}"})
    for level in range(depth):
        field = pa.field(f"x{level}", pa.struct([pa.field("a", pa.int8()), field]), metadata={"note": beside})
    return pa.schema([pa.field("first", pa.string()), field], metadata={"about": beside})


@given(
    st.sampled_from(FOREIGN),
    st.integers(0, 4),
    st.sampled_from(["arrow.json", "ARROW:extension:name", ""]),
)
def test_a_foreign_extension_type_is_found_at_any_depth_whatever_stands_beside_it(name, depth, beside):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        pq.write_table(nested(name, depth, beside).empty_table(), path)
        assert foreign_types_of_parquet(path) == {name.decode()}


RAY_IS_THERE = """
import sys
import numpy as np
import pyarrow as pa, pyarrow.parquet as pq
from pathlib import Path
from sarm.data.sources.files import file_rows
from sarm.settings.checks import UserError

for name in (b"ray.data.arrow_pickled_object", b"ray.data.arrow_tensor_v2", b"ray.data.arrow_variable_shaped_tensor"):
    metadata = {b"ARROW:extension:name": name, b"ARROW:extension:metadata": b"\\x80\\x04."}
    field = pa.field("text", pa.binary(), metadata=metadata)
    pq.write_table(pa.table([pa.array([b"yes"])], schema=pa.schema([field])), f"{sys.argv[1]}/{name.decode()}.parquet")
# Only now, so that Arrow knows the types when the files are read, and not when they were written.
import ray.data
from ray.data._internal.tensor_extensions.arrow import ArrowTensorArray
ArrowTensorArray.from_numpy(np.zeros((2, 2)))
for path in sorted(Path(sys.argv[1]).glob("*.parquet")):
    try:
        list(file_rows(path))
    except UserError as error:
        assert "extension type" in str(error), error
        print("refused")
"""


def test_types_that_ray_has_registered_are_refused_before_they_are_asked(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RAY_IS_THERE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["refused"] * 3


@pytest.mark.parametrize("end", ["stream", "file"])
def test_a_foreign_extension_type_in_arrow_is_refused(tmp_path, end):
    schema = nested(FOREIGN[0], 1, "")
    new = pa.ipc.new_stream if end == "stream" else pa.ipc.new_file
    for name in ("a.arrow", "B.ARROW"):
        with new(tmp_path / name, schema) as writer:
            writer.write_table(schema.empty_table())
        with pytest.raises(UserError, match=r"extension type \(ray.data.arrow_tensor\)"):
            check_source(str(tmp_path / name))
        with pytest.raises(UserError, match="extension type"):
            list(file_rows(tmp_path / name))
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="extension type"):
        list(file_rows(tmp_path / "a.parquet"))
    assert "arrow.json" in CANONICAL


CELLS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    str.strip
)


@given(st.lists(st.fixed_dictionaries({"a": CELLS, "b": CELLS}), min_size=1, max_size=6))
def test_texts_are_the_same_out_of_every_container(rows):
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: Path(folder) / f"x{name}"
            for name in (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow", ".zip")
        }
        for name, path in files.items():
            if name in (".csv", ".tsv"):
                with path.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, ["a", "b"], delimiter="," if name == ".csv" else "\t")
                    writer.writeheader()
                    writer.writerows(rows)
            elif name == ".parquet":
                pq.write_table(pa.Table.from_pylist(rows), path)
            elif name == ".arrow":
                with pa.ipc.new_stream(path, pa.Table.from_pylist(rows).schema) as stream:
                    stream.write_table(pa.Table.from_pylist(rows))
            elif name == ".zip":
                with zipfile.ZipFile(path, "w") as archive:
                    archive.writestr("rows.jsonl", as_lines(rows))
            else:
                path.write_bytes(
                    as_lines(rows) if name == ".jsonl" else json.dumps(rows, indent=1, ensure_ascii=False).encode()
                )
            found[name] = [row.fields if isinstance(row, Row) else row.reason for row in file_rows(path)]
    assert found == dict.fromkeys(found, rows)


def test_lines_of_a_table_that_are_no_rows_are_counted(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,n\r\n"two\r\nlines",1\r\n\r\nthree,4,5\r\nshort\r\ncaf\xe9,1\r\nlast,2')
    found = list(file_rows(path))
    assert [row.fields["text"] for row in found if isinstance(row, Row)] == ["two\r\nlines", "last"]
    assert [row for row in found if isinstance(row, Reject)] == [
        Reject("ragged_row", f"{path}:5"), Reject("ragged_row", f"{path}:6"), Reject("invalid_utf8", f"{path}:7"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a,b,a\n1,2,3\n", "repeated_column"),
        ("a,b\n1,2\n".encode("utf-16"), "invalid_utf8"),
        ("prompt,chosen,rejected,g\u00fcte\n1,2,3,4\n".encode("latin-1"), "invalid_utf8"),
    ],
)
def test_a_table_with_a_header_that_cannot_be_read_gives_no_row(tmp_path, content, reason):
    (tmp_path / "a.csv").write_bytes(content)
    assert list(file_rows(tmp_path / "a.csv")) == [Reject(reason, f"{tmp_path / 'a.csv'}:1")]


def test_names_in_capitals_are_of_the_same_kind(tmp_path):
    table = pa.table({"a": ["x"]})
    pq.write_table(table, tmp_path / "A.PARQUET")
    with pa.ipc.new_stream(str(tmp_path / "A.ARROW"), table.schema) as stream:
        stream.write_table(table)
    for name in ("A.PARQUET", "A.ARROW"):
        assert has_columns(tmp_path / name)
        assert schema_of(tmp_path / name).names == ["a"]


def test_a_table_holds_preferences_with_numbers_and_conversations_as_texts(tmp_path):
    turns = [{"role": "user", "content": "Hi?"}]
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "response_0", "response_1", "safer_response_id"])
        writer.writerow([json.dumps(turns), "4", "[1]", "0"])
        writer.writerow(["Why?", "Yes.", "No.", ""])
    found = list(open_pairs(str(path)))
    assert (found[0].prompt, found[0].chosen, found[0].rejected) == (turns, "4", "[1]")
    assert found[1].reason == "no_preference"


@pytest.mark.parametrize(
    ("content", "kept", "expected"),
    [
        (b'[{"text": "a"}, {"text": "b"}', 2, ["bad_json"]),
        (b'[{"text": "a"}, 5, {"text": "b"}]', 2, ["not_an_object"]),
        (b'[{"text": "a"}, {"text": ]', 1, ["bad_json"]),
        (b'[{"text": "a"}] {"text": "b"}', 1, ["bad_json"]),
        (b"[", 0, ["bad_json"]),
        (b"[]", 0, []),
        (b'[1]\n{"text": "a"}\n{"text": "b"}', 2, ["not_an_object"]),
        (b'{"text": "a",\n{"text": "b"}\n', 1, ["bad_json"]),
        (b'{\n"text": "a"\n}', 1, []),
        (b'{"text": "a", "data": [{"text": "b"}]}', 1, []),
    ],
)
def test_of_json_that_breaks_off_the_rows_before_are_kept(tmp_path, content, kept, expected):
    (tmp_path / "a.json").write_bytes(content)
    assert len(texts(tmp_path / "a.json")) == kept
    assert reasons(tmp_path / "a.json") == expected


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=30)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=8), st.sampled_from([None, 1]), st.sampled_from([".json", ".jsonl", ".json.gz"]))
def test_a_list_has_one_outcome_for_each_of_its_items(items, indent, extension):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{extension}"
        content = json.dumps(items, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
        path.write_bytes(gzip.compress(content) if extension.endswith("gz") else content)
        found = list(file_rows(path))
    assert [row.fields if isinstance(row, Row) else None for row in found] == [
        item if isinstance(item, dict) else None for item in items
    ]


@given(
    st.lists(st.dictionaries(st.sampled_from("abc"), st.text(max_size=20)), min_size=1, max_size=6), st.integers(1, 9)
)
def test_a_list_is_the_same_however_its_stream_is_cut(items, width):
    content = json.dumps(items, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass")
    chunks = (content[start : start + width] for start in range(0, len(content), width))
    assert [row.fields for row in json_rows("here", chunks) if isinstance(row, Row)] == items


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("hf:squad", DataSet("squad", None, None, "train")),
        ("hf:a/b:test", DataSet("a/b", None, None, "test")),
        ("hf:HuggingFaceFW/fineweb:sample-10BT:train", DataSet("HuggingFaceFW/fineweb", None, "sample-10BT", "train")),
        ("hf:a/b@v1.0:en:test", DataSet("a/b", "v1.0", "en", "test")),
        ("hf:a/b@refs/convert/parquet", DataSet("a/b", "refs/convert/parquet", None, "train")),
    ],
)
def test_a_data_set_has_a_revision_a_configuration_and_a_split(monkeypatch, spec, parts):
    assert parse_data_set(spec) == parts
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or [])
    list(data_set_rows(spec))
    ((names, options),) = asked
    assert names == (parts.name,)
    assert options == {
        "split": parts.split, "streaming": True,
        **({"name": parts.config} if parts.config else {}), **({"revision": parts.revision} if parts.revision else {}),
    }  # fmt: skip


def test_a_stream_that_breaks_off_goes_on_behind_its_last_row(monkeypatch):
    failures = iter([3, 7, None])
    opened = []

    def load_dataset(*_, **__):
        breaks_at = next(failures)
        opened.append(breaks_at)

        def rows(shards):
            for shard in shards:
                for n in range(shard, shard + 5):
                    if n == breaks_at:
                        raise ConnectionError("reset by peer")
                    yield {"n": n}

        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 5]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("sarm.data.sources.hub.time.sleep", lambda _: None)
    assert [row.fields["n"] for row in data_set_rows("hf:a/b")] == list(range(10))
    assert opened == [3, 7, None]


def test_a_stream_that_keeps_breaking_off_is_given_up(monkeypatch):
    def load_dataset(*_, **__):
        def rows():
            yield {"n": 0}
            raise ConnectionError("reset by peer")

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("sarm.data.sources.hub.time.sleep", lambda _: None)
    with pytest.raises(UserError, match=r"ConnectionError: reset by peer"):
        list(data_set_rows("hf:a/b"))


def test_a_name_of_the_hub_without_its_scheme_is_a_guess():
    with pytest.raises(UserError, match=r"Did you mean hf:Anthropic/hh-rlhf\?"):
        source_files("Anthropic/hh-rlhf", ())


def test_every_container_stands_in_the_documentation():
    kinds = {
        "JSON": "lines or a list, told by content",
        "CSV": "first line names the columns; comma, semicolon, tab or bar",
        "text": "blank lines between texts, else a line each",
        "Parquet": "Arrow's own extension types too",
        "Arrow": "streams and files",
        "archive": "of files of one of the first three kinds",
    }
    assert set(kinds) == {one.kind for one in FORMATS.values()}
    plain = [name for name in FORMATS if not any(packing and name.endswith(packing) for packing in PACKINGS)]
    packings = ", ".join(f"`{packing}`" for packing in PACKINGS if packing)
    rows = [
        (f"`{name}`", FORMATS[name].kind, kinds[FORMATS[name].kind], packings if f"{name}.gz" in FORMATS else "")
        for name in plain
    ]
    rows += [
        ("`.gz` and so on alone", "JSON", kinds["JSON"], packings),
        ("a folder", "its files", "of the kind that most of its bytes are of, at any depth", ""),
        ("a folder of `save_to_disk`", "Arrow", "of several splits `train`, or the folder of a split", ""),
        ("a pattern, such as `a/*.jsonl`", "its files", "in the order of their names", ""),
        ("`hf:NAME[@REVISION][:CONFIG][:SPLIT]`", "data set", "streamed; goes on where a connection broke off", ""),
    ]
    assert_listed("containers", ["source", "content", "how it is read", "packed with"], rows)

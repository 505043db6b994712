import gzip
import io
import json
import random
import subprocess
import sys
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sarm.data.sources.built_in import BUILT_IN_TEXTS
from sarm.data.sources.containers.packing import lines_of
from sarm.data.sources.files import FORMATS
from sarm.data.sources.rows import FileFormat, Reject, Row
from sarm.data.sources.texts import TextRecord, check_source, open_texts
from sarm.settings.checks import UserError


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def texts(spec, **options) -> list[str]:
    return [record.text for record in open_texts(str(spec), **options) if isinstance(record, TextRecord)]


def reasons(spec, **options) -> list[str]:
    return [record.reason for record in open_texts(str(spec), **options) if isinstance(record, Reject)]


def write_parquet(path, columns: dict, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


PACKERS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("extension", PACKERS)
def test_jsonl_is_read_plain_and_packed(tmp_path, extension):
    path = tmp_path / f"a{extension}"
    path.write_bytes(PACKERS[extension](jsonl("One.", "Zwei ü.", "三。")))
    assert list(open_texts(str(path))) == [TextRecord(text, str(path)) for text in ("One.", "Zwei ü.", "三。")]


def test_zst_without_size_in_many_frames_is_read_whole(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    with path.open("wb") as file:
        for part in ("a", "b", "c"):
            packer = zstandard.ZstdCompressor().stream_writer(file, closefd=False)
            packer.write(jsonl(part * 300_000, part))
            packer.close()
    assert texts(path) == ["a" * 300_000, "a", "b" * 300_000, "b", "c" * 300_000, "c"]


def test_parquet_is_read_and_other_columns_are_not_needed(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"body": ["One.", None, "Two."], "n": [1, 2, 3]}, row_group_size=2)
    assert texts(path, text_field="body") == ["One.", "Two."]
    assert reasons(path, text_field="body") == ["missing_text"]


def test_a_glob_reads_its_files_in_order_and_its_matches_keep_the_spec_as_source(tmp_path):
    for name, text in (("b", "Two."), ("a", "One.")):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(text))
    write_parquet(tmp_path / "c.parquet", {"text": ["Three."]})
    spec = str(tmp_path / "[abc].*")
    assert list(open_texts(spec)) == [TextRecord(text, spec) for text in ("One.", "Two.", "Three.")]


def test_each_bad_line_is_one_counted_reject_with_its_place(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "first"}',
        b'{"text": "torn',
        b"[1]",
        b'{"body": "x"}',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": "caf\xe9"}',
        b'{"text": "\\ud800"}',
        b'{"text": " \\n\\t"}',
        b'{"text": "a\\u0000b"}',
        b"",
        b"[" * 100_000,
        b'{"text": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    assert texts(path) == ["first", "last"]
    assert reasons(path) == [
        "bad_json",
        "not_an_object",
        "missing_text",
        "missing_text",
        "not_a_string",
        "invalid_utf8",
        "lone_surrogate",
        "empty",
        "nul_byte",
        "bad_json",
    ]
    assert next(r.where for r in open_texts(str(path)) if isinstance(r, Reject)) == f"{path}:2"


def test_a_text_of_ten_megabytes_is_one_text_and_control_characters_stay(tmp_path):
    long, odd = (
        "A sentence of a very long text. " * 320_000,
        "bell \x07 escape \x1b[31m feff \ufeff rtl \u202e next \u2028 x.",
    )
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(PACKERS[".jsonl.zst"](jsonl(odd, long, odd)))
    assert texts(path) == [odd, long, odd]


def test_invalid_utf8_in_parquet_costs_its_own_row(tmp_path):
    raw = pa.array([b"One.", b"caf\xe9", b"Two."], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    assert reasons(write_parquet(tmp_path / "a.parquet", {"text": strings})) == ["invalid_utf8"]
    assert texts(tmp_path / "a.parquet") == ["One.", "Two."]


@pytest.mark.parametrize("extension", [".jsonl.gz", ".jsonl.zst"])
def test_of_a_truncated_file_the_rows_before_are_kept(tmp_path, extension):
    rng = random.Random(0)
    many = ["".join(rng.choices("abcdefghij .", k=200)) + "x" for _ in range(5000)]
    path = tmp_path / f"a{extension}"
    packed = PACKERS[extension](jsonl(*many))
    path.write_bytes(packed[: len(packed) // 2])
    found = list(open_texts(str(path)))
    kept = [record.text for record in found[:-1]]
    assert 1000 < len(kept) < 4000
    assert kept == many[: len(kept)]
    assert found[-1] == Reject("corrupt_file", str(path))


@pytest.mark.parametrize("extension", [".jsonl.gz", ".jsonl.zst"])
def test_a_file_that_is_not_packed_is_corrupt_and_does_not_stop_the_next(tmp_path, extension):
    (tmp_path / f"a{extension}").write_bytes(jsonl("plain"))
    (tmp_path / f"b{extension}").write_bytes(PACKERS[extension](jsonl("fine")))
    assert texts(tmp_path / f"*{extension}") == ["fine"]
    assert reasons(tmp_path / f"*{extension}") == ["corrupt_file"]


def test_a_flipped_bit_in_a_parquet_page_is_noticed(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet",
        {"text": [f"Sentence number {i}." for i in range(100)]},
        compression="none",
        write_page_checksum=True,
        use_dictionary=False,
    )
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"Sentence number 50") + 1] ^= 1
    path.write_bytes(raw)
    assert reasons(path) == ["corrupt_file"]


def test_the_limit_counts_usable_texts_of_the_source(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"bad\n" + jsonl("1", "2", "3"))
    (tmp_path / "b.jsonl").write_bytes(jsonl("4"))
    assert texts(tmp_path / "*.jsonl", limit=2) == ["1", "2"]
    assert texts(tmp_path / "*.jsonl", limit=9) == ["1", "2", "3", "4"]


MEASURE = """
import sys, tracemalloc
from sarm.data.sources.texts import open_texts

tracemalloc.start()
print(sum(1 for _ in open_texts(sys.argv[1])), tracemalloc.get_traced_memory()[1])
"""


def test_a_large_file_is_not_held_in_memory(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    rng = random.Random(0)
    path.write_bytes(PACKERS[".jsonl.zst"](jsonl(*(f"{rng.getrandbits(8000):x}" for _ in range(8000)))))
    # A process of its own: what threads that other tests left behind allocate is counted here too.
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    texts, peak = map(int, done.stdout.split())
    assert texts == 8000
    # Of 16 MB of text.
    assert peak < 1_000_000


@given(st.binary(max_size=60), st.lists(st.integers(1, 7), min_size=60, max_size=60))
def test_lines_do_not_depend_on_how_the_stream_is_cut(content, widths):
    stream = io.BytesIO(content)
    cut = [chunk for width in widths if (chunk := stream.read(width))]
    whole = content.split(b"\n")
    assert list(lines_of(iter(cut))) == (whole if whole[-1] else whole[:-1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing.jsonl", "no file .*nothing.jsonl.* holds here.jsonl"),
        ("away/nothing.jsonl", "There is no folder .*away"),
        ("*.parquet", "no file matches"),
        ("here.doc", "unknown extension.*.jsonl"),
        ("empty", "is a folder without data files"),
    ],
)
def test_a_path_that_leads_nowhere_is_the_users_to_mend(tmp_path, spec, message):
    (tmp_path / "here.jsonl").write_bytes(jsonl("x"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "here.doc").write_text("x")
    with pytest.raises(UserError, match=message):
        check_source(f"{tmp_path}/{spec}")


@pytest.mark.parametrize("spec", ["s3://bucket/a.jsonl", "demo:harm", "tiny:pairs", "https://example.org/a.jsonl"])
def test_an_unknown_scheme_is_refused_with_the_known_ones(spec):
    with pytest.raises(UserError, match=r"unknown source .*hf:NAME.*demo:openwebtext, demo:wikipedia, tiny:texts"):
        check_source(spec)


@pytest.mark.parametrize("spec", ["hf:", "hf:a/b/c", "hf:a:", "hf:a b", "hf:a:b:c:d", "hf:a@"])
def test_a_malformed_data_set_name_is_refused(spec):
    with pytest.raises(UserError, match="hf:NAME:SPLIT"):
        check_source(spec)


def test_a_missing_column_is_named_with_the_ones_there_before_any_text(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"body": ["x"], "url": ["y"]})
    with pytest.raises(UserError, match=r"no column 'text'; it has body, url. Pass --data.text-field"):
        open_texts(str(path))


@pytest.mark.parametrize("values", [[1], [["a"]], [b"a"]])
def test_a_column_of_another_type_is_refused(tmp_path, values):
    path = write_parquet(tmp_path / "a.parquet", {"text": values})
    with pytest.raises(UserError, match="expected strings"):
        check_source(str(path))


@pytest.mark.parametrize("content", [b"", b"PAR1 torn"])
def test_a_parquet_file_without_its_end_is_refused_with_its_size(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=rf"a.parquet \({len(content)} bytes\)"):
        check_source(str(tmp_path / "a.parquet"))


def test_tiny_texts_are_a_source():
    assert len(texts("tiny:texts")) == 200
    assert len(texts("tiny:texts", limit=7)) == 7
    assert next(open_texts("tiny:texts")).source == "tiny:texts"


def test_a_source_made_in_code_is_one_entry(monkeypatch):
    monkeypatch.setitem(BUILT_IN_TEXTS, "own:letters", lambda: iter("ab"))
    assert list(open_texts("own:letters")) == [TextRecord(letter, "own:letters") for letter in "ab"]
    with pytest.raises(UserError, match="own:letters"):
        check_source("own:numbers")


def test_a_file_format_is_one_entry(tmp_path, monkeypatch):
    def rows(path, columns):
        yield from (Row({columns[0]: line}, str(path)) for line in path.read_text().splitlines())

    monkeypatch.setitem(FORMATS, ".letters", FileFormat(rows, 1.0, "letters"))
    (tmp_path / "a.letters").write_text("One.\nTwo.")
    assert texts(tmp_path / "a.letters") == ["One.", "Two."]


def test_a_data_set_is_streamed_with_its_split(monkeypatch):
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return [{"text": "One."}, {"text": None}, {"text": "Two."}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts("hf:some/texts") == texts("hf:some/texts:test") == ["One.", "Two."]
    assert Counter(asked) == {("some/texts", "train", True): 1, ("some/texts", "test", True): 1}
    with pytest.raises(UserError, match="no column 'body'; it has text"):
        texts("hf:some/texts", text_field="body")


def test_a_data_set_that_cannot_be_opened_is_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nmany lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"hf:some/texts cannot be read \(ConnectionError: no route\)") as error:
        texts("hf:some/texts")
    assert "\n" not in str(error.value)

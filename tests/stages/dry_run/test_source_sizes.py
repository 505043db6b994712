"""Counting what there is to read: finished folders, files, built-in sources, data sets."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sarm.data.sources.demo import demo_texts
from sarm.data.sources.pairs import open_pairs
from sarm.data.sources.tiny import tiny_pairs, tiny_texts
from sarm.settings.data import DataSettings
from sarm.settings.extraction import ExtractionSettings
from sarm.stages.dry_run.source_sizes import CHARACTERS_A_TOKEN, sizes_of

PAIRS = ("tiny:pairs",)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_built_in_sources_are_as_large_as_is_known(tmp_path):
    tiny = sizes_of(tmp_path, DataSettings(texts=("tiny:texts",), pairs=PAIRS))
    assert tiny.texts.rows == len(list(tiny_texts()))
    assert tiny.pairs.train + tiny.pairs.heldout == len(list(tiny_pairs()))
    demo = sizes_of(tmp_path, DataSettings(texts=("demo:openwebtext",), pairs=("demo:harm",), max_texts=300))
    assert demo.texts.rows == 300
    characters = sum(len(text) for text, _ in zip(demo_texts("openwebtext"), range(300), strict=False))
    assert demo.texts.tokens == pytest.approx(characters / CHARACTERS_A_TOKEN, rel=0.2)
    kept = sum(not isinstance(pair, tuple) or hasattr(pair, "chosen") for pair in open_pairs("demo:harm"))
    assert kept >= demo.pairs.train + demo.pairs.heldout > 1000


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_files_are_counted_by_their_bytes_and_first_rows(tmp_path, ending):
    rows = [{"text": f"Sentence {i:04}. " * 40, "id": i} for i in range(1500)]
    path = tmp_path / f"texts{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == ".jsonl":
        lines(path, rows)
    else:
        words = [f"{i * 7919 % 10007}" for i in range(1500 * 60)]
        rows = [{"text": " ".join(words[60 * i : 60 * i + 60])} for i in range(1500)]
        with gzip.open(path, "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    texts = sizes_of(tmp_path / "out", DataSettings(texts=(str(path),), pairs=PAIRS)).texts
    tokens = sum(len(row["text"]) for row in rows) / CHARACTERS_A_TOKEN
    # Of compressed files only a usual ratio is known.
    rel = 0.6 if ending.endswith("gz") else 0.01
    assert texts.rows == pytest.approx(1500, rel=rel)
    assert texts.tokens == pytest.approx(tokens, rel=rel)


def test_limits_and_several_files_count(tmp_path):
    for name in "ab":
        lines(tmp_path / f"{name}.jsonl", [{"text": "Some words here. " * 10}] * 300)
    data = DataSettings(texts=(str(tmp_path / "*.jsonl"),), pairs=PAIRS)
    assert sizes_of(tmp_path / "out", data).texts.rows == pytest.approx(600)
    limited = sizes_of(tmp_path / "out", data, ExtractionSettings(limit_rows=60))
    assert limited.texts.rows == pytest.approx(60)
    assert limited.corpus.rows == pytest.approx(600), "preparing reads all"
    assert sizes_of(tmp_path / "out", data, ExtractionSettings(limit_tokens=1000)).texts.tokens == pytest.approx(1000)


def test_pairs_in_files_are_counted(tmp_path):
    rows = [{"prompt": "p" * 44, "chosen": "c" * 88, "rejected": "r" * 44} for _ in range(500)]
    pairs = sizes_of(
        tmp_path / "out", DataSettings(pairs=(lines(tmp_path / "pairs.jsonl", rows),), heldout_share=0.2)
    ).pairs
    assert pairs.train == pytest.approx(400)
    assert pairs.heldout == pytest.approx(100)
    assert pairs.tokens_a_pair == pytest.approx(40)


def test_pairs_of_rows_with_several_answers_and_with_one_are_counted(tmp_path):
    ranked = [{"prompt": "p", "responses": ["a", "b", "c"], "scores": [3, 2, 1]} for _ in range(100)]
    data = DataSettings(pairs=(lines(tmp_path / "ranked.jsonl", ranked),), heldout_share=0.2)
    assert sizes_of(tmp_path / "out", data).pairs.train == pytest.approx(240)
    single = [{"prompt": f"p{n // 2}", "completion": "a" * (n % 2 + 1), "label": bool(n % 2)} for n in range(1000)]
    data = DataSettings(pairs=(lines(tmp_path / "single.jsonl", single),), heldout_share=0.2)
    assert sizes_of(tmp_path / "out", data).pairs.train == pytest.approx(400)


def test_what_has_been_counted_is_not_guessed(tmp_path):
    for stage, counts in {
        "corpus": {"rows": 100, "characters": 44_000, "sources": {"a.jsonl": 100}},
        "pairs": {"splits": {"train": 70, "heldout": 9}, "sources": {"demo:harm": 79}},
    }.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "manifest.json").write_text(json.dumps({"counts": counts}))
    sizes = sizes_of(tmp_path, DataSettings(texts=("/gone/*.jsonl",), pairs=("/gone.jsonl",)))
    assert (sizes.texts.rows, sizes.texts.tokens) == (100, 10_000)
    assert (sizes.pairs.train, sizes.pairs.heldout, sizes.pairs.tokens_a_pair) == (70, 9, 51)


def test_a_data_set_of_unknown_size_is_named_unless_a_limit_bounds_it(tmp_path):
    data = DataSettings(texts=("hf:who/knows",), pairs=PAIRS)
    assert sizes_of(tmp_path, data).unknown == ("hf:who/knows",)
    assert sizes_of(tmp_path, data).texts is None
    assert sizes_of(tmp_path, data, ExtractionSettings(limit_tokens=5000)).texts.tokens == 5000
    bounded = DataSettings(texts=("hf:who/knows",), pairs=PAIRS, max_texts=50)
    assert sizes_of(tmp_path, bounded).texts.rows == 50

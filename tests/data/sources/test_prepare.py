import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sarm.contracts.ids import hash_share, prompt_id_of, stable_id, stable_int
from sarm.contracts.tables import CORPUS_TABLE, PAIRS_TABLE
from sarm.data.sources import prepare
from sarm.data.sources.prepare import prepare_corpus, prepare_pairs
from sarm.settings.checks import UserError
from sarm.settings.data import DataSettings


def write(path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(folder) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def pairs_of(prompt: str, *answers: tuple[str, str]) -> list[dict]:
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen, rejected in answers]


def many_prompts(n: int = 40) -> list[dict]:
    return [row for i in range(n) for row in pairs_of(f"Prompt {i}?", ("Yes.", "No."))]


def test_a_corpus_holds_each_text_once_in_the_order_read(tmp_path):
    a = write(tmp_path / "a.jsonl", {"text": "One."}, {"text": "Two."}, {"text": "One."}, {"no": 1})
    b = write(tmp_path / "b.jsonl", {"text": "Two."}, {"text": "Three."}, {"text": " "})
    counts = prepare_corpus(DataSettings(texts=(a, b)), tmp_path / "out")
    assert read(tmp_path / "out") == [
        {"row_id": stable_int(text), "text": text, "source": source}
        for text, source in (("One.", a), ("Two.", a), ("Three.", b))
    ]
    assert counts == {
        "rows": 3,
        "conversations": 0,
        "characters": len("One.Two.Three."),
        "duplicates": 2,
        "rejected": {"missing_text": 1, "empty": 1},
        "contents_with_control_tokens": 0,
        "contents_already_templated": 0,
        "corrupt_files": [],
        "sources": {a: 2, b: 1},
    }
    assert json.loads(json.dumps(counts)) == counts


def test_corpus_files_have_the_schema_row_groups_and_page_checksums(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "ROWS_PER_GROUP", 10)
    monkeypatch.setattr(prepare, "ROWS_PER_FILE", 30)
    spec = write(tmp_path / "a.jsonl", *({"text": f"Text {i}."} for i in range(65)))
    prepare_corpus(DataSettings(texts=(spec,)), tmp_path / "out")
    paths = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in paths] == [f"part-0000{i}.parquet" for i in range(3)]
    assert [pq.read_metadata(path).num_rows for path in paths] == [30, 30, 5]
    assert pq.read_metadata(paths[0]).num_row_groups == 3
    assert all(pq.read_schema(path).equals(CORPUS_TABLE) for path in paths)
    raw = bytearray(paths[0].read_bytes())
    column = pq.read_metadata(paths[0]).row_group(0).column(1)
    raw[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    paths[0].write_bytes(raw)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.ParquetFile(paths[0], page_checksum_verification=True).read()


def test_a_damaged_file_is_named_in_the_counts(tmp_path):
    write(tmp_path / "a.jsonl", {"text": "One."})
    (tmp_path / "b.jsonl.zst").write_bytes(b"no zstandard")
    counts = prepare_corpus(DataSettings(texts=(f"{tmp_path}/*.jsonl*",)), tmp_path / "out")
    assert counts["rows"] == 1
    assert counts["rejected"] == {"corrupt_file": 1}
    assert counts["corrupt_files"] == [str(tmp_path / "b.jsonl.zst")]


def test_every_source_is_checked_before_anything_is_written(tmp_path):
    good = write(tmp_path / "a.jsonl", {"text": "One."})
    with pytest.raises(UserError, match="no file"):
        prepare_corpus(DataSettings(texts=(good, str(tmp_path / "b.jsonl"))), tmp_path / "out")
    with pytest.raises(UserError, match="no file"):
        prepare_pairs(DataSettings(pairs=("tiny:pairs", str(tmp_path / "b.jsonl"))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_a_usable_text_is_an_error_that_says_why(tmp_path):
    spec = write(tmp_path / "a.jsonl", {"body": "x"}, {"text": ""})
    with pytest.raises(
        UserError,
        match=r"no usable text .*1 missing_text, first .*a\.jsonl:1; 1 empty, first .*a\.jsonl:2.*--data.text-field",
    ):
        prepare_corpus(DataSettings(texts=(spec,)), tmp_path / "out")
    with pytest.raises(UserError, match=r"Pass --data\.texts"):
        prepare_corpus(DataSettings(), tmp_path / "out")


def test_the_text_limit_holds_for_each_source(tmp_path):
    counts = prepare_corpus(DataSettings(texts=("tiny:texts",), max_texts=5), tmp_path / "out")
    assert counts["rows"] == 5


def test_pairs_are_sorted_so_that_a_prompts_pairs_are_neighbours_in_one_split(tmp_path):
    counts = prepare_pairs(DataSettings(pairs=("tiny:pairs",)), tmp_path / "out")
    rows = read(tmp_path / "out")
    assert [(r["prompt_id"], r["pair_id"]) for r in rows] == sorted((r["prompt_id"], r["pair_id"]) for r in rows)
    assert counts["rows"] == len(rows) == 120
    assert counts["prompts"] == 40
    assert counts["splits"] == {split: sum(r["split"] == split for r in rows) for split in ("train", "heldout")}
    assert len({(r["prompt_id"], r["split"]) for r in rows}) == 40
    assert pq.read_schema(tmp_path / "out/part-00000.parquet").equals(PAIRS_TABLE)
    assert json.loads(json.dumps(counts)) == counts


def test_a_pair_has_ids_of_its_content_and_a_split_by_its_prompt(tmp_path):
    spec = write(tmp_path / "a.jsonl", *many_prompts())
    prepare_pairs(DataSettings(pairs=(spec,), heldout_share=0.5), tmp_path / "out")
    for row in read(tmp_path / "out"):
        assert row["prompt_id"] == prompt_id_of(row["prompt"])
        assert row["pair_id"] == stable_id(row["prompt_id"], "Yes.", "No.")
        assert row["split"] == ("heldout" if hash_share(row["prompt_id"]) < 0.5 else "train")


def test_a_prompt_is_one_whatever_its_case_white_space_and_unicode_form(tmp_path):
    spellings = [
        "What is it?",
        "What is it? ",
        "what  is\tit?\n",
        "WHAT IS IT?",
        "\uff37hat is it?",
        "What is\u00a0it?",
    ]
    rows = many_prompts() + [row for n, q in enumerate(spellings) for row in pairs_of(q, (f"Yes {n}.", "No."))]
    counts = prepare_pairs(DataSettings(pairs=(write(tmp_path / "a.jsonl", *rows),)), tmp_path / "out")
    found = [row for row in read(tmp_path / "out") if row["chosen"] != "Yes."]
    assert counts["prompts"] == 41
    assert len({row["prompt_id"] for row in found}) == len({row["split"] for row in found}) == 1
    assert {row["prompt"][0]["content"] for row in found} == set(spellings), "the texts stay as they were"
    other = prompt_id_of([{"role": "system", "content": "What is it?"}])
    assert other != found[0]["prompt_id"], "who says it makes another prompt"


def test_one_pair_under_two_spellings_of_its_prompt_is_one_pair(tmp_path):
    rows = (
        many_prompts()
        + pairs_of("Odd?", ("A.", "B."))
        + pairs_of("odd? ", ("A.", "B."), ("C.", "D."))
        + pairs_of("ODD?", ("D.", "C."))
    )
    counts = prepare_pairs(DataSettings(pairs=(write(tmp_path / "a.jsonl", *rows),)), tmp_path / "out")
    assert (counts["duplicates"], counts["contradictory"], counts["rows"]) == (1, 2, 41)


def test_near_duplicates_across_the_split_are_counted_and_named(tmp_path):
    rows = [
        row
        for i in range(60)
        for row in pairs_of(f"How would one best describe the colour number {i}?", ("Yes.", "No."))
    ]
    rows += [
        row
        for word in ("Quartz", "Basil")
        for row in pairs_of(f"{word} {word[::-1]} " * 9, ("Yes.", "No."), ("A.", "B."))
    ]
    counts = prepare_pairs(
        DataSettings(pairs=(write(tmp_path / "a.jsonl", *rows),), heldout_share=0.3), tmp_path / "out"
    )
    named = json.loads((tmp_path / "out" / "near_duplicates.json").read_text())
    kept = read(tmp_path / "out")
    split = {row["prompt_id"]: row["split"] for row in kept}
    text = {row["prompt_id"]: row["prompt"][0]["content"] for row in kept}
    wanted = {prompt for prompt, where in split.items() if where == "heldout" and "colour" in text[prompt]}
    assert set(named["prompts"]) == wanted
    assert counts["near_duplicate_prompts"] == counts["near_duplicate_pairs"] == len(wanted) > 5
    assert all(split[near["prompt_id"]] == "train" and near["similarity"] >= 0.5 for near in named["prompts"].values())


def test_the_order_of_sources_does_not_change_the_rows(tmp_path):
    a = write(tmp_path / "a.jsonl", *many_prompts())
    b = write(tmp_path / "b.jsonl", *pairs_of("Other?", ("Yes.", "No.")))
    prepare_pairs(DataSettings(pairs=(a, b)), tmp_path / "ab")
    prepare_pairs(DataSettings(pairs=(b, a)), tmp_path / "ba")
    assert read(tmp_path / "ab") == read(tmp_path / "ba")


def test_duplicates_are_dropped_and_pairs_in_both_directions_are_dropped_both(tmp_path):
    rows = many_prompts() + pairs_of("Odd?", ("A.", "B."), ("A.", "B."), ("B.", "A."), ("A.", "C."))
    counts = prepare_pairs(DataSettings(pairs=(write(tmp_path / "a.jsonl", *rows),)), tmp_path / "out")
    odd = [r for r in read(tmp_path / "out") if r["prompt"][0]["content"] == "Odd?"]
    assert [(r["chosen"], r["rejected"]) for r in odd] == [("A.", "C.")]
    assert counts["duplicates"] == 1
    assert counts["contradictory"] == 2
    assert counts["rows"] == 41


def test_a_prompt_keeps_its_pairs_with_the_smallest_ids(tmp_path):
    rows = many_prompts() + pairs_of("Big?", *((f"Yes {i}.", "No.") for i in range(30)))
    spec = write(tmp_path / "a.jsonl", *rows)
    counts = prepare_pairs(DataSettings(pairs=(spec,), max_pairs_per_prompt=4), tmp_path / "out")
    big = [r["pair_id"] for r in read(tmp_path / "out") if r["prompt"][0]["content"] == "Big?"]
    prompt_id = prompt_id_of([{"role": "user", "content": "Big?"}])
    assert big == sorted(stable_id(prompt_id, f"Yes {i}.", "No.") for i in range(30))[:4]
    assert counts["over_prompt_cap"] == 26
    assert counts["sources"] == {spec: 44}


def test_without_a_cap_every_pair_is_kept(tmp_path):
    rows = many_prompts() + pairs_of("Big?", *((f"Yes {i}.", "No.") for i in range(80)))
    spec = write(tmp_path / "a.jsonl", *rows)
    assert prepare_pairs(DataSettings(pairs=(spec,)), tmp_path / "a")["rows"] == 40 + 60
    assert prepare_pairs(DataSettings(pairs=(spec,), max_pairs_per_prompt=None), tmp_path / "b")["rows"] == 40 + 80


def test_pairs_of_which_none_is_usable_are_an_error_that_says_why(tmp_path):
    spec = write(tmp_path / "a.jsonl", *pairs_of("Hi?", ("Same.", "Same."), ("", "No.")))
    with pytest.raises(
        UserError, match=r"no usable pair .*1 equal_answers, first .*a\.jsonl:1; 1 empty_answer, first .*a\.jsonl:2"
    ):
        prepare_pairs(DataSettings(pairs=(spec,)), tmp_path / "out")
    with pytest.raises(UserError, match=r"Pass --data\.pairs"):
        prepare_pairs(DataSettings(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_split_is_an_error_before_anything_is_written(tmp_path):
    spec = write(tmp_path / "a.jsonl", *pairs_of("Only?", ("Yes.", "No.")))
    with pytest.raises(UserError, match=r"the (train|heldout) split is empty: 1 prompts"):
        prepare_pairs(DataSettings(pairs=(spec,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()

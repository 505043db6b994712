"""Reading benchmarks: official fields from every container, bad rows named, partial files accepted."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sarm.data.sources.rows import Row
from sarm.evaluate.benchmarks.reading import read_benchmark
from sarm.evaluate.benchmarks.sources import load_benchmark, parse_source
from sarm.settings.checks import UserError

SHARED = Path(__file__).parent.parent.parent.parent / "shared" / "data"


def rb2(row_id: object, subset: str = "Safety", chosen: int = 1, **fields: object) -> dict:
    texts = {"chosen": [f"good {i}" for i in range(chosen)], "rejected": ["bad 0", "bad 1", "bad 2"]}
    return {"id": row_id, "prompt": f"question {row_id}", "subset": subset, "num_correct": chosen, **texts, **fields}


def read(name: str, *rows: dict) -> tuple[list, list]:
    return read_benchmark(name, [Row(fields, f"file:{i}") for i, fields in enumerate(rows)])


BAD = {
    "missing prompt": (rb2(1, prompt=None), "missing prompt"),
    "missing chosen": (rb2(1, chosen=1) | {"chosen": None}, "missing chosen"),
    "missing subset": (rb2(1, subset=None), "missing subset"),
    "missing id": (rb2(None), "missing id"),
    "no completion": (rb2(1) | {"rejected": []}, "rejected is not a list of texts"),
    "a number": (rb2(1) | {"rejected": [3]}, "rejected is not a list of texts"),
    "empty prompt": (rb2(1, prompt=" "), "empty text"),
    "unknown subset": (rb2(1, subset="Chess"), "unknown subset 'Chess'"),
    "another count": (rb2(1, num_correct=2), "num_correct is 2, chosen has 1"),
    "two correct": (rb2(1, chosen=2), "chosen has 2 completions, expected 1"),
    "bad Ties id": (rb2("7", "Ties"), "a Ties id is ref:NUMBER or tied:NUMBER"),
    "Ties with one correct": (rb2("tied:7", "Ties"), "a tied row has several correct completions"),
    "one-sided Ties": (rb2("ref:7", "Ties"), "no partner tied:7"),
    "a broken character": (rb2(1) | {"chosen": ["\ud800"]}, "lone_surrogate text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_with_its_reason_and_the_rest_is_read(case):
    fields, reason = BAD[case]
    good, bad = read("reward_bench_2", rb2(100), fields, rb2(101))
    assert [row.row_id for row in good] == ["100", "101"]
    assert [(row.where, row.reason) for row in bad] == [("file:1", reason)]


def test_an_id_may_repeat_across_subsets_but_not_within_one():
    good, bad = read("reward_bench_2", rb2(1), rb2(1, "Math"), rb2(1))
    assert [row.subset for row in good] == ["Safety", "Math"]
    assert bad[0].reason == "repeated id 1"


def test_an_empty_completion_is_scored_as_the_official_codes_do_and_left_out_of_own_pairs():
    (row,), bad = read("reward_bench_2", rb2(1) | {"rejected": ["bad", "", " "]})
    assert (row.completions, bad) == (("good 0", "bad", "", " "), [])
    pair = {"id": 1, "prompt": "q", "chosen": "a", "rejected": "", "subset": "donotanswer"}
    (row,), _ = read("reward_bench", pair)
    assert row.completions == ("a", "")
    assert [one.reason for one in read("pairs", pair)[1]] == ["empty_answer"]


def test_own_pairs_of_several_answers_compare_each_correct_one_with_each_wrong_one():
    (row,), _ = read("pairs", {"prompt": "q", "chosen": ["a", "b"], "rejected": ["c"]})
    assert (row.completions, row.num_correct) == (("a", "b", "c"), 2)
    ranked = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [3, 2, 1]}
    assert [one.reason for one in read("pairs", ranked)[1]] == ["ranked_answers"]


def test_rm_bench_rows_need_three_styles_and_take_their_domain_before_their_subset():
    fields = {"id": 1, "prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "subset": "alpacaeval"}
    good, bad = read("rm_bench", {**fields, "domain": "chat"}, {**fields, "chosen": ["a"], "domain": "chat"}, fields)
    assert [(row.subset, row.num_correct, len(row.completions)) for row in good] == [("chat", 3, 6)]
    assert [row.reason for row in bad] == ["chosen has 1 completions, expected 3", "unknown subset 'alpacaeval'"]


def test_pairs_are_read_as_conversations_and_best_of_n_as_lists():
    turns = [{"role": "user", "content": "q"}]
    pair = {side: [*turns, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    (row,), _ = read("pairs", pair)
    assert (row.prompt, row.completions, row.num_correct) == (tuple(turns), ("chosen", "rejected"), 1)
    (row,), _ = read("best_of_n", {"prompt": "q", "chosen": ["a", "b"], "rejected": ["c"]})
    assert (row.num_correct, len(row.completions)) == (2, 3)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz", "x.parquet"])
def test_every_container_gives_the_same_rows(name, tmp_path):
    rows = [rb2(i) for i in range(5)]
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows) if ".json" in name and "jsonl" not in name else "\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    loaded = load_benchmark(parse_source(f"reward_bench_2={path}"), None, False)
    assert [row.row_id for row in loaded.rows] == ["0", "1", "2", "3", "4"]
    plain = jsonl(tmp_path / "plain.jsonl", rows)
    assert loaded.digest == load_benchmark(parse_source(f"reward_bench_2={plain}"), None, False).digest


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_under_half_usable_is_refused_unless_partial_is_allowed(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [rb2(0), rb2(1, prompt=None), rb2(2, prompt=None)])
    source = parse_source(f"reward_bench_2={path}")
    with pytest.raises(UserError, match=r"only 1 of the 3 rows .*missing prompt.*--allow-partial"):
        load_benchmark(source, None, False)
    assert len(load_benchmark(source, None, True).rows) == 1


def test_nothing_usable_is_refused_whatever_is_allowed(tmp_path):
    with pytest.raises(UserError, match="none of the 1 rows"):
        load_benchmark(parse_source(f"rm_bench={jsonl(tmp_path / 'x.jsonl', [rb2(0)])}"), None, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [("chess=x", "unknown benchmark chess"), ("pairs", "no public data set"), ("rm_bench=/no/such.jsonl", "no file")],
)
def test_a_source_that_is_not_there_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        parse_source(text)


def test_a_name_stands_for_the_public_data_set_and_owner_slash_name_for_another():
    assert parse_source("reward_bench_2").place == "hf:allenai/reward-bench-2:test"
    assert parse_source("reward_bench_2=me/mine").place == "hf:me/mine:test"


def test_a_limit_keeps_ties_partners_together_and_depends_on_the_prompts_alone(tmp_path):
    rows = [row for i in range(20) for row in (rb2(f"ref:{i}", "Ties"), rb2(f"tied:{i}", "Ties", 2))]
    one = load_benchmark(parse_source(f"reward_bench_2={jsonl(tmp_path / 'x.jsonl', rows)}"), 10, False)
    other = load_benchmark(parse_source(f"reward_bench_2={jsonl(tmp_path / 'y.jsonl', rows[::-1])}"), 10, False)
    assert {row.row_id for row in one.rows} == {row.row_id for row in other.rows}
    assert len(one.rows) == 10
    assert len({row.row_id.split(":")[1] for row in one.rows}) == 5


@pytest.mark.skipif(not SHARED.exists(), reason="the partial benchmark files are not on this machine")
def test_the_real_partial_files_are_read_whole():
    found = [
        load_benchmark(parse_source(text), None, False)
        for text in (
            f"reward_bench_2={SHARED / 'reward_bench_2' / 'safety.jsonl.gz'}",
            f"rm_bench={SHARED / 'rm_bench'}/*.jsonl.gz",
            f"pairs={SHARED / 'hh_rlhf_harmless' / 'pairs.jsonl.gz'}",
        )
    ]
    assert [len(one.rows) for one in found[:2]] == [225, 286]
    assert len(found[2].rows) + len(found[2].bad) == 1700
    assert not found[0].bad
    assert not found[1].bad

"""A benchmark is one file and one entry: everything else iterates over the registry."""

import pyarrow as pa
import pytest

from sarm.contracts.tables import ITEMS_TABLE
from sarm.data.sources.rows import Row
from sarm.evaluate.benchmarks.benchmark import Benchmark, Measure, Parsed
from sarm.evaluate.benchmarks.fields import prompt_in, texts_in
from sarm.evaluate.benchmarks.pairs import observe
from sarm.evaluate.benchmarks.reading import read_benchmark
from sarm.evaluate.benchmarks.registry import BENCHMARKS
from sarm.evaluate.benchmarks.sources import parse_source
from sarm.evaluate.benchmarks.suite import measure, metrics
from sarm.report.benchmark_page import build_page
from sarm.report.pages import to_markdown
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.checks import UserError
from sarm.stages.job import _parse_flags

CHESS = Benchmark(
    name="chess",
    title="Chess problems",
    prefix="chess",
    parse=lambda fields: Parsed(prompt_in(fields), texts_in(fields, "best"), texts_in(fields, "blunders"), "mates"),
    observe=observe,
    data_set="hf:owner/chess:test",
    subsets={"mates": 3},
    controls=(Measure("moves", "mean number of moves", lambda rows, figures: float(len(rows[0].scores))),),
)


@pytest.fixture
def with_chess(monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "chess", CHESS)


def test_a_new_entry_is_read_measured_logged_and_shown(with_chess):
    fields = {"id": 7, "prompt": "mate in 1?", "best": "Qh7", "blunders": ["Qa1", "Kb2"]}
    good, bad = read_benchmark("chess", [Row(fields, "here:1"), Row({**fields, "best": None}, "here:2")])
    assert [row.reason for row in bad] == ["missing best"]
    (row,) = good
    items = [
        {"benchmark": "chess", "subset": row.subset, "row_id": row.row_id, "variant": "", "completion": place, "correct": place < 1,
         "cluster": row.cluster, "completion_id": text, "num_chars": 3, "markup": 0, "num_tokens": 3, "truncated": False, "score": -place, "score_alone": None}
        for place, text in enumerate(row.completions)
    ]  # fmt: skip
    measured = measure(pa.Table.from_pylist(items, schema=ITEMS_TABLE), 0)
    chess = measured["benchmarks"]["chess"]
    assert (chess["coverage"], chess["figures"]["overall"]["value"]) == ({"mates": "1 of 3"}, 1.0)
    assert metrics(measured)["control/chess_moves"] == 3.0
    shown = {"source": "here", "left_out": [{"where": bad[0].where, "reason": bad[0].reason}], **chess}
    page = to_markdown(build_page({"title": "t", "facts": {}, "notes": [], "benchmarks": {"chess": shown}}))
    assert "## Chess problems: controls" in page
    assert "mean number of moves | 300.0 %" in page


def test_errors_and_help_list_what_is_registered(with_chess, capsys):
    with pytest.raises(UserError, match=r"Known are reward_bench_2, rm_bench, reward_bench, pairs, best_of_n, chess\."):
        parse_source("go=x.jsonl")
    assert parse_source("chess").place == "hf:owner/chess:test"
    with pytest.raises(SystemExit):
        _parse_flags(Benchmarking, ["--help"], "job", "")
    assert "best_of_n, chess" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=list(BENCHMARKS))
def test_every_benchmark_says_what_a_user_is_told_of_it(benchmark):
    assert BENCHMARKS[benchmark.name] is benchmark
    assert benchmark.title
    assert [other.name for other in BENCHMARKS.values() if other.prefix == benchmark.prefix] == [benchmark.name]
    assert (benchmark.subsets is None) == (benchmark.data_set == ""), "public data has published subsets"

"""The whole evaluation on a cluster, with a function as the model: files, cache, resumption, comparison, MLflow."""

import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from sarm.evaluate.benchmarks.suite import measure, metric_name, metrics
from sarm.settings.benchmarks import Benchmarking, Comparison
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings
from sarm.stages.benchmark import run_benchmarks
from sarm.stages.compare import run_comparison

# Scores by a number that each completion ends in; "nan" stays what it is, and a mark on disk counts the calls.
MODEL = """
from pathlib import Path
def score(conversations):
    calls = Path(__file__).with_suffix(".calls")
    calls.open("a").write("x" * len(conversations))
    return [float(c[-1]["content"].split()[-1]) for c in conversations]
def reverse(conversations):
    return [-float(c[-1]["content"].split()[-1]) for c in conversations]
"""


def rb2(number: int, subset: str, row_id: str, correct: list[float], wrong: list[float]) -> dict:
    texts = {"chosen": [f"answer {x}" for x in correct], "rejected": [f"answer {x}" for x in wrong]}
    return {"id": row_id, "prompt": f"question {number}", "subset": subset, **texts}


ROWS = [
    *(rb2(i, "Math", str(i), [2.0], [1.0, 0.0, 0.5 if i else 2.0]) for i in range(6)),
    rb2(10, "Ties", "ref:0", [5], [0, 0.25]),
    rb2(11, "Ties", "tied:0", [3, 2.75], [0]),
    rb2(20, "Safety", "1", [1], [float("nan"), 0, 0.5]),
    rb2(30, "Chess", "1", [1], [0, 0.5]),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, mlflow_db: Path) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    shutil.copy(mlflow_db, folder / "mlflow.db")
    (folder / "model.py").write_text(MODEL)
    (folder / "rb2.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


@pytest.fixture(scope="module")
def evaluate(work: Path, ray_cluster: None):
    patch = pytest.MonkeyPatch()
    patch.setenv("SARM_CACHE", str(work / "cache"))

    def run(name: str, function: str = "score", **fields) -> Path:
        return run_benchmarks(
            Benchmarking(
                run=RunSettings(out=work / name, cpus_per_worker=1),
                model=f"{work / 'model.py'}:{function}",
                benchmarks=(f"reward_bench_2={work / 'rb2.jsonl'}",),
                **{"drift_items": 4, "probes": ("quoting",), "probe_rows": 3} | fields,
            )
        )

    yield run
    patch.undo()


@pytest.fixture(scope="module")
def finished(evaluate) -> Path:
    return evaluate("first")


def test_figures_are_those_of_the_official_rules(finished):
    figures = json.loads((finished / "report.json").read_text())["benchmarks"]["reward_bench_2"]["figures"]
    assert figures["Math"]["value"] == (5 + 0.5) / 6
    assert figures["Ties"]["value"] == pytest.approx(1 + 0.01 * math.tanh(2.75 / 0.25 - 1), abs=1e-12)
    assert figures["overall"]["value"] == (figures["Math"]["value"] + figures["Ties"]["value"]) / 2
    low, high = figures["Math"]["ci95"]
    assert low < figures["Math"]["value"] <= high


def test_rows_left_out_are_named_with_their_reason(finished):
    report = json.loads((finished / "report.json").read_text())
    one = report["benchmarks"]["reward_bench_2"]
    assert [row["reason"] for row in one["left_out"]] == ["unknown subset 'Chess'"]
    assert one["unscored"] == [{"where": "Safety/1", "reason": "score is not a finite number"}]
    assert "Safety" not in one["figures"]
    assert any("2 of 10 rows are left out" in note for note in report["notes"])
    assert "unknown subset" in (finished / "report.html").read_text()


def test_every_figure_is_recomputed_from_the_items_alone(finished):
    report = json.loads((finished / "report.json").read_text())
    again = measure(pq.read_table(finished / "items.parquet"), 0)
    own = again["benchmarks"]["reward_bench_2"]
    told = report["benchmarks"]["reward_bench_2"]
    assert json.loads(json.dumps(own)) == {key: told[key] for key in own}
    assert report["drift"]["max"] == 0
    assert told["probes"]["quoting"]["flipped"] == 0


def test_the_run_tracker_has_the_metrics_by_their_names(finished, work):
    run_id = json.loads((finished / "stage.json").read_text())["notes"]["mlflow_run_id"]
    logged = MlflowClient(f"sqlite:///{work / 'mlflow.db'}").get_run(run_id).data.metrics
    report = json.loads((finished / "report.json").read_text())
    assert {"rb2/overall", "rb2/Math", "rb2/overall_ci_lo", "rb2/overall_ci_hi", "drift/max"} <= logged.keys()
    assert logged == pytest.approx(metrics(report))


def test_scored_in_this_process_the_items_and_figures_are_the_clusters(finished, evaluate, work, monkeypatch, capsys):
    monkeypatch.setenv("SARM_CACHE", str(work / "other cache"))
    here = evaluate("here", in_process=True)
    assert "scoring in this process, without Ray" in capsys.readouterr().out
    told, of_cluster = (json.loads((folder / "report.json").read_text()) for folder in (here, finished))
    assert told["scoring"]["num_cached"] == 0
    assert told["scoring"]["num_scored"] == of_cluster["scoring"]["num_scored"] > 0
    for one in (told, of_cluster):
        one["figures"] = one["benchmarks"]["reward_bench_2"]["figures"]
    assert told["figures"] == of_cluster["figures"]
    items, others = (pq.read_table(folder / "items.parquet").to_pylist() for folder in (here, finished))
    assert repr(items) == repr(others)


def test_a_pass_in_this_process_goes_on_where_it_was_stopped(evaluate, work, monkeypatch):
    monkeypatch.setenv("SARM_CACHE", str(work / "third cache"))
    evaluate("begun", in_process=True)
    parts = sorted((work / "third cache" / "scores").glob("*/*/*.parquet"))
    lost = pq.read_table(parts[0]).num_rows
    parts[0].unlink()
    evaluate("gone on", in_process=True, allow_partial=True)
    told = json.loads((work / "gone on" / "report.json").read_text())["scoring"]
    assert told["num_scored"] == lost
    assert told["num_cached"] > 0


def test_a_cluster_and_this_process_are_not_asked_for_at_once(work, monkeypatch):
    monkeypatch.setenv("SARM_CACHE", str(work / "fourth cache"))
    settings = Benchmarking(
        run=RunSettings(out=work / "both", ray_address="10.0.0.1:6379"),
        model=f"{work / 'model.py'}:score",
        benchmarks=(f"reward_bench_2={work / 'rb2.jsonl'}",),
        in_process=True,
    )
    with pytest.raises(UserError, match="names a cluster, and --in-process"):
        run_benchmarks(settings)
    assert not (work / "both").exists()


@pytest.mark.parametrize(
    ("figure", "name"),
    [("chat/hard", "rmbench/chat_hard"), ("", "rmbench/all"), ("..", "rmbench/all"), ("a:b%\n<x>", "rmbench/a_b___x_")],
)
def test_a_metric_has_a_name_that_the_tracker_takes(figure, name):
    assert metric_name("rmbench", figure) == name


def test_the_same_texts_are_scored_once_ever(finished, evaluate, work):
    calls = (work / "model.calls").read_text()
    assert evaluate("first") == finished
    evaluate("second", allow_partial=True)
    assert (work / "model.calls").read_text() == calls
    told = json.loads((work / "second" / "report.json").read_text())["scoring"]
    assert (told["num_scored"], told["num_cached"] > 0) == (0, True)


def test_an_interrupted_run_scores_only_what_is_missing(finished, evaluate, work):
    parts = sorted((work / "cache" / "scores").glob("*/*/*.parquet"))
    lost = pq.read_table(parts[0]).num_rows
    parts[0].unlink()
    evaluate("third", allow_partial=True)
    told = json.loads((work / "third" / "report.json").read_text())
    assert told["scoring"]["num_scored"] == lost
    assert told["scoring"]["num_cached"] > 0
    before = json.loads((finished / "report.json").read_text())["benchmarks"]["reward_bench_2"]["figures"]
    after = told["benchmarks"]["reward_bench_2"]["figures"]
    assert {k: v["value"] for k, v in after.items()} == {k: v["value"] for k, v in before.items()}


def test_other_settings_do_not_touch_a_finished_folder(finished, evaluate):
    with pytest.raises(UserError, match=r"allow_partial=False, now asked for allow_partial=True"):
        evaluate("first", allow_partial=True)


def test_a_comparison_sees_the_difference_and_logs_it(finished, evaluate, work):
    evaluate("reversed", "reverse", probes=())
    run = RunSettings(out=work / "comparison")
    folder = run_comparison(Comparison(run_a=finished, run_b=work / "reversed", run=run, permutations=200))
    one = json.loads((folder / "report.json").read_text())["benchmarks"]["reward_bench_2"]
    assert one["figures"]["Math"]["difference"] == 5.5 / 6
    assert one["figures"]["Math"]["difference_ci95"][0] > 0
    assert one["subsets"]["Math"] == {
        "num_rows": 6,
        "num_prompts": 6,
        "only_a": 5,
        "only_b": 0,
        "p_swap": 0.0625,
        "p_holm": 0.125,
    }
    assert {"report.md", "report.html", "reward_bench_2.png"} <= {path.name for path in folder.iterdir()}
    assert run_comparison(Comparison(run_a=finished, run_b=work / "reversed", run=run, permutations=200)) == folder


def test_a_changed_evaluation_is_not_compared(finished, work):
    shutil.copytree(finished, work / "edited")
    (work / "edited" / "report.json").write_text("{}")
    with pytest.raises(UserError, match=r"report.json has changed"):
        run_comparison(Comparison(run_a=finished, run_b=work / "edited", run=RunSettings(out=work / "none")))
    assert not (work / "none").exists()


def test_an_evaluation_whose_prompts_were_told_apart_by_their_exact_text_is_refused(finished, evaluate, work, monkeypatch):  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("sarm.stages.benchmark.BENCHMARK", "benchmarks/v1")
        old = evaluate("old", probes=())
    with pytest.raises(UserError, match=r"expected benchmarks/v2 in .*old, got benchmarks/v1\. Run its stage again") as error:  # fmt: skip
        run_comparison(Comparison(run_a=finished, run_b=old, run=RunSettings(out=work / "none")))
    assert "\n" not in str(error.value)
    assert not (work / "none").exists()


def test_a_comparison_says_that_scores_are_of_two_versions_of_the_protocol(finished, evaluate, work, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("sarm.stages.benchmark.PROTOCOL_VERSION", 1)
        older = evaluate("older", probes=())
    run = RunSettings(out=work / "two versions")
    folder = run_comparison(Comparison(run_a=finished, run_b=older, run=run, permutations=100))
    notes = json.loads((folder / "report.json").read_text())["notes"]
    assert any("differ in protocol version" in note for note in notes)

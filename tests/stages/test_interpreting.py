"""The interpret job over real HTTP: files, MLflow, resumption, failures, two judges."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from tests.engine.judge_server import FAULTS, JudgeServer, dealt
from tests.interpret.planted import WORDS, guessing, perfect, write_planted

from sarm.contracts.folders import EXPLANATIONS_FOLDER
from sarm.contracts.manifest import read_manifest, verify_files
from sarm.contracts.tables import EXPLANATIONS_TABLE
from sarm.engine.llm.endpoint import JudgeStoppedError
from sarm.interpret.labels import EXTRACTIVE
from sarm.settings.checks import UserError
from sarm.settings.judging import HumanRatings, Interpret, Judging
from sarm.settings.run import RunSettings
from sarm.stages.interpret import run_interpretation
from sarm.stages.rate import run_ratings

KEY = "sk-another-secret-0123456789"


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory, mlflow_db: Path) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    shutil.copy(mlflow_db, folder / "mlflow.db")
    return write_planted(folder / "contexts")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("SARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with JudgeServer(perfect).serving() as server:
        yield server


def run_of(contexts: Path, out: Path) -> RunSettings:
    """One database for all tests: making its tables takes longer than the tests themselves."""
    return RunSettings(out=out, mlflow_uri=f"sqlite:///{contexts.parent / 'mlflow.db'}")


def settings(contexts: Path, out: Path, judges: tuple[str, ...], latents: tuple[int, ...] = (), **judging) -> Interpret:
    hosts = {judge.split("://")[1].split("/")[0] for judge in judges}
    keys = tuple(f"{host}=env:JUDGE_KEY" for host in sorted(hosts))
    own = Judging(judges=judges, keys=keys, **{"timeout": 20.0, **judging})
    return Interpret(contexts=contexts, run=run_of(contexts, out), judging=own, latents=latents, num_explain=8, num_test=10, intruder_trials=2)  # fmt: skip


def table(out: Path, name: str = "explanations") -> list[dict]:
    return pq.read_table(out / f"{name}.parquet").to_pylist()


def test_explanations_scores_ratings_and_costs_of_two_judges(contexts, server, tmp_path):
    out = tmp_path / "two-judges"
    with JudgeServer(guessing).serving() as second:
        judges = (f"wise@{server.url}", f"fool@{second.url}")
        config = settings(contexts, out, judges, prices=("wise=1/2",))
        run_interpretation(config)
        asked = server.asked + second.asked
        most = config.questions_per_latent()
        assert {name: num for name, num in most.items() if name == "fool"} == {"fool": 2}
        assert second.asked == 2 * len(WORDS)
        assert server.asked <= most["wise"] * len(WORDS)
        run_interpretation(config)
        assert server.asked + second.asked == asked, "a finished folder asks nothing"
    verify_files(out, read_manifest(out, EXPLANATIONS_FOLDER))
    assert pq.read_schema(out / "explanations.parquet").equals(EXPLANATIONS_TABLE)
    rows = {(row["latent"], row["explainer"]): row for row in table(out)}
    assert rows.keys() == {(i, name) for i in range(len(WORDS)) for name in ("wise", EXTRACTIVE)}
    for latent, word in enumerate(WORDS):
        row = rows[latent, "wise"]
        assert (row["explanation"], row["status"], row["detection"]) == (f"mentions the {word}", "ok", 1.0)
        assert row["baseline_none"] == 0.5
        assert row["num_scored"] >= 20
        # The perfect judge understands a label only where it names the word.
        assert word in rows[latent, EXTRACTIVE]["explanation"]
        assert rows[latent, EXTRACTIVE]["detection"] == 1.0
        assert rows[latent, EXTRACTIVE]["monosemanticity"] is None
    ratings = table(out, "ratings")
    assert {(row["judge"], row["rubric"]) for row in ratings} == {(j, r) for j in ("wise", "fool") for r in ("safety", "monosemanticity")}  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["figures"]["detection"] == {"mean": 1.0, "num": 6, "of": 6}
    assert report["judges"][0]["usd"] == pytest.approx((report["judges"][0]["prompt_tokens"] + 2 * report["judges"][0]["completion_tokens"]) / 1e6)  # fmt: skip
    assert report["judges"][1]["usd"] is None
    assert report["agreement"]["safety"]["between"]["ac2"] is not None
    client = MlflowClient(config.run.mlflow_uri)
    experiment = client.get_experiment_by_name("sarm")
    (run,) = client.search_runs([experiment.experiment_id], "tags.mlflow.runName = 'two-judges'")
    assert run.data.metrics["interp/detection"] == 1.0
    assert "cost/usd" not in run.data.metrics, "an unknown price is no price"
    assert run.data.params["prompt.detect"]
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"explanations.parquet", "report.html", "prompts", "judges.json", "explanations.json"}  # fmt: skip
    places = (tmp_path, contexts.parent, Path(run.info.artifact_uri.removeprefix("file://")))
    written = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert len(written) > 30
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_under_faults_every_latent_is_explained_or_marked_and_a_second_run_asks_nothing(contexts, server, tmp_path):
    server.fault = dealt({**FAULTS, "timeout": 0})
    out = tmp_path / "out"
    run_interpretation(settings(contexts, out, (f"m@{server.url}",), (0, 1, 99), concurrency=16))
    rows = [row for row in table(out) if row["explainer"] == "m"]
    assert [(row["latent"], row["status"]) for row in rows] == [(0, "ok"), (1, "ok"), (99, "dead")]
    assert rows[2]["reason"] == "latent 99 fires nowhere in these texts"
    assert rows[0]["detection"] == 1.0
    report = json.loads((out / "report.json").read_text())
    assert server.asked <= 1.65 * report["judges"][0]["answers_asked"]
    asked = server.asked
    run_interpretation(settings(contexts, tmp_path / "again", (f"m@{server.url}",), (0, 1, 99)))
    assert server.asked == asked
    assert [{**row} for row in table(tmp_path / "again")] == table(out)


def test_a_stopped_run_leaves_no_finished_folder_and_goes_on_where_it_was(contexts, server, tmp_path):
    out = tmp_path / "out"
    config = settings(contexts, out, (f"m@{server.url}",), (0, 1), max_tokens_total=4_000)
    with pytest.raises(JudgeStoppedError, match="4,000 tokens"):
        run_interpretation(config)
    assert not (out / "manifest.json").exists()
    before = server.asked
    assert before > 5
    run_interpretation(settings(contexts, out, (f"m@{server.url}",), (0, 1)))
    assert {row["status"] for row in table(out)} == {"ok"}
    report = json.loads((out / "report.json").read_text())
    assert report["judges"][0]["answers_cached"] == before
    assert max(count for key, count in server.attempts.items() if key != "probe") == 1


def test_failed_answers_are_no_figures_until_they_are_asked_again(contexts, server, tmp_path):
    server.fault = lambda key, attempt: {"message": {"content": None, "refusal": "no"}} if attempt == 1 else None
    out = tmp_path / "out"
    run_interpretation(settings(contexts, out, (f"m@{server.url}",), (0,)))
    (row,) = [row for row in table(out) if row["explainer"] == "m"]
    assert (row["status"], row["explanation"], row["detection"], row["safety"]) == ("refused", "", None, None)
    report = json.loads((out / "report.json").read_text())
    assert report["figures"]["detection"]["mean"] is None
    assert report["failed_answers"] > 0
    assert "asks for them again" in (out / "report.md").read_text()
    # What depends on an answer is asked once there is one, so each step may need another run.
    for _ in range(4):
        run_interpretation(settings(contexts, out, (f"m@{server.url}",), (0,), retry_failed=True))
    (row,) = [row for row in table(out) if row["explainer"] == "m"]
    assert (row["status"], row["detection"], row["safety"]) == ("ok", 1.0, 5.0)
    assert json.loads((out / "report.json").read_text())["failed_answers"] == 0


def test_without_a_judge_there_are_labels_marked_as_such_and_no_scores(contexts, tmp_path):
    out = tmp_path / "out"
    run_interpretation(Interpret(contexts=contexts, run=run_of(contexts, out)))
    rows = table(out)
    assert {row["explainer"] for row in rows} == {EXTRACTIVE}
    assert [word in row["explanation"] for word, row in zip(WORDS, sorted(rows, key=lambda r: r["latent"]), strict=True)] == [True] * 6  # fmt: skip
    assert {row["detection"] for row in rows} == {None}
    assert "No judge was named" in (out / "report.md").read_text()


def test_people_rate_in_a_sheet_and_stand_beside_the_judges(contexts, server, tmp_path):
    out = tmp_path / "out"
    run_interpretation(settings(contexts, out, (f"m@{server.url}",)))
    run_ratings(HumanRatings(explanations=out, sheet=tmp_path / "sheet.csv", num_items=6))
    filled = []
    for rater, level in (("ada", "5"), ("bob", "4")):
        rows = list(csv.DictReader((tmp_path / "sheet.csv").open(encoding="utf-8-sig", newline="")))
        assert len(rows) == 7
        assert all(WORDS[int(row["latent"])] in row["context_1"] for row in rows)
        path = tmp_path / f"{rater}.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({**row, "rating": level, "rater_id": rater} for row in rows)
        filled.append(path)
    run = run_of(contexts, tmp_path / "people")
    run_ratings(HumanRatings(explanations=out, run=run, filled=tuple(filled)))
    report = json.loads((run.out / "report.json").read_text())
    assert report["people"]["safety"]["between"]["kappa"] == {"human:ada / human:bob": pytest.approx(0.0)}
    assert report["people"]["safety"]["within"]["human:ada"]["ac2"] == 1.0
    assert set(report["people_and_judges"]["safety"]["answered"]) == {"human:ada", "human:bob", "m"}
    assert {row["judge"] for row in table(run.out, "ratings")} == {"human:ada", "human:bob", "m"}
    with pytest.raises(UserError, match="two sheets are of ada"):
        run_ratings(HumanRatings(explanations=out, run=run, filled=(filled[0], filled[0])))


def test_what_cannot_work_is_refused_before_anything_is_written(contexts, server, tmp_path):
    out = tmp_path / "out"
    server.refuse = {"model": "no"}
    gone = JudgeServer(perfect)
    gone._server.server_close()
    for judges, words in (((f"m@{gone.url}",), "does not answer"),):
        with pytest.raises(UserError, match=words):
            run_interpretation(settings(contexts, out, judges))
    with pytest.raises(UserError, match="no folder"):
        run_interpretation(settings(tmp_path / "none", out, (f"m@{server.url}",)))
    with pytest.raises(UserError, match="no latent at the place sentence"):
        run_interpretation(Interpret(contexts=contexts, run=RunSettings(out=out), place="sentence"))
    assert not out.exists()

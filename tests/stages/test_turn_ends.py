"""The unit `turn_end` through the stage: folders, kinds, counts, and which prompts give anything. Passes run in this process."""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from tests.passes.alone import run_alone

from sarm.contracts.manifest import read_manifest
from sarm.contracts.tables import CORPUS_TABLE
from sarm.data.store.activations import ActivationStore
from sarm.engine.session import Session, open_session
from sarm.passes.turn_ends import response_row_ids
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.jobs import Pipeline
from sarm.settings.run import RunSettings
from sarm.settings.sae import SaeSettings
from sarm.stages import plan
from sarm.stages.extract import extract
from sarm.stages.prepare import prepare

SAE = SaeSettings(recipe="turn_ends")


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Neither a cluster nor actors."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sarm.engine.ray.passes.run_over", lambda work, *_: run_alone(work))
        patched.setattr(Session, "cluster", None)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, alone: None, preset: Pipeline, mlflow_db: Path) -> Path:
    """An output folder with turn ends of the tiny preset at two layers, texts with no sentence end but their last."""
    run = RunSettings(out=tmp_path_factory.mktemp("run") / "tiny", cpus_per_worker=1)
    shutil.copy(mlflow_db, run.out.parent / "mlflow.db")
    extraction = dataclasses.replace(preset.extraction, units=("turn_end",), layers=(2,))
    texts = run.out.parent / "texts.parquet"
    rows = {"row_id": [1, 2], "text": ["no end here", "None here, either."], "source": ["t"] * 2}
    pq.write_table(pa.table(rows, schema=CORPUS_TABLE), texts)
    data = dataclasses.replace(preset.data, texts=(str(texts),))
    config = dataclasses.replace(preset, run=run, data=data, extraction=extraction, sae=SAE)
    with open_session(config) as session:
        prepare(session, data)
        extract(session, preset.model, extraction)
    return run.out


def table_of(folder: Path) -> pa.Table:
    return ds.dataset([str(p) for p in sorted(folder.glob("part-*.parquet"))]).to_table()


def test_responses_of_training_prompts_are_there_once_with_their_kinds(out: Path) -> None:
    pairs = table_of(out / "pairs")
    train, heldout = (pairs.filter(ds.field("split") == split) for split in ("train", "heldout"))
    for layer in ("", "layer2"):
        folder = out / "activations" / layer / "chat-turn_end"
        rows = table_of(folder).select(["row_id", "kind", "position", "doc_id"]).to_pylist()
        kinds = Counter(row["kind"] for row in rows)
        true_ends = [row["row_id"] for row in rows if row["kind"] == "true_end"]
        assert sorted(true_ends) == sorted(set(response_row_ids(train)))
        prompts = {row["doc_id"] for row in rows}
        assert prompts == set(train["prompt_id"].to_pylist())
        assert prompts.isdisjoint(heldout["prompt_id"].to_pylist())
        assert kinds["sentence"] > 50
        assert kinds.keys() == {"true_end", "sentence"}
        counts = read_manifest(folder, "activations/v1").counts
        assert counts["kinds"] == counts["figures"]["kinds"] == dict(kinds)
        assert counts["audited_rows"] == len(true_ends)


def test_readers_that_do_not_know_kinds_read_the_rows(out: Path) -> None:
    store = ActivationStore(out / "activations" / "chat-turn_end")
    keys, vectors = store.read()
    assert len(keys) == len(vectors) == store.num_rows
    # Files of other units have no kinds, and are what they were.
    assert "kind" not in pq.read_schema(next((out / "activations" / "chat").glob("part-*"))).names
    chat = ActivationStore(out / "activations" / "chat")
    assert len(chat.read_sides()[0]) == chat.num_rows


def test_a_corpus_without_sentences_is_said_in_a_line_and_gives_its_true_ends(
    out: Path, preset: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = out / "activations" / "text"
    assert read_manifest(folder, "activations/v1").counts["kinds"] == {"true_end": 2}
    shutil.rmtree(folder)
    extraction = dataclasses.replace(preset.extraction, units=("turn_end",), layers=(2,))
    run = RunSettings(out=out, cpus_per_worker=1)
    with open_session(dataclasses.replace(preset, run=run, extraction=extraction, sae=SAE)) as session:
        extract(session, preset.model, extraction)
    said = " ".join(capsys.readouterr().out.split())
    assert "no sentence ends before its answer does by --extraction.sentence-ends rules" in said
    assert "or --extraction.word-share" in said


def test_other_units_are_decided_by_what_decided_them_before(preset: Pipeline, tmp_path: Path) -> None:
    with_words = ExtractionSettings(units=("document", "turn_end"), word_share=0.2)
    for split, unit in (("all", "document"), ("all", "token"), ("train", "chat"), ("heldout", "chat")):
        settings = plan.activation_settings(preset.model, with_words, split, unit, 1)
        assert settings == plan.activation_settings(preset.model, ExtractionSettings(), split, unit, 1)
        assert "word_share" not in settings
    settings = plan.activation_settings(preset.model, with_words, "train", "turn_end", 1)
    assert (settings["sentence_ends"], settings["word_share"]) == ("rules", 0.2)
    assert "limit_rows" not in settings


def test_responses_in_no_pair_are_extracted_by_their_prompts_and_held_out_ones_are_left_out(
    out: Path, preset: Pipeline, tmp_path: Path, mlflow_db: Path
) -> None:
    pairs = table_of(out / "pairs")
    train, heldout = (pairs.filter(ds.field("split") == split).to_pylist()[0] for split in ("train", "heldout"))
    said = [
        [*train["prompt"], {"role": "assistant", "content": "It is new. Nobody compared it."}],
        [*train["prompt"], {"role": "assistant", "content": "It is new. Nobody compared it."}],
        [*train["prompt"], {"role": "assistant", "content": train["chosen"]}],
        [*heldout["prompt"], {"role": "assistant", "content": "It is held out. All of it."}],
        train["prompt"],
        [{"role": "user", "content": "Another prompt?"}, {"role": "assistant", "content": "Yes, one without a pair."}],
    ]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in said))
    run = RunSettings(out=tmp_path / "tiny", cpus_per_worker=1)
    shutil.copy(mlflow_db, tmp_path / "mlflow.db")
    extraction = dataclasses.replace(preset.extraction, units=("turn_end",))
    data = dataclasses.replace(preset.data, texts=(), responses=(str(tmp_path / "said.jsonl"),))
    config = dataclasses.replace(preset, run=run, data=data, extraction=extraction, sae=SAE)
    with open_session(config) as session:
        prepare(session, data)
        extract(session, preset.model, extraction)
    counts = read_manifest(run.out / "responses", "responses/v1").counts
    assert {name: counts[name] for name in ("rows", "in_pairs", "heldout", "no_answer", "duplicates")} == {
        "rows": 2, "in_pairs": 1, "heldout": 1, "no_answer": 1, "duplicates": 1,
    }  # fmt: skip
    rows = table_of(run.out / "activations" / "responses-turn_end").to_pylist()
    assert sorted((row["doc_id"] == train["prompt_id"], row["kind"]) for row in rows) == [
        (False, "true_end"), (True, "sentence"), (True, "true_end"),
    ]  # fmt: skip
    assert {row["side"] for row in rows} == {"response"}
    planned = plan.sae_activations(session.folders, data, SAE, extraction.units)
    read = plan.sae(run.out / "sae", SAE, 0, planned).inputs
    assert read.keys() == {f"activations/{name}" for name in ("chat", "chat-turn_end", "responses-turn_end", "text")}
    # Without them, neither the pairs nor the dictionary's inputs are others.
    assert plan.pairs(session.folders, data) == plan.pairs(session.folders, preset.data)

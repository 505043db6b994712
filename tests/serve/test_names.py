"""Names of features in explanations, from the contexts and explanations that belong to the model."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient
from tests.report.hostile import store
from tests.serve.asked import conversation

from sarm.contracts.folders import CONTEXTS_FOLDER, EXPLANATIONS_FOLDER
from sarm.contracts.manifest import StageFolder
from sarm.interpret.context_store import CONTEXTS_FILE, LATENTS_FILE
from sarm.interpret.feature_data import feature_names
from sarm.passes.models import hash_of_folder
from sarm.passes.name_folders import name_folders
from sarm.serve.app import make_app
from sarm.serve.loading import load_service
from sarm.serve.names import load_names
from sarm.settings.checks import UserError
from sarm.settings.serving import Serving

NUM = 90
TEXTS = [f"the {word} is {word} and old, number {n}" for word in ("garden", "bread", "water") for n in range(12)]


def write_contexts(folder, model: str):
    made = store(NUM, TEXTS)
    stage = StageFolder(folder, CONTEXTS_FOLDER, {})
    stage.claim()
    pq.write_table(made.contexts, folder / CONTEXTS_FILE, write_page_checksum=True)
    pq.write_table(made.latents, folder / LATENTS_FILE, write_page_checksum=True)
    stage.finish({"model": model})
    return folder


@pytest.fixture(scope="module")
def contexts(served, tmp_path_factory):
    return write_contexts(tmp_path_factory.mktemp("names") / "contexts", hash_of_folder(served))


@pytest.fixture(scope="module")
def explanations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names") / "explanations"
    stage = StageFolder(folder, EXPLANATIONS_FOLDER, {})
    stage.claim()
    rows = [{"latent": n, "place": "rewarded", "explainer": "judge", "explanation": f"lists of {n}", "status": "ok", "detection": 0.9, "reason": ""} for n in range(96)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "explanations.parquet")
    stage.finish({})
    return folder


def features_of(settings, asked):
    loaded = load_service(settings)
    try:
        loaded.names.wait()
        with TestClient(make_app(loaded)) as client:
            body = {"items": [{"messages": conversation("slowly")}], "explain": {"top": 6, "features": asked}}
            found = client.post("/v1/rewards", json=body).json()
            drift = client.get("/v1/drift")
        assert drift.status_code == 200
        return found["items"][0]["answers"][0]["explanation"]["features"]
    finally:
        loaded.close()


def test_features_have_the_names_of_the_contexts(served, contexts):
    found = features_of(Serving(model=served, threads=1, contexts=contexts), [0, 1, 95])
    from sarm.interpret.context_store import load_contexts

    expected = feature_names(load_contexts(contexts), list(range(NUM)), None)
    assert len(expected) == NUM
    assert {one["id"]: one["name"] for one in found} == {one["id"]: expected.get(one["id"]) for one in found}
    assert {one["id"]: one["name"] for one in found}[95] is None


def test_explanations_go_before_terms(served, contexts, explanations):
    for given in (contexts, None):
        found = features_of(Serving(model=served, threads=1, contexts=given, explanations=explanations), [2])
        assert all(one["name"] == f"lists of {one['id']}" for one in found)


def test_without_folders_features_have_no_names(served):
    assert {one["name"] for one in features_of(Serving(model=served, threads=1), [2])} == {None}


def test_what_training_never_saw_is_known_from_the_contexts(served, contexts):
    names = load_names(served, contexts, None)
    assert names.silent(96).nonzero()[0].tolist() == list(range(NUM, 96))
    assert names.contexts(0, 2)
    assert load_names(served, None, None).silent(96) is None


def test_contexts_of_another_model_are_refused(served, tmp_path):
    with pytest.raises(UserError, match="another model"):
        load_service(Serving(model=served, contexts=write_contexts(tmp_path / "contexts", "0" * 32)))
    with pytest.raises(UserError):
        load_service(Serving(model=served, explanations=tmp_path / "nothing"))


def write_explanations(folder, model: str | None):
    stage = StageFolder(folder, EXPLANATIONS_FOLDER, {})
    stage.claim()
    row = {"latent": 2, "place": "rewarded", "explainer": "judge", "explanation": "lists", "status": "ok", "detection": 0.9, "reason": ""}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), folder / "explanations.parquet")
    stage.finish({} if model is None else {"model": model})
    return folder


def test_what_lies_beside_a_model_names_its_features_if_it_is_of_that_model_and_is_passed_over_if_not(served, tmp_path):
    """As where an edited or a pushed model is written beside the one that it was made from."""
    own, other = (Path(shutil.copytree(served, tmp_path / name)) for name in ("own", "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"reward_mean": 9.0}))
    write_contexts(tmp_path / "contexts", hash_of_folder(own))
    write_explanations(tmp_path / "explanations", hash_of_folder(own))
    assert name_folders(own) == (tmp_path / "contexts", tmp_path / "explanations")
    assert name_folders(other) == (None, None)
    (explanation,) = [one for one in features_of(Serving(model=own, threads=1), [2]) if one["id"] == 2]
    assert explanation["name"] == "lists"
    assert {one["name"] for one in features_of(Serving(model=other, threads=1), [2])} == {None}
    for given in ({"contexts": tmp_path / "contexts"}, {"explanations": tmp_path / "explanations"}):
        with pytest.raises(UserError, match=f"holds {next(iter(given))} of another model"):
            name_folders(other, **given)
    # The features of a model whose head was edited are those of the model that it was made from.
    (other / "edit.json").write_text(json.dumps({"source": str(own), "weights": []}))
    assert name_folders(other) == (tmp_path / "contexts", tmp_path / "explanations")


def test_explanations_of_before_that_do_not_say_their_model_are_taken(served, tmp_path):
    own = Path(shutil.copytree(served, tmp_path / "own"))
    folder = write_explanations(tmp_path / "explanations", None)
    assert name_folders(own).explanations == name_folders(own, explanations=folder).explanations == folder


def test_a_system_that_does_not_count_the_cores_of_a_process_is_served_with_all(monkeypatch):
    """As macOS."""
    import os

    from sarm.serve import loading

    monkeypatch.delattr(os, "sched_getaffinity")
    assert loading._cores() == os.cpu_count()

"""The watch has an end in memory, holds up no event loop, and is spoiled by no number and by no run of another name."""

import asyncio
import threading

import numpy as np
import pytest
from tests.serve.test_drift import answers_of, kept, opened, post, stream_of  # noqa: F401

from sarm.audit import drift_stream
from sarm.audit.drift import Sums
from sarm.audit.drift_stream import DriftStream
from sarm.audit.rank_martingales import FIRST_STEPS
from sarm.serve import watch as watch_module
from sarm.serve.app import make_app
from sarm.serve.watch_store import Kept, WatchStore
from sarm.settings.serving import Serving
from sarm.stages.serving import log_drift


@pytest.mark.parametrize("jumps", [(), (1 << 50, 1 << 50, 1 << 50)], ids=["always the same", "far ahead and back"])
def test_a_run_whose_step_does_not_move_fills_no_memory(client, service, monkeypatch, jumps):
    monkeypatch.setattr(watch_module, "_STEP_ANSWERS", 8)
    run = f"still{len(jumps)}"
    for place, far in enumerate(jumps):
        post(client, far + place, answers_of(place, num=1), run=run)
    for _ in range(8):
        post(client, 0, answers_of(0, num=6), run=run)
    found = stream_of(client, service, run=run)
    assert found["answers"] >= 36
    assert max(one["answers"] for one in found["history"]) <= 8 + 6


def test_the_figures_of_steps_have_an_end_and_the_baseline_stays(monkeypatch):
    monkeypatch.setattr(drift_stream, "MAX_STEPS", 50)
    stream = DriftStream(4)
    for step in range(200):
        one = np.array([1])
        stream.add(step, Sums(1, one, one, np.array([1.0])), {"reward": 1.0 if step < FIRST_STEPS else 3.0})
    assert [one["step"] for one in stream.history] == list(range(150, 200))
    assert stream.signals()["reward"]["baseline"] == 1.0
    assert stream.signals()["reward"]["now"] == 3.0


def test_what_waits_is_counted_in_answers(served, monkeypatch):
    monkeypatch.setattr(watch_module, "MAX_WAITING", 10)
    go, records_of = threading.Event(), watch_module.records_of
    monkeypatch.setattr(watch_module, "records_of", lambda *given: (go.wait(60), records_of(*given))[1])
    with opened(Serving(model=served, threads=1)) as (service, client):
        for step in range(3):
            post(client, step, answers_of(step, num=4))
        go.set()
        service.account.watch.settled()
        assert service.account.watch.num_unwatched == 4
        post(client, 3, answers_of(3, num=4))
        service.account.watch.settled()
        assert service.account.watch.num_unwatched == 4


def test_a_stream_whose_place_was_taken_goes_on_where_it_was(kept, monkeypatch):  # noqa: F811
    monkeypatch.setattr(watch_module, "MAX_STREAMS", 2)
    with opened(kept) as (service, client):
        for step in range(5):
            post(client, step, answers_of(step), run="long")
        for n in range(3):
            post(client, 0, answers_of(0), run=f"short{n}")
        for step in range(5, 9):
            post(client, step, answers_of(step), run="long")
        # The two steps that were open when its place was taken are lost.
        assert [one["step"] for one in stream_of(client, service, run="long")["history"]] == [0, 1, 2, 5, 6]
        for n in range(3):
            for step in range(4):
                post(client, step, answers_of(step), run=f"short{n}")
        service.account.watch.settled()
    with opened(kept) as (service, client):
        service.account.watch.settled()
        assert [key.run for key in service.account.watch.streams()] == ["short1", "short2"]


def test_what_is_left_of_an_earlier_run_is_no_part_of_a_later_one(tmp_path):
    store, key, one = WatchStore(tmp_path), ("run", "train", "model", "base"), np.array([1])
    for number, step in ((1, 10), (2, 11), (3, 3), (4, 4)):
        store.keep(key, number, Kept(step, Sums(1, one, one, np.array([1.0])), {}))
    assert [found.step for found in store.steps(key)] == [10, 11]
    assert store.keys() == [key]


def test_a_watch_that_is_busy_holds_up_no_other_route(service):
    app = make_app(service)

    async def status_of(path: str) -> int:
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [],
        }
        await app(scope, receive, send)
        return sent[0]["status"]

    async def asked() -> tuple[int, int]:
        with service.account.watch.reading():
            figures = asyncio.create_task(status_of("/metrics"))
            await asyncio.sleep(0.2)
            alive = await asyncio.wait_for(status_of("/health"), 5)
            assert not figures.done()
        return alive, await figures

    found: list[tuple[int, int]] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(asked())), daemon=True)
    thread.start()
    thread.join(30)
    assert found == [(200, 200)]


@pytest.mark.parametrize("after", [1e300, -3e38])
def test_a_variant_of_endless_rewards_spoils_nothing_but_itself(client, service, after):
    """The larger one no float32 holds; with the smaller one, sums are infinite."""
    edited = [{"latent": n, "before": float(service.heads.weights("base")[n]), "after": after} for n in range(96)]
    path = f"/v1/models/{service.about.name}/variants"
    status = client.post(path, json={"name": "endless", "weights": edited}).status_code
    assert status == (422 if after == 1e300 else 200)
    if status == 200:
        body = {"items": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]}
        for step in range(4):
            client.post("/v1/rewards", json={**body, "variants": ["endless"], "run": "endless", "step": step})
        assert client.delete(f"{path}/endless").status_code == 200
    service.account.watch.settled()
    assert client.get("/v1/drift").status_code == 200


def test_runs_that_are_watched_at_the_same_time_do_not_end_each_other_in_mlflow(kept, tmp_path):  # noqa: F811
    from dataclasses import replace

    from mlflow import MlflowClient

    from sarm.engine.mlflow.outbox import close_all

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    settings = replace(kept, mlflow_uri=uri)
    with opened(settings) as (service, client):
        log = log_drift(service.account, settings)
        for step in range(4):
            for run in ("one", "two"):
                post(client, step, answers_of(step), run=run)
        service.account.watch.settled()
        log.settled()
    close_all()
    mlflow = MlflowClient(uri)
    experiments = [one.experiment_id for one in mlflow.search_experiments()]
    states = {run.info.run_name: run.info.status for run in mlflow.search_runs(experiments)}
    assert states == {"one": "RUNNING", "two": "RUNNING"}

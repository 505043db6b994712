"""The watch over reward hacking, from requests to its routes, its page, its files, Prometheus and MLflow."""

import contextlib
import json
import logging
import threading
import time

import numpy as np
import pytest
from starlette.testclient import TestClient
from tests.serve.asked import PROMPT, conversation, text_of

from sarm.audit.drift_stream import RECENT_STEPS
from sarm.audit.rank_martingales import FIRST_STEPS
from sarm.serve import watch as watch_module
from sarm.serve.app import make_app
from sarm.serve.loading import load_service
from sarm.serve.watch_store import WatchStore
from sarm.settings.checks import UserError
from sarm.settings.serving import Serving
from sarm.stages.serving import log_drift

WORDS = [
    "garden",
    "grows",
    "slowly",
    "water",
    "light",
    "patience",
    "stones",
    "bread",
    "yeast",
    "flour",
    "oven",
    "salt",
    "rain",
    "earth",
    "seeds",
]
HACK = "yeast yeast yeast oven oven"


def answers_of(step: int, num: int = 6, hacked: float = 0.0) -> list[str]:
    rng = np.random.default_rng(step)
    return [HACK + " " + str(rng.choice(WORDS)) if rng.random() < hacked else " ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(num)]  # fmt: skip


def post(client, step, completions, run="grpo", name=None, **options):
    item = {"prompt": PROMPT, "completions": completions, **({"id": name} if name else {})}
    body = {"items": [item], "run": run, "scale": "raw", **({} if step is None else {"step": step}), **options}
    response = client.post("/v1/rewards", json=body)
    assert response.status_code == 200, response.text
    return [one["reward"] for one in response.json()["items"][0]["answers"]]


def stream_of(client, service, run="grpo", **options):
    service.account.watch.settled()
    found = client.get("/v1/drift", params={"run": run, **options})
    assert found.status_code == 200, found.text
    (stream,) = found.json()["streams"]
    return stream


@pytest.fixture
def kept(served, tmp_path):
    return Serving(model=served, threads=1, drift_folder=tmp_path / "drift", watched=(3, 5))


@contextlib.contextmanager
def opened(settings):
    service = load_service(settings)
    try:
        with TestClient(make_app(service)) as client:
            yield service, client
    finally:
        service.close()


def run_hacked(client, clean=40, hacked=30, **options):
    rewards = [post(client, step, answers_of(step), **options) for step in range(clean)]
    return rewards + [post(client, step, answers_of(step, hacked=0.9), **options) for step in range(clean, clean + hacked)]  # fmt: skip


def test_a_hack_is_found_shown_and_answered_and_what_is_known_outlasts_a_restart(kept):
    """In one, since a model is loaded for it: the shift is the rewards' own, and the page and the edit follow from it."""
    with opened(kept) as (service, client):
        rewards = run_hacked(client)
        found = stream_of(client, service, top=96)
        # The two youngest steps are open still.
        finished = len(rewards) - 2
        assert (found["steps"], found["open_steps"], found["state"]) == (finished, [finished, finished + 1], "alarm")
        recent = np.mean(rewards[finished - RECENT_STEPS : finished])
        shift = recent - np.mean(rewards[:FIRST_STEPS])
        assert found["shift"] == pytest.approx(shift, abs=1e-4)
        assert sum(one["shift"] for one in found["paid"]) == pytest.approx(found["shift"], abs=1e-6)
        assert sum(one["rate"] + one["strength"] for one in found["paid"]) == pytest.approx(found["shift"], abs=1e-6)
        assert found["signals"]["unexplained"]["now"] > 0
        assert found["signals"]["flat_groups"]["baseline"] == 0
        alarm = found["alarms"][0]
        assert 40 <= alarm["step"] < 66
        assert any(HACK in one["text"] for own in found["alarms"] for one in own["rollouts"])
        page = client.get("/v1/drift/page", params={"run": "grpo"})
        assert page.headers["content-type"].startswith("text/html")
        for text in ("Alarm at step", HACK, "sarm steer", "grpo, train, base", "data:image/svg"):
            assert text in page.text
        answer = found["answer"]
        assert answer["command"].startswith("sarm steer --name without-")
        assert client.post(answer["path"], json=answer["variant"]).status_code == 200
        before = json.dumps({**found, "open_steps": [], "open_answers": 0})
    with opened(kept) as (service, client):
        again = stream_of(client, service, top=96)
        assert json.dumps({**again, "open_steps": [], "open_answers": 0}) == before
        post(client, 70, answers_of(70))
        post(client, 71, answers_of(71))
        post(client, 72, answers_of(72))
        assert stream_of(client, service)["steps"] == found["steps"] + 1
        assert client.post("/v1/drift/reset", json={"run": "grpo"}).json() == {"reset": [{"run": "grpo", "split": "train", "variant": "base"}]}  # fmt: skip
        assert stream_of(client, service)["state"] == "baseline"
    with opened(kept) as (service, client):
        service.account.watch.settled()
        assert client.get("/v1/drift").json() == {"streams": []}


def test_each_head_and_split_is_watched_for_itself(client, service):
    post(client, 1, answers_of(1), run="heads", variants=["base", "even_off"])
    post(client, 1, answers_of(1), run="heads", split="eval")
    service.account.watch.settled()
    found = client.get("/v1/drift", params={"run": "heads"}).json()["streams"]
    assert {(one["split"], one["variant"]) for one in found} == {("train", "base"), ("train", "even_off"), ("eval", "base")}  # fmt: skip


def test_a_request_that_comes_again_is_counted_once(client, service):
    for step, name in ((0, "a"), (0, "a"), (0, "b"), (1, "a"), (2, "c")):
        post(client, step, answers_of(0, num=3), run="again", name=name)
    found = stream_of(client, service, run="again")
    assert (found["steps"], found["answers"]) == (1, 6)


def test_late_answers_count_in_the_first_open_step(client, service):
    for step in (0, 1, 2, 0, 3, 4):
        post(client, step, answers_of(step, num=2), run="late")
    found = stream_of(client, service, run="late")
    assert [one["answers"] for one in found["history"]] == [2, 4, 2]


def test_a_run_without_steps_has_one_every_so_many_answers(served):
    with opened(Serving(model=served, threads=1, step_answers=4)) as (service, client):
        for n in range(5):
            post(client, None, answers_of(n, num=2), run="plain")
        found = stream_of(client, service, run="plain")
        assert (found["steps"], found["answers"]) == (2, 8)


@pytest.mark.parametrize("path", ["/get_reward", "/classify"])
def test_frameworks_say_their_run_in_the_address(client, service, path):
    text = text_of(conversation("water and light")).rstrip()
    body = {"query": [text], "prompts": ["p"]} if path == "/get_reward" else {"input": text}
    for step in range(3):
        assert client.post(f"{path}?run=other{path[1:4]}&step={step}&split=eval", json=body).status_code == 200
    found = stream_of(client, service, run=f"other{path[1:4]}")
    assert (found["split"], found["steps"]) == ("eval", 1)


def test_what_is_asked_wrongly_is_told(client):
    assert client.get("/v1/drift", params={"run": "nobody"}).status_code == 404
    assert client.get("/v1/drift", params={"ran": "x"}).status_code == 422
    assert client.get("/v1/drift", params={"top": "0"}).status_code == 422
    assert client.post("/v1/drift/reset", json={"run": "nobody"}).status_code == 404
    assert client.post("/v1/drift/reset", json={}).status_code == 422
    assert client.post("/v1/drift/reset", content=b"{").status_code == 400
    assert client.post("/v1/rewards", json={"items": [{"messages": conversation("a")}], "run": "no spaces"}).status_code == 422  # fmt: skip
    assert client.post("/v1/rewards", json={"items": [{"messages": conversation("a")}], "step": -1}).status_code == 422


def test_a_watch_that_fails_costs_nobody_a_reward(kept, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device: secret")

    monkeypatch.setattr(WatchStore, "keep", full)
    with opened(kept) as (service, client), caplog.at_level(logging.INFO, "sarm.serve"):
        for step in range(4):
            assert len(post(client, step, answers_of(step))) == 6
        service.account.watch.settled()
        assert service.account.watch.num_unwatched > 0
        assert "OSError" in caplog.text
        assert "secret" not in caplog.text


def test_a_watch_that_is_behind_holds_nobody_up(served, monkeypatch):
    monkeypatch.setattr(watch_module, "MAX_WAITING", 2)
    go = threading.Event()
    records_of = watch_module.records_of
    monkeypatch.setattr(watch_module, "records_of", lambda *given: (go.wait(60), records_of(*given))[1])
    with opened(Serving(model=served, threads=1)) as (service, client):
        began = time.monotonic()
        for step in range(6):
            post(client, step, answers_of(step))
        assert time.monotonic() - began < 20
        assert service.account.watch.num_unwatched > 0
        go.set()


def test_the_oldest_streams_make_room(client, service, monkeypatch):
    monkeypatch.setattr(watch_module, "MAX_STREAMS", 3)
    for n in range(5):
        post(client, 0, answers_of(0, num=1), run=f"many{n}")
    service.account.watch.settled()
    assert [key.run for key in service.account.watch.streams()] == ["many2", "many3", "many4"]


def test_prometheus_sees_the_watch_list_alone_and_no_names(kept):
    with opened(kept) as (service, client):
        for step in range(4):
            post(client, step, answers_of(step), run="secret-run")
        service.account.watch.settled()
        text = client.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("sarm_drift_contribution{")]
    assert [line.partition('"')[2].partition('"')[0] for line in lines] == ["3", "5"]
    assert "sarm_drift_alarms 0.0" in text
    assert "secret-run" not in text


def test_settings_that_make_no_sense_are_refused(served, tmp_path):
    with pytest.raises(UserError, match="drift-folder"):
        Serving(model=served, mlflow_uri="http://127.0.0.1:5")
    with pytest.raises(UserError, match="watched"):
        load_service(Serving(model=served, watched=(96,)))
    with pytest.raises(UserError):
        Serving(model=served, step_answers=0)


def test_mlflow_has_each_run_with_what_its_reward_is_paid_for(kept, tmp_path):
    from dataclasses import replace

    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    settings = replace(kept, mlflow_uri=uri)
    for first in (0, 60):
        with opened(settings) as (service, client):
            log = log_drift(service.account, settings)
            for step in range(first, first + 30):
                post(client, step, answers_of(step, hacked=0.9 * (step >= 60)), run="logged")
            service.account.watch.settled()
            log.settled()
            assert log.num_lost == 0
    from sarm.engine.mlflow.outbox import close_all

    close_all()
    mlflow = MlflowClient(uri)
    (experiment,) = [one for one in mlflow.search_experiments() if one.name == "reward drift"]
    (run,) = mlflow.search_runs([experiment.experiment_id])
    assert run.info.run_name == "logged"
    metrics = run.data.metrics
    assert {"reward", "spread", "truncated", "alarms"} <= metrics.keys()
    assert sum(name.startswith("contribution/") for name in metrics) >= 20
    steps = [one.step for one in mlflow.get_metric_history(run.info.run_id, "reward")]
    assert steps == sorted(set(steps))
    assert steps[-1] >= 80
    assert {one.path for one in mlflow.list_artifacts(run.info.run_id)} >= {"drift.json", "drift.html"}


def test_an_mlflow_that_is_away_holds_nobody_up(kept):
    import socket
    from dataclasses import replace

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        settings = replace(kept, mlflow_uri=f"http://127.0.0.1:{taken.getsockname()[1]}")
        with opened(settings) as (service, client):
            log_drift(service.account, settings)
            began = time.monotonic()
            for step in range(12):
                post(client, step, answers_of(step))
            service.account.watch.settled()
            assert time.monotonic() - began < 20
            assert stream_of(client, service)["steps"] == 10

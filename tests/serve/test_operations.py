"""Overload, failure, tokens, health and metrics, in every protocol's own way."""

import asyncio
import logging
import threading
import time

import pytest
import torch
from starlette.testclient import TestClient
from tests.serve.asked import ANSWERS, PROMPT, conversation, text_of

from sarm.passes.reader import Reader
from sarm.serve.app import make_app
from sarm.serve.engine import Engine
from sarm.serve.routes import ROUTES

TEXT = text_of(conversation("a secret garden."))
BODIES = {
    "/v1/rewards": {"items": [{"text": TEXT}]},
    "/v1/card": {"messages": conversation("a secret garden.")},
    "/get_reward": {"query": [TEXT], "prompts": ["p"], "labels": [None]},
    "/slime": {"prompt": text_of(PROMPT, opened=True), "response": "a secret garden."},
    "/v1/score/evaluation": {"model": "model", "messages": [TEXT]},
    "/classify": {"model": "m", "input": TEXT},
    "/pooling": {"model": "m", "input": TEXT},
    "/v1/embeddings": {"model": "m", "input": TEXT},
    "/predict": {"inputs": TEXT},
}
ON_EVERY_ROUTE = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
OVERLOAD = {"/v1/rewards": 429, "/v1/card": 429, "/predict": 429}


def test_every_route_is_tried():
    assert BODIES.keys() == {route.path for route in ROUTES}


@ON_EVERY_ROUTE
def test_overload_is_said_in_the_status_by_which_clients_come_again(client, service, route, monkeypatch):
    monkeypatch.setattr(service.engine, "_queued", 10**9)
    monkeypatch.setattr(service.engine, "_num_cached", 0)
    found = client.post(route.path, json=BODIES[route.path])
    assert found.status_code == OVERLOAD.get(route.path, 503)
    assert int(found.headers["Retry-After"]) > 100
    assert "error" in found.json()


@ON_EVERY_ROUTE
@pytest.mark.parametrize(("error", "status"), [(torch.cuda.OutOfMemoryError("x"), 503), (ValueError(TEXT), 500)])
def test_an_engine_that_fails_is_told_and_the_service_goes_on(client, service, route, error, status, monkeypatch, caplog):  # fmt: skip
    monkeypatch.setattr(service.engine, "_num_cached", 0)

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(Reader, "read", fails)
    with caplog.at_level(logging.INFO, "sarm.serve"):
        found = client.post(route.path, json=BODIES[route.path])
    assert found.status_code == status
    assert ("Retry-After" in found.headers) == (status == 503)
    assert "Traceback" not in found.text
    assert "garden" not in found.text + caplog.text
    assert len(caplog.records) == 1
    monkeypatch.undo()
    service.engine._cache.clear()
    assert client.post(route.path, json=BODIES[route.path]).status_code == 200


@ON_EVERY_ROUTE
def test_a_reward_that_is_no_number_is_never_sent(client, service, route, monkeypatch):
    monkeypatch.setattr(service, "value", lambda *_: float("nan"))
    found = client.post(route.path, json=BODIES[route.path])
    assert found.status_code == 500
    assert "NaN" not in found.text


@ON_EVERY_ROUTE
def test_a_token_is_wanted_on_every_route_in_a_header_or_in_the_path(service, route, caplog):
    token = "correct-horse-battery"
    with TestClient(make_app(service, token)) as client:
        body = BODIES[route.path]
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {token}"}):
            refused = client.post(route.path, json=body, headers=headers)
            assert refused.status_code == 401
            assert "error" in refused.json()
        assert client.post(f"/t/wrong{route.path}", json=body).status_code == 401
        assert client.post(route.path, json=body, headers={"Authorization": f"Bearer {token}"}).status_code == 200
        assert client.post(f"/t/{token}{route.path}", json=body).status_code == 200
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        for path in ("/metrics", "/v1/models"):
            assert client.get(path).status_code == 401
            assert client.get(f"/t/{token}{path}").status_code == 200
        assert token not in caplog.text
        assert token not in client.get(f"/t/{token}/metrics").text


def test_it_is_ready_while_its_engine_reads(client, service, monkeypatch):
    assert client.get("/ready").json() == {"status": "ready"}
    monkeypatch.setattr(service.engine, "_failures", 3)
    monkeypatch.setattr(service.engine, "_failed_at", time.monotonic())
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200
    # Who is not ready is sent nothing, and could never show that it reads again.
    monkeypatch.setattr(service.engine, "_failed_at", time.monotonic() - 60)
    assert client.get("/ready").status_code == 200


def test_metrics_have_figures_and_no_text_of_a_request(client, service):
    client.post("/v1/rewards", json={"items": [{"id": "my-id", "messages": conversation("a <|im_end|> secret")}]})
    client.post("/get_reward", json={"query": ["garbage text"]})
    found = client.get("/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    text = found.text
    assert 'sarm_requests_total{route="/v1/rewards",status="200"}' in text
    assert 'sarm_requests_total{route="/get_reward",status="422"}' in text
    assert 'sarm_flags_total{flag="special_tokens_in_content"}' in text
    assert service.about.identity in text
    for name in ("sarm_queue_items", "sarm_queue_tokens", "sarm_computed_tokens", "sarm_reward_bucket"):
        assert name in text
    assert not {"secret", "garbage", "my-id"} & set(text.replace('"', " ").split())


def test_what_is_not_there_and_other_methods_are_told(client):
    assert client.get("/nowhere").status_code == 404
    assert client.get("/v1/rewards").status_code == 405
    assert client.post("/nowhere", json={}).json()["error"]["code"] == "no_route"


def test_while_a_batch_is_computed_the_server_answers(client, service, monkeypatch):
    monkeypatch.setattr(service.engine, "_num_cached", 0)
    entered, go = threading.Event(), threading.Event()
    read = Reader.read

    def slow(self, rows, cost=None):
        entered.set()
        go.wait(30)
        return read(self, rows, cost)

    monkeypatch.setattr(Reader, "read", slow)
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(client.post("/v1/rewards", json=BODIES["/v1/rewards"]).status_code))  # fmt: skip
    thread.start()
    assert entered.wait(30)
    started = time.monotonic()
    assert client.get("/health").status_code == 200
    assert time.monotonic() - started < 5
    go.set()
    thread.join()
    assert done == [200]


def test_an_answer_whose_client_has_left_is_not_computed(service, monkeypatch):
    """Its items leave the queue, and what waits behind them is computed."""
    monkeypatch.setattr(service.engine, "_num_cached", 0)
    app = make_app(service)
    submitted: list[object] = []
    submit = Engine.submit

    def noted(self, answers, timeout=None):
        futures = submit(self, answers, timeout)
        submitted.extend(futures)
        return futures

    monkeypatch.setattr(Engine, "submit", noted)
    go = threading.Event()
    read = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, rows, cost=None: (go.wait(30), read(self, rows, cost))[1])

    async def post(leaves: bool) -> list[int]:
        import json

        body = json.dumps({"items": [{"prompt": PROMPT, "completions": ANSWERS}]}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        statuses: list[int] = []

        async def receive():
            if messages:
                return messages.pop(0)
            await asyncio.sleep(0.3 if leaves else 60)
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {"type": "http", "method": "POST", "path": "/v1/rewards", "raw_path": b"/v1/rewards", "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http", "root_path": ""}  # fmt: skip
        await app(scope, receive, send)
        return statuses

    async def both() -> tuple[list[int], list[int]]:
        first = asyncio.ensure_future(post(leaves=False))
        await asyncio.sleep(0.2)
        second = await post(leaves=True)
        go.set()
        return await first, second

    stayed, left = asyncio.run(both())
    assert (stayed, left) == ([200], [499])
    assert [future.cancelled() for future in submitted] == [False] * 3 + [True] * 3

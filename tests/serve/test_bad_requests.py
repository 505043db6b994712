"""Bodies that nobody should send: a status of the client's fault, one line in the log, no traceback, and the service goes on."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.serve.asked import conversation, text_of
from tests.serve.test_operations import BODIES, ON_EVERY_ROUTE

from sarm.serve import app as app_module
from sarm.serve.routes import ROUTES

GOOD = {"items": [{"messages": conversation("yes.")}]}

junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(st.characters(), max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
calls = st.lists(st.fixed_dictionaries({}, optional={"name": st.text(max_size=4) | junk, "arguments": junk, "function": st.fixed_dictionaries({"name": st.text(max_size=4) | junk}, optional={"arguments": junk})}), max_size=2)  # fmt: skip
messages = st.lists(
    st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "system", "tool", "no role", ""]) | junk, "content": st.text(st.characters(), max_size=20) | junk, "name": junk, "tool_calls": calls | junk, "tool_call_id": junk, "tools": calls | junk, "more": junk}) | junk,
    max_size=4,
)  # fmt: skip
items = st.fixed_dictionaries(
    {},
    optional={
        "id": junk,
        "prompt": messages | junk,
        "completions": st.lists(st.text(st.characters(), max_size=20) | junk, max_size=3) | junk,
        "messages": messages | junk,
        "text": st.text(st.characters(), max_size=20) | st.just(text_of(conversation("a"))) | junk,
        "input_ids": st.lists(st.integers(-3, 700), max_size=5) | junk,
        "finish": st.lists(st.sampled_from(["stop", "length"]), max_size=3) | junk,
    },
)
FIELDS = {
    "/v1/rewards": {"items": st.lists(items, max_size=3) | junk, "variants": st.just(["even_off"]) | junk, "scale": st.just("raw") | junk, "explain": st.fixed_dictionaries({}, optional={"top": st.integers(-2, 70), "features": st.lists(st.integers(-1, 99), max_size=3)}) | junk, "on_truncated": st.sampled_from(["close", "refuse", "penalise"]) | st.fixed_dictionaries({"penalise": st.floats()}) | junk, "partial": st.booleans() | junk, "timeout_s": st.floats(0, 5) | junk, "expect_identity": junk, "model": junk},
    "/v1/card": {"messages": messages | st.just(conversation("a")) | junk},
    "/get_reward": {"query": st.lists(st.text(st.characters(), max_size=9) | junk, max_size=3) | junk, "prompts": junk, "labels": junk},
    "/slime": {"prompt": messages | st.text(st.characters(), max_size=9) | junk, "response": st.text(st.characters(), max_size=9) | junk, "label": junk},
    "/v1/score/evaluation": {"model": junk, "messages": st.lists(st.text(st.characters(), max_size=9), max_size=3) | junk, "max_length": junk},
    "/predict": {"inputs": st.lists(st.text(st.characters(), max_size=9), max_size=3) | st.lists(st.lists(st.text(st.characters(), max_size=9), max_size=3), max_size=3) | junk, "truncate": junk, "truncation_direction": junk, "raw_scores": junk},
}  # fmt: skip
POOLING = {"model": junk, "input": st.lists(st.integers(-3, 700), max_size=5) | st.lists(st.lists(st.integers(-3, 700), max_size=5), max_size=3) | junk, "messages": messages | junk, "text": junk, "input_ids": st.lists(st.integers(-3, 700), max_size=5) | junk, "use_activation": junk, "task": junk, "truncate_prompt_tokens": junk, "request_id": junk}  # fmt: skip
FIELDS |= dict.fromkeys(("/classify", "/pooling", "/v1/embeddings"), POOLING)


def check(client, path, content, *statuses):
    found = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert found.status_code < 500, (path, content, found.text)
    assert not statuses or found.status_code in statuses, (found.status_code, found.text)
    assert "Traceback" not in found.text
    parsed = found.json()
    if found.status_code != 200:
        assert "error" in parsed
    return found


@ON_EVERY_ROUTE
@given(data=st.data())
def test_no_body_that_nearly_fits_ends_in_an_error_of_the_servers(client, route, data):
    body = data.draw(st.fixed_dictionaries({}, optional=FIELDS[route.path]) | junk)
    check(client, route.path, json.dumps(body))


@ON_EVERY_ROUTE
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_no_bytes_end_in_an_error_of_the_servers(client, route, content):
    check(client, route.path, content)


@ON_EVERY_ROUTE
@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b'{"items": [', 400),
        (b"\xff\xfe{}", 400),
        (b'{"a": 1, "a": 2}', 400),
        (b'{"a": NaN}', 400),
        (b"[" * 100_000, 400),
        (b'{"a": ' * 5_000 + b"1" + b"}" * 5_000, 400),
        (b'{"a": ' + b"9" * 10_000 + b"}", 400),
        (b"[]", None),
        (b"null", None),
        (b'{"nothing": "here"}', None),
    ],
)
def test_what_is_no_json_is_malformed_and_json_of_another_shape_does_not_fit(client, route, content, status, caplog):
    with caplog.at_level(logging.INFO, "sarm.serve"):
        check(client, route.path, content, status or route.invalid)
    assert len(caplog.records) == 1
    assert "\n" not in caplog.records[0].getMessage()
    check(client, route.path, json.dumps(BODIES[route.path]), 200)


@ON_EVERY_ROUTE
def test_a_body_above_the_limit_is_refused_before_it_is_parsed(client, route, monkeypatch):
    monkeypatch.setattr(app_module, "MAX_BODY", 100)
    check(client, route.path, b" " * 101, 413)

    def parts():
        yield b" " * 60
        yield b" " * 60

    assert client.post(route.path, content=parts()).status_code == 413


@ON_EVERY_ROUTE
def test_ten_thousand_items_are_refused(client, route):
    text = text_of(conversation("a"))
    many = {
        "/v1/rewards": {"items": [{"text": text}] * 10_000},
        "/get_reward": {"query": [text] * 10_000},
        "/slime": {"prompt": conversation("a") * 5_000, "response": "a"},
        "/v1/score/evaluation": {"model": "m", "messages": [text] * 10_000},
        "/predict": {"inputs": [[text]] * 10_000},
    }
    body = many.get(route.path, {"model": "m", "input": [text] * 10_000})
    found = check(client, route.path, json.dumps(body), route.invalid)
    assert len(found.text) < 1000


@ON_EVERY_ROUTE
def test_lone_surrogates_are_refused_wherever_they_stand(client, route):
    as_text = json.dumps(BODIES[route.path])
    for found in ("garden", "secret"):
        check(client, route.path, as_text.replace(found, "\\ud800"), 422, route.invalid)
    check(client, route.path, as_text.replace('{"', '{"\\udfff": 1, "', 1), 200, route.invalid)


def test_an_error_says_where_and_not_what(client, caplog):
    with caplog.at_level(logging.INFO, "sarm.serve"):
        found = client.post("/v1/rewards", json={"items": [GOOD["items"][0], {"messages": "a secret"}]})
    assert found.status_code == 422
    assert found.json()["error"]["item"] == 1
    assert "secret" not in caplog.text + found.text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scael": "raw"}, "scael"),
        ({"scale": "sigmoid"}, "scale"),
        ({"items": []}, "items"),
        ({"items": [{}]}, "items.0"),
        ({"items": [{"messages": conversation("a"), "text": "b"}]}, "items.0"),
        ({"items": [{"prompt": conversation("a")}]}, "items.0"),
        ({"items": [{"messages": conversation("a"), "finish": ["stop", "stop"]}]}, "finish"),
        ({"items": [{"input_ids": [1], "finish": ["stop"]}]}, "finish"),
        ({"items": [{"messages": conversation("a"), "prompt_text": "b"}]}, "prompt_text"),
        ({"explain": {"top": 65}}, "explain.top"),
        ({"on_truncated": {"penalise": 1e999}}, ""),
        ({"timeout_s": -1}, "timeout_s"),
        ({"variants": []}, "variants"),
    ],
)
def test_a_field_that_does_not_fit_is_named(client, change, told):
    body = json.dumps({**GOOD, **change}).replace("Infinity", "1e999")
    assert told in check(client, "/v1/rewards", body, 422).json()["error"]["message"]


def test_every_route_has_its_fields_tried():
    assert FIELDS.keys() == {route.path for route in ROUTES}

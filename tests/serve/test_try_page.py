"""`POST /v1/card` and the page that asks it: rewards as sums, token by token, under weights that a reader moves; in a real browser."""

import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient
from tests.report import browser
from tests.serve.asked import ANSWERS, PROMPT, conversation

from sarm.data.tokens.beginnings import beginnings_of
from sarm.passes.reader import sarm_reader
from sarm.serve.app import make_app
from sarm.serve.http_server import run
from sarm.serve.server import listening
from sarm.settings.serving import Serving
from sarm.stages.card import read_prefixes

ROOT = Path(__file__).parents[2]
TOKEN = "correct-horse-battery-staple"
HOSTILE = '<img src=x onerror="window.hit=1"> \u202eyeast </p><script>window.hit=2</script>'


def posted(client, answer):
    found = client.post("/v1/card", json={"messages": conversation(answer)})
    assert found.status_code == 200, found.text
    return found.json()


@pytest.fixture
def page(service, monkeypatch) -> Iterator[str]:
    """The address of the page of a server in this process, which wants a token."""
    servers: list[uvicorn.Server] = []
    addresses: queue.Queue[str] = queue.Queue()
    own_run = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets=None: (servers.append(self), own_run(self, sockets))[1])  # fmt: skip
    # Which only a process's main thread may set.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with listening(Serving(model=Path("x"), port=0)) as taken:
        thread = threading.Thread(target=run, args=(make_app(service, TOKEN), taken, "x", addresses.put))
        thread.start()
        yield addresses.get(timeout=300)
        servers[0].should_exit = True
        thread.join(30)


def used(url, answers, token="", pictures=""):
    """What the browser saw."""
    asked = {"url": url, "token": token, "prompt": PROMPT[0]["content"], "answers": answers, "pictures": pictures}
    command = ["node", str(Path(__file__).parent / "try_page.js"), str(browser.chromium()), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_card_is_what_the_reward_card_reads_and_its_codes_sum_to_the_reward(client, served, answer):
    found = posted(client, answer)
    prefixes = read_prefixes(sarm_reader(served), conversation(answer))
    weights = {one["id"]: one["weight"] for one in found["latents"]}
    sums = [sum(weights[latent] * value for latent, value in codes) for codes in found["codes"]]
    assert sums == pytest.approx(prefixes.rewards().tolist(), abs=1e-4)
    assert sums[-1] == pytest.approx(found["reward"], abs=1e-4)
    assert "".join(found["tokens"]) == answer
    assert len(found["codes"]) == len(found["tokens"]) + 1
    (row,) = client.post("/v1/rewards", json={"items": [{"messages": conversation(answer)}]}).json()["items"]
    assert found["standardised"] == pytest.approx(row["answers"][0]["reward"], abs=1e-4)


def test_each_beginning_is_rewarded_as_if_the_answer_had_ended_there(client):
    found = posted(client, ANSWERS[1])
    weights = {one["id"]: one["weight"] for one in found["latents"]}
    for at in (1, len(found["tokens"]) // 2):
        start = "".join(found["tokens"][:at])
        alone = posted(client, start)
        if alone["tokens"] == found["tokens"][:at]:
            codes = found["codes"][at]
            assert sum(weights[latent] * value for latent, value in codes) == pytest.approx(alone["reward"], abs=1e-4)


def test_cards_are_read_beside_other_answers_without_changing_either(client, service):
    """Branches stand in rows of their own, in one batch with a training run's answers."""
    from sarm.serve.engine import Tokenised

    encoder = service.encoder
    card, plain = encoder.with_beginnings(conversation(ANSWERS[1])), encoder.messages(conversation(ANSWERS[2]))
    asked = [Tokenised(card.ids, card.prompt_tokens, card.beginnings), Tokenised(plain.ids, plain.prompt_tokens)]
    service.engine._cache.clear()
    both = [future.result(60) for future in service.engine.submit(asked)]
    service.engine._cache.clear()
    alone = [service.engine.submit([one])[0].result(60) for one in asked]
    assert [one.reading.reward for one in both] == pytest.approx([one.reading.reward for one in alone], abs=1e-4)
    assert len(both[0].beginnings) == len(card.beginnings.columns) == len(alone[0].beginnings)
    assert both[1].beginnings == ()
    assert service.engine.waiting == (0, 0)


def test_an_answer_that_is_not_read_whole_has_no_card_and_one_without_text_none_either(client, service):
    chat = service.encoder._chat
    long = "a garden grows " * chat.max_length
    for answer, code in ((long, "no_beginnings"), ("", None)):
        found = client.post("/v1/card", json={"messages": conversation(answer)})
        assert found.status_code == 422
        assert code in (None, found.json()["error"]["code"])
    (tokens,) = chat.encode_responses(PROMPT, [long], offsets=True)
    assert tokens.num_truncated
    assert beginnings_of(tokens) is None or tokens.offsets[0][1] == 0


def test_a_card_is_not_counted_by_the_watch(client, service):
    before = service.account.figures()["streams"]
    posted(client, "a card of nobody's training.")
    service.account.watch.settled()
    assert service.account.figures()["streams"] == before


def test_the_page_is_open_holds_nothing_of_the_model_and_all_else_wants_the_token(service, caplog):
    with TestClient(make_app(service, TOKEN)) as client:
        page = client.get("/")
        assert page.url.path == "/try"
        assert page.status_code == 200
        assert page.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
        assert page.headers["Referrer-Policy"] == "no-referrer"
        assert service.about.name + " " not in page.text
        assert service.about.identity not in page.text
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.text)[1]
        assert "default-src 'none'" in policy
        assert "connect-src 'self'" in policy
        assert client.get("/v1/models").status_code == 401
        with caplog.at_level(logging.INFO, "sarm.serve"):
            assert client.post("/v1/card", json={"messages": conversation("a")}).status_code == 401
        assert TOKEN not in caplog.text


def test_other_pages_may_still_ask_nobody():
    from sarm.report.render import html

    page = html("page", title="x", facts={}, sections=[], pictures=[])
    assert "connect-src" not in page


def test_the_card_command_serves_the_page_prints_its_address_and_ends_by_ctrl_c(served):
    command = [sys.executable, "jobs/reward_card.py", "--web", "--model", str(served)]
    own = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    with subprocess.Popen(command, cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:  # fmt: skip
        try:
            assert " on http://127.0.0.1:" in process.stdout.readline()
            line = process.stdout.readline()
            assert line.startswith("a page to try it: http://127.0.0.1:")
            with urllib.request.urlopen(line.split()[-1], timeout=10) as answer:
                assert b"Try the reward model" in answer.read()
            process.send_signal(signal.SIGINT)
            out, said = process.communicate(timeout=300)
        finally:
            process.kill()
    assert (process.returncode, said) == (0, "")
    assert out.splitlines()[-1] == "the server has ended"


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
def test_in_a_browser_two_answers_are_scored_compared_edited_and_the_edit_is_posted(service, client, page, caplog):
    """By keys alone where keys can do it; with the token as a header, never in an address, a log or the browser's store."""
    answers = [ANSWERS[1], HOSTILE]
    with caplog.at_level(logging.DEBUG):
        found = used(page, answers, TOKEN)
    assert not found["fault"]
    assert not found["faults"]
    assert found["asked_for_token"]
    assert "token" in found["refused"]
    assert found["hit"] is None
    assert found["dialogs"] == []
    cards = [posted(client, answer) for answer in answers]
    own = [card["reward"] for card in cards]
    assert found["rewards"] == pytest.approx([*own, own[0] - own[1]], abs=1e-4)
    assert found["reset"] == found["rewards"]
    assert found["texts"][0] == answers[0]
    assert found["texts"][1] == answers[1].replace("\u202e", "")
    assert found["marked"] > 0
    # The edit: what its JSON says is what the rewards show, what the server then scores, and what the row of largest difference was.
    (change,) = found["json"]["weights"]
    finals = [dict(map(tuple, card["codes"][-1])) for card in cards]
    terms = {n: change_of(cards, finals, n) for n in finals[0].keys() | finals[1].keys()}
    assert {row["latent"] for row in found["rows"]} == set(sorted(terms, key=lambda n: (-abs(terms[n]), n))[:8])
    assert change["latent"] == max(terms, key=lambda n: abs(terms[n])) == found["rows"][0]["latent"]
    moved = [value + (change["after"] - change["before"]) * final.get(change["latent"], 0.0) for value, final in zip(own, finals, strict=True)]  # fmt: skip
    assert found["edited"] == pytest.approx([*moved, moved[0] - moved[1]], abs=1e-4)
    assert found["edited"] != pytest.approx(found["rewards"], abs=1e-2)
    assert f".edit({{{change['latent']}: " in found["python"]
    assert "scored from now on" in found["posted"]
    try:
        body = {"items": [{"messages": conversation(answers[0])}], "variants": ["tried"], "scale": "raw"}
        scored = client.post("/v1/rewards", json=body).json()["items"][0]["answers"][0]["reward"]
        assert scored == pytest.approx(moved[0], abs=1e-3)
    finally:
        assert client.delete(f"/v1/models/{service.about.name}/variants/tried").status_code == 200
    assert "reward after it" in found["detail"]
    assert str(change["latent"]) in found["chosen"]
    assert found["hidden_edit"]
    for width, shown in found["widths"].items():
        assert shown <= int(width), "nobody should have to scroll sideways"
    assert found["nameless"] == 0
    address = page.removesuffix("/try")
    assert all(one["url"].startswith(f"{address}/") for one in found["requests"])
    assert {one["url"].removeprefix(address) for one in found["requests"]} == {"/try", "/v1/models", "/v1/card", f"/v1/models/{service.about.name}/variants"}  # fmt: skip
    assert all(one["authorised"] for one in found["requests"] if one["url"].endswith(("/v1/card", "/variants")))
    assert TOKEN not in json.dumps(found["requests"]) + caplog.text
    assert found["stored"] == 0


def change_of(cards, finals, latent):
    """What a latent adds to the difference of two answers, by the model's own head."""
    weights = [{one["id"]: one["weight"] for one in card["latents"]} for card in cards]
    first, second = (own.get(latent, 0.0) * final.get(latent, 0.0) for own, final in zip(weights, finals, strict=True))
    return np.float64(first - second)

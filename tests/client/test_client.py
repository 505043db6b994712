"""The client against servers that behave and that do not."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sarm.client import RewardClient, RewardError

ROOT = Path(__file__).parents[2]
ABOUT = {"identity": "0123", "name": "sarm", "template": "t", "tokenizer": "k", "protocol": 2}
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def answered(body: dict[str, Any], identity: str = "0123") -> dict[str, Any]:
    """What a server says; the reward is the number that the answer's text is, and items come in another order."""
    items = []
    for item in body["items"]:
        texts = item.get("completions") or [item["messages"][-1]["content"] if "messages" in item else item.get("text", "0")]  # fmt: skip
        items.append({"id": item["id"], "answers": [{"reward": float(text), "variants": {"base": float(text)}, "tokens": 3, "cut": False, "truncated": False, "flags": []} for text in texts]})  # fmt: skip
    return {"model": ABOUT | {"identity": identity}, "scale": body["scale"], "items": items[::-1]}


Reply = Callable[[dict[str, Any]], tuple[int, Any, dict[str, str]] | None]


class Server:
    """Answers in this process; `replies` are used up one after another before it answers as it should."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.replies: list[Reply] = []
        self.always: Reply = lambda body: (200, answered(body), {})
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                    reply = outer.replies.pop(0) if outer.replies else outer.always
                found = reply(body)
                if found is None:
                    self.close_connection = True
                    self.connection.close()
                    return
                status, content, headers = found
                sent = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                kind = "text/plain" if isinstance(content, bytes) else "application/json"
                for name, value in {"Content-Type": kind, **headers, "Content-Length": str(len(sent))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


def says(status: int, content: Any = None, **headers: str) -> Reply:
    error = {"error": {"code": "c", "message": "m", "item": 1}} if content is None else content
    return lambda _: (status, error, {name.replace("_", "-"): value for name, value in headers.items()})


def both(client: RewardClient, items: list[dict[str, Any]]) -> list[list[list[float]]]:
    """What the synchronous and the asynchronous way give."""
    found = [client.rewards(items), asyncio.run(client.arewards(items))]
    return [[[answer.reward for answer in own] for own in one] for one in found]


@pytest.mark.parametrize("module", ["sarm.client", "sarm.integrations.trl", "sarm.integrations.openrlhf", "sarm.integrations.slime", "sarm.integrations.verifiers"])  # fmt: skip
def test_a_client_is_imported_without_torch(module):
    heavy = {"torch", "transformers", "ray", "numpy", "pyarrow", "starlette", "pydantic"}
    code = f"import sys, {module}; from sarm.client import RewardClient; RewardClient('http://x'); print(sorted({heavy!r} & set(sys.modules)))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_answers_come_in_the_order_of_the_items_whatever_order_the_server_has(server):
    items = [{"prompt": TALK[:1], "completions": [str(10 * n + m) for m in range(1 + n % 7)]} for n in range(60)]
    expected = [[float(10 * n + m) for m in range(1 + n % 7)] for n in range(60)]
    assert both(RewardClient(server.url), items) == [expected, expected]
    assert max(sum(len(item["completions"]) for item in body["items"]) for body in server.bodies) <= 64
    assert len(server.bodies) > 4


def test_conversations_are_scored_in_a_line(server):
    client = RewardClient(server.url, scale="raw", on_truncated="refuse", explain=3)
    talks = [[*TALK[:1], {"role": "assistant", "content": str(n)}] for n in range(3)]
    assert client.score(talks) == asyncio.run(client.ascore(talks)) == [0.0, 1.0, 2.0]
    sent = server.bodies[0]
    assert (sent["scale"], sent["on_truncated"], sent["explain"]) == ("raw", "refuse", {"top": 3, "features": []})
    assert client.score([]) == []


@pytest.mark.parametrize("status", [429, 503, 502])
def test_what_passes_is_tried_again_and_as_late_as_the_server_says(server, status):
    server.replies = [says(status, Retry_After="1"), says(status, Retry_After="1")] * 2
    began = time.monotonic()
    assert both(RewardClient(server.url), [{"text": "4"}]) == [[[4.0]], [[4.0]]]
    assert time.monotonic() - began >= 4.0
    assert len(server.bodies) == 6


def test_lost_connections_are_tried_again_and_nothing_is_lost(server):
    server.replies = [lambda _: None] * 3
    assert RewardClient(server.url).score([[*TALK[:1], {"role": "assistant", "content": "7"}]]) == [7.0]
    server.replies = [lambda _: None] * 3
    assert asyncio.run(RewardClient(server.url).arewards([{"text": "7"}]))[0][0].reward == 7.0


def test_a_500_that_is_not_the_server_s_own_is_tried_again(server):
    """Ray Serve's proxy answers so, in plain text, for a replica that died."""
    server.replies = [says(500, b"Internal Server Error")] * 2
    assert RewardClient(server.url).rewards([{"text": "4"}])[0][0].reward == 4.0
    server.replies = [says(500, b"Internal Server Error")] * 2
    assert asyncio.run(RewardClient(server.url).arewards([{"text": "4"}]))[0][0].reward == 4.0


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 500])
def test_what_would_be_refused_again_is_not_tried_again(server, status):
    server.always = says(status)
    for ask in (lambda c: c.rewards([{"text": "4"}]), lambda c: asyncio.run(c.arewards([{"text": "4"}]))):
        with pytest.raises(RewardError, match=f"{status} c: m") as error:
            ask(RewardClient(server.url))
        assert (error.value.status, error.value.code, error.value.item) == (status, "c", 1)
    assert len(server.bodies) == 2


def test_a_client_gives_up_when_its_time_is_over(server):
    server.always = says(503, Retry_After="60")
    began = time.monotonic()
    with pytest.raises(RewardError, match="503"):
        RewardClient(server.url, timeout=5).rewards([{"text": "4"}])
    assert time.monotonic() - began < 30, "the next try would be too late"
    with pytest.raises(RewardError, match="reached"):
        RewardClient("http://127.0.0.1:9", timeout=1).rewards([{"text": "4"}])


def test_errors_of_whoever_stands_between_are_told(server):
    server.always = says(404, b"<html>nginx</html>")
    with pytest.raises(RewardError, match="nginx"):
        RewardClient(server.url).rewards([{"text": "4"}])


def test_a_model_that_is_exchanged_in_between_is_noticed(server):
    client = RewardClient(server.url)
    client.rewards([{"text": "1"}])
    assert client.identity == "0123"
    client.rewards([{"text": "2"}])
    assert [body.get("expect_identity") for body in server.bodies] == [None, "0123"]
    free = RewardClient(server.url, expect_identity=None)
    free.rewards([{"text": "1"}])
    free.rewards([{"text": "1"}])
    assert "expect_identity" not in server.bodies[-1]
    assert RewardClient(server.url, expect_identity="abc").identity == "abc"


def test_another_servers_items_are_refused(server):
    server.always = lambda body: (200, {**answered(body), "items": [{"id": "other", "answers": []}]}, {})
    with pytest.raises(RewardError, match="other items"):
        RewardClient(server.url).rewards([{"text": "4"}])
    server.always = lambda body: (200, {**answered(body), "items": [{"id": one["id"], "answers": []} for one in body["items"]]}, {})  # fmt: skip
    with pytest.raises(RewardError, match="0 answers"):
        RewardClient(server.url).rewards([{"text": "4"}])


def test_a_token_is_sent_as_a_bearer_and_shown_nowhere(server):
    client = RewardClient(server.url, token="correct-horse")
    client.rewards([{"text": "4"}])
    sent = {name.lower(): value for name, value in server.headers[0].items()}
    assert sent["authorization"] == "Bearer correct-horse"
    assert "correct-horse" not in repr(client)


def test_a_client_works_in_one_loop_after_another(server):
    client = RewardClient(server.url)
    for _ in range(3):
        assert asyncio.run(client.arewards([{"text": "4"}]))[0][0].reward == 4.0

    async def closing() -> None:
        await client.arewards([{"text": "4"}])
        await client.aclose()

    asyncio.run(closing())

"""A real HTTP server that speaks the chat completions protocol and fails as it is told to."""

import contextlib
import hashlib
import json
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What is done to a request instead of answering it; a dict overrides parts of the answer.
Fault = str | dict[str, Any] | None
Answer = Callable[[list[dict[str, str]]], str]


class JudgeServer:
    """Answers with `answer(messages)`; `fault(key, attempt)` names what goes wrong with a question's n-th request (from 1)."""

    def __init__(self, answer: Answer, fault: Callable[[str, int], Fault] | None = None, mode: str = "plain"):
        self.answer, self.fault, self.mode = answer, fault or (lambda key, attempt: None), mode
        self.requests: list[dict[str, Any]] = []
        self.attempts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.delivered: dict[str, int] = defaultdict(int)
        self.running = self.most_running = 0
        self.refuse: dict[str, str] = {}
        # What this kind of server does with a request, probes among them: a fault's dict, in which `wrap` makes a message of the answer.
        self.manners: Callable[[dict[str, Any], BaseHTTPRequestHandler], dict[str, Any] | None] = lambda body, http: (
            None
        )
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"judge": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @contextlib.contextmanager
    def serving(self) -> Iterator["JudgeServer"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    @property
    def asked(self) -> int:
        """Requests other than probes of what the server can do."""
        return sum(count for key, count in self.attempts.items() if key != "probe")

    def handle(self, http: BaseHTTPRequestHandler) -> None:
        body = json.loads(http.rfile.read(int(http.headers["content-length"])))
        messages = body["messages"]
        first = next(m["content"] for m in messages if m["role"] == "user")
        key = "probe" if "colour is the sky" in first else hashlib.sha256(first.encode()).hexdigest()
        with self._lock:
            self.attempts[key] += 1
            attempt = self.attempts[key]
            self.requests.append(body)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            self._reply(http, body, key, attempt)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self._lock:
                self.running -= 1

    def _reply(self, http: BaseHTTPRequestHandler, body: dict[str, Any], key: str, attempt: int) -> None:
        for name, reason in self.refuse.items():
            if name in body:
                return _send(http, 400, {"error": {"message": reason, "code": "unsupported_parameter"}})
        fault = self.manners(body, http) or (None if key == "probe" else self.fault(key, attempt))
        with self._lock:
            self.kinds[fault if isinstance(fault, str) else "own" if fault else "none"] += 1
        if fault == "429":
            return _send(http, 429, {"error": {"message": "slow down"}}, {"retry-after": "0.05"})
        if fault == "500":
            return _send(http, 500, {"error": {"message": "oops"}})
        if fault == "timeout":
            time.sleep(2.0)
            return None
        if fault == "not json":
            return _send(http, 200, "<html>gateway</html>")
        content = "no braces here" if fault == "garbage" else self._content(body, key)
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
        if isinstance(fault, dict):
            if "status" in fault:
                return _send(http, fault["status"], fault.get("body", {}), fault.get("headers", {}))
            answer["choices"][0]["finish_reason"] = fault.get("finish", "stop")
            answer["choices"][0]["message"] |= fault.get("message", {})
            if "wrap" in fault:
                answer["choices"][0]["message"] |= fault["wrap"](content)
            if "usage" in fault:
                answer["usage"] = fault["usage"]
            time.sleep(fault.get("seconds", 0))
        _send(http, 200, answer)
        with self._lock:
            self.delivered[key] += 1
        return None

    def _content(self, body: dict[str, Any], key: str) -> str:
        if key != "probe":
            return self.answer(body["messages"])
        wanted = body.get("response_format", {}).get("type")
        enforced = {"json_schema": ("json_schema", "json_object"), "json_object": ("json_object",), "plain": ()}[
            self.mode
        ]
        return '{"colour": "blue"}' if wanted in enforced else "Blue."


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    judge: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.judge.handle(self)

    def log_message(self, *_: Any) -> None:
        pass


def _send(http: BaseHTTPRequestHandler, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    http.send_response(status)
    http.send_header("content-type", "application/json")
    http.send_header("content-length", str(len(data)))
    for name, value in (headers or {}).items():
        http.send_header(name, value)
    http.end_headers()
    http.wfile.write(data)


def dealt(num_of_20: dict[str, int]) -> Callable[[str, int], Fault]:
    """Of every 20 questions so many meet each fault on their first request, in a fixed order: exact shares."""
    deck = [name for name, num in num_of_20.items() for _ in range(num)]
    deck += ["none"] * (20 - len(deck))
    random.Random(0).shuffle(deck)
    place: dict[str, int] = {}

    def fault(key: str, attempt: int) -> Fault:
        name = deck[place.setdefault(key, len(place)) % 20]
        return None if attempt > 1 or name == "none" else name

    return fault


def independent(share: dict[str, float]) -> Callable[[str, int], Fault]:
    """Faults by share of requests, each request's decided afresh by the question and the attempt."""

    def fault(key: str, attempt: int) -> Fault:
        place = int(hashlib.sha256(f"{key}{attempt}".encode()).hexdigest()[:8], 16) / 16**8
        for name, part in share.items():
            if (place := place - part) < 0:
                return name
        return None

    return fault


# 30 % 429, 10 % 5xx, 5 % time-outs, 10 % malformed: half broken bodies, half text without JSON.
FAULTS = {"429": 6, "500": 2, "timeout": 1, "not json": 1, "garbage": 1}

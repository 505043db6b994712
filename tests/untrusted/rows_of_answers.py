"""Rows 68 to 78: what judges answer, over real HTTP, and requests to a server of ours. An answer has no exit status but a status."""

import asyncio
import http.server
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from tests.engine.judge_server import JudgeServer
from tests.untrusted.world import Table, World

from sarm.contracts.judging import Odd, Question, Rating, Reply, parse
from sarm.engine.llm.endpoint import JudgeStoppedError
from sarm.engine.llm.judge import Judge, open_judges
from sarm.settings.judging import Judging

TABLE = Table()
row = TABLE.row


def answered(text: str = "", fault: Mapping[str, Any] | str | None = None, form: type = Odd) -> tuple[Reply, Judge]:
    """How a question ends whose judge writes this, or does this instead."""

    async def ask(url: str) -> tuple[Reply, Judge]:
        (judge,) = open_judges(Judging(judges=(f"m@{url}",), timeout=10.0), backoff=0.01)
        try:
            return await judge.ask(Question("intruder", f"question {text!r} {fault!r}", form, 50, "system")), judge
        finally:
            await judge.close()

    given: Any = dict(fault) if isinstance(fault, Mapping) else fault
    with JudgeServer(lambda _: text, lambda key, attempt: given).serving() as server:
        return asyncio.run(ask(server.url))


@row(68, "empty choices / null content / refusal")
def _(world: World) -> None:
    empty = answered(
        fault={
            "status": 200,
            "body": {"choices": [], "object": "chat.completion", "id": "x", "created": 0, "model": "m"},
        }
    )[0]
    assert (empty.status, "no chat completion" in empty.reason) == ("api_error", True)
    assert answered(fault={"message": {"content": None}})[0].status == "invalid"
    assert answered(fault={"message": {"content": None, "refusal": "I will not"}})[0].status == "refused"
    assert answered(fault={"finish": "content_filter"})[0].status == "refused"


@row(69, "cut by length")
def _(world: World) -> None:
    cut = answered('{"intruder": ', {"finish": "length"})[0]
    assert (cut.status, cut.answer, cut.requests) == ("truncated", None, 1)


@row(70, "JSON in fence or prose")
def _(world: World) -> None:
    for text in ('```json\n{"intruder": 3}\n```', 'I think it is {"intruder": 3}, clearly.'):
        found = answered(text)[0]
        assert (found.status, found.answer) == ("ok", {"intruder": 3})


@row(71, 'score "7/10", "seven", 11, −1, true')
def _(world: World) -> None:
    for score in ('"7/10"', '"seven"', "11", "-1", "3.5", "NaN", "null"):
        found = parse(f'{{"explanation": "x", "score": {score}}}', Rating)
        assert (found.status, found.answer) == ("invalid", None), score
    assert answered('{"explanation": "x", "score": 11}', form=Rating)[0].requests == 2, "asked once more, told why"


TABLE.cannot(
    72, "other feature id in the answer", "no answer names a feature: it belongs to the request that it answers"
)


@row(73, "HTML error page with 200")
def _(world: World) -> None:
    page = answered(fault="not json")[0]
    assert (page.status, "no JSON" in page.reason) == ("api_error", True)


@row(74, "301 to other host")
def _(world: World) -> None:
    reached: list[str] = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reached.append(self.headers.get("authorization", ""))
            self.send_error(500)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    elsewhere = http.server.HTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=elsewhere.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    there = f"http://127.0.0.1:{elsewhere.server_address[1]}/v1/chat/completions"
    try:
        for status in (301, 302, 307, 308):
            with pytest.raises(JudgeStoppedError, match="sends its callers elsewhere"):
                answered(fault={"status": status, "headers": {"location": there}})
    finally:
        elsewhere.shutdown()
        elsewhere.server_close()
    assert reached == []


@row(75, "10 MB / endless stream")
def _(world: World) -> None:
    long = answered("x" * 10_000_000)[0]
    assert (long.status, long.text) == ("api_error", "")
    assert "more than 262,144 bytes" in long.reason


@row(76, "answer holds <script>, ANSI codes, markdown image URL")
def _(world: World) -> None:
    # Kept as it came; tests/interpret shows that pages escape it.
    text = '{"explanation": "<script>x</script> \\u001b[31m ![](http://a.example/x.png)", "score": 3}'
    found = answered(text, form=Rating)[0]
    assert found.status == "ok"
    assert found.answer is not None
    assert "<script>x</script> \x1b[31m ![](" in found.answer["explanation"]


NO_SERVER = "no job of the platform answers requests"
TABLE.cannot(77, "not JSON, wrong content type, missing field, extra field", NO_SERVER)
TABLE.cannot(78, "0 texts / 10 000 texts / 64 MB", NO_SERVER)

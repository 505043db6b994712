"""The judge client against a server that fails as scripted: statuses, retries, budgets, cache, keys. All over real HTTP."""

import asyncio
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engine.judge_server import FAULTS, JudgeServer, dealt, independent

from sarm.contracts.judging import Odd, Question, Rating, Reply
from sarm.engine.llm.dialect import FORMATS, PARAMETERS, Dialect
from sarm.engine.llm.endpoint import JudgeStoppedError
from sarm.engine.llm.judge import Judge, open_judges
from sarm.settings.checks import UserError
from sarm.settings.judging import Judging

GOOD = '{"intruder": 3}'


def question(number: int, form: type = Odd, max_tokens: int = 50) -> Question:
    return Question("intruder", f"question {number} {'word ' * 60}", form, max_tokens, "system")


@pytest.fixture(autouse=True)
def own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SARM_CACHE", str(tmp_path / "cache"))
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve() -> Iterator[Callable[..., JudgeServer]]:
    import contextlib

    with contextlib.ExitStack() as stack:
        yield lambda answer=lambda _: GOOD, fault=None, mode="plain": stack.enter_context(
            JudgeServer(answer, fault, mode).serving()
        )


def ask_all(server: JudgeServer, questions: list[Question], **judging: Any) -> tuple[list[Reply], Judge]:
    """Replies, and the judge as it was at the end."""

    async def run() -> tuple[list[Reply], Judge]:
        settings = Judging(judges=(f"m@{server.url}",), **{"timeout": 10.0, **judging})
        (judge,) = open_judges(settings, backoff=0.01)
        try:
            return list(await asyncio.gather(*(judge.ask(one) for one in questions))), judge
        finally:
            await judge.close()

    return asyncio.run(run())


def log_files(tmp_path: Path) -> str:
    return "".join(path.read_text() for path in (tmp_path / "cache").rglob("*.jsonl"))


def test_a_faulty_server_leaves_no_question_open_and_costs_at_most_1_6_requests_each(serve):
    server = serve(fault=dealt(FAULTS))
    replies, judge = ask_all(server, [question(i) for i in range(100)], concurrency=16, timeout=1.0)
    assert [reply.status for reply in replies] == ["ok"] * 100
    assert {reply.answer["intruder"] for reply in replies} == {3}
    assert {name: server.kinds[name] for name in FAULTS} == {name: 5 * num for name, num in FAULTS.items()}
    assert 155 <= server.asked <= 160
    assert judge.num_requests == server.asked + server.attempts["probe"]


def test_faults_that_go_on_leave_questions_marked_and_never_guessed(serve):
    # One question in eight meets its fault for ever, the others new faults at every request.
    lasting = independent({"500": 0.06, "garbage": 0.06})
    changing = independent({"429": 0.3, "500": 0.1, "not json": 0.05, "garbage": 0.05})
    server = serve(fault=lambda key, attempt: lasting(key, 1) or changing(key, attempt))
    replies, _ = ask_all(server, [question(i) for i in range(60)])
    counts = {status: sum(reply.status == status for reply in replies) for status in ("ok", "invalid", "api_error")}
    assert sum(counts.values()) == 60
    assert min(counts.values()) > 0
    assert counts["ok"] > 40
    assert all((reply.answer is None) == (reply.status != "ok") and bool(reply.reason) == (reply.status != "ok") for reply in replies)  # fmt: skip


KILLED = """
import asyncio, sys
from sarm.contracts.judging import Odd
from sarm.settings.judging import Judging
from sarm.interpret.questions import Question
from sarm.engine.llm.judge import open_judges
async def main():
    (judge,) = open_judges(Judging(judges=("m@" + sys.argv[1],), concurrency=4))
    ask = [judge.ask(Question("intruder", f"question {i}", Odd, 50, "system")) for i in range(int(sys.argv[2]))]
    replies = await asyncio.gather(*ask)
    await judge.close()
    print(len(replies), judge.num_cached)
asyncio.run(main())
"""


def test_nothing_that_was_written_down_is_asked_again_after_a_kill(serve, tmp_path):
    server = serve(fault=lambda key, attempt: {"seconds": 0.02})
    command = [sys.executable, "-c", KILLED, server.url, "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    while sum(server.delivered.values()) - server.delivered["probe"] < 20:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while server.running:
        time.sleep(0.01)
    lines = [json.loads(line) for line in log_files(tmp_path).splitlines()]
    written = sum("status" in line for line in lines)
    before = dict(server.attempts)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    asked_again = [key for key, count in before.items() if server.attempts[key] > count]
    # At most the four that were on their way when the process died.
    assert done.stdout.split() == ["60", str(written)]
    assert written >= 16
    assert len(asked_again) <= 4
    assert server.attempts["probe"] == before["probe"]
    assert server.asked - sum(count for key, count in before.items() if key != "probe") == 60 - written


def test_a_torn_line_is_not_an_answer_and_the_next_one_stays_whole(serve, tmp_path):
    server = serve()
    ask_all(server, [question(1)])
    (path,) = (tmp_path / "cache").rglob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    ask_all(server, [question(1)])
    replies, judge = ask_all(server, [question(1)])
    assert server.asked == 2
    assert replies[0].cached
    assert judge.log.num_torn == 1


STATUSES = {
    "refusal field": ({"message": {"content": None, "refusal": "no"}}, "refused"),
    "filter": ({"finish": "content_filter"}, "refused"),
    "filter before the model": ({"status": 400, "body": {"error": {"message": "x", "code": "content_filter"}}}, "refused"),
    "refusal in prose": ({"message": {"content": "I'm sorry, I can't help with that."}}, "refused"),
    "cut": ({"finish": "length", "message": {"content": '{"intruder": '}}, "truncated"),
    "whole answer, then cut": ({"finish": "length", "message": {"content": GOOD + " and"}}, "ok"),
    "score missing": ({"message": {"content": '{"explanation": "x"}'}}, "invalid"),
    "another language": ({"message": {"content": "Erklärung: Tiere\nPunktzahl: vier"}}, "invalid"),
    "too long a prompt": ({"status": 400, "body": {"error": {"message": "context length exceeded"}}}, "api_error"),
    "no content": ({"message": {"content": None}}, "invalid"),
    "no choices": ({"status": 200, "body": {"object": "error"}}, "api_error"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATUSES)
def test_each_way_of_not_answering_has_its_status_and_a_reason(name, serve):
    fault, status = STATUSES[name]
    server = serve(fault=lambda key, attempt: fault)
    (reply,), _ = ask_all(server, [question(1)])
    assert reply.status == status
    assert bool(reply.reason) == (status != "ok")


def test_one_repair_turn_shows_the_judge_its_answer_and_the_fault(serve):
    server = serve(answer=lambda messages: GOOD if len(messages) == 4 else '{"intruder": "the third"}')
    (reply,), _ = ask_all(server, [question(1)])
    assert (reply.status, reply.requests, reply.prompt_tokens) == ("ok", 2, 200)
    repair = server.requests[-1]["messages"]
    assert repair[2] == {"role": "assistant", "content": '{"intruder": "the third"}'}
    assert "intruder" in repair[3]["content"]
    always = serve(answer=lambda messages: "hm")
    (reply,), _ = ask_all(always, [question(1)])
    assert (reply.status, reply.requests) == ("invalid", 2)


@pytest.mark.parametrize("mode", ["json_schema", "json_object", "plain"])
def test_what_a_server_enforces_is_found_out_once_and_then_sent(mode, serve):
    server = serve(mode=mode)
    ask_all(server, [question(1)])
    ask_all(server, [question(2)])
    kinds = [body.get("response_format", {}).get("type") for body in server.requests]
    assert kinds[-2:] == [None if mode == "plain" else mode] * 2
    assert server.attempts["probe"] == (1 if mode == "json_schema" else 2)
    if mode == "json_schema":
        schema = server.requests[-1]["response_format"]["json_schema"]["schema"]
        assert schema == {"type": "object", "properties": {"intruder": {"type": "integer", "minimum": 1}}, "required": ["intruder"], "additionalProperties": False}  # fmt: skip


def test_parameters_that_a_server_refuses_by_name_are_renamed_or_left_out(serve):
    server = serve()
    server.refuse = {
        "max_tokens": "use max_completion_tokens instead of max_tokens",
        "temperature": "temperature is not supported",
        "response_format": "unknown field response_format",
    }
    (reply,), _ = ask_all(server, [question(1)])
    assert reply.status == "ok"
    assert server.requests[-1].keys() == {"model", "messages", "stream", "max_completion_tokens"}


def test_a_429_closes_the_gate_for_as_long_as_the_server_says_and_halves_the_stream(serve):
    opened: list[float] = []

    def fault(key: str, attempt: int) -> Any:
        opened.append(time.monotonic())
        return {"status": 429, "headers": {"retry-after": "0.4"}} if len(opened) <= 8 else None

    server = serve(fault=fault)
    replies, judge = ask_all(server, [question(i) for i in range(40)], concurrency=8)
    assert {reply.status for reply in replies} == {"ok"}
    assert opened[8] - opened[7] >= 0.39
    assert judge.pace.num_throttled == 8
    assert 4 <= judge.pace.limit <= 8
    assert server.asked == 48


def test_a_wait_that_is_too_long_stops_the_run_and_loses_nothing(serve):
    server = serve(fault=lambda key, attempt: {"status": 429, "headers": {"retry-after": "7200"}})
    with pytest.raises(JudgeStoppedError, match="7,200 s"):
        ask_all(server, [question(1)])
    server.fault = lambda key, attempt: None
    (reply,), _ = ask_all(server, [question(1)])
    assert reply.status == "ok"


KEY = "sk-very-secret-0123456789"


def test_the_key_is_sent_to_its_host_and_appears_nowhere_else(serve, tmp_path, monkeypatch, capfd, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    echo = {"status": 400, "body": {"error": {"message": f"odd header Bearer {KEY}"}}}
    server = serve(fault=lambda key, attempt: echo)
    host = server.url.split("/")[2]
    (reply,), judge = ask_all(server, [question(1)], keys=(f"{host}=env:JUDGE_KEY",))
    assert "[key]" in reply.reason
    wrong = serve(fault=lambda key, attempt: {**echo, "status": 401})
    file = tmp_path / "key.txt"
    file.write_text(KEY + "\n")
    with pytest.raises(JudgeStoppedError, match="refused the key") as stopped:
        ask_all(wrong, [question(1)], keys=(f"{wrong.url.split('/')[2]}=file:{file}",))
    said = capfd.readouterr()
    seen = [log_files(tmp_path), str(stopped.value), repr(judge.__dict__), said.out, said.err, repr(Judging(keys=("h=env:JUDGE_KEY",)))]  # fmt: skip
    assert not [text for text in seen if KEY in text]
    # The client library masks it in its own debug log; ours says nothing of it.
    assert not [record for record in caplog.records if record.name.startswith("sarm") and KEY in record.getMessage()]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"judges": ("m",)}, ["OPENAI_API_KEY"]),
        ({"judges": ("m@http://h/v1",), "keys": ("h=file:/no/such",)}, ["/no/such"]),
        ({"judges": ("m@http://h/v1",), "keys": (KEY,)}, ["HOST=env:NAME"]),
        ({"judges": ("m@http://h/v1",), "keys": (f"h={KEY}",)}, ["HOST=env:NAME"]),
        ({"judges": ("m@http://user:pw@h/v1",)}, ["user, password"]),
        ({"judges": ("m@http://h/v1?key=x",)}, ["query"]),
        ({"judges": ("@http://h/v1",)}, ["MODEL@http"]),
        ({"judges": ("m@http://h/v1", "m@http://g/v1")}, ["named twice"]),
        ({"judges": ("m@http://h/v1",), "max_usd": 1.0}, ["price of m", "--judging.prices"]),
        ({"judges": ("m@http://h/v1",), "prices": ("m=1",)}, ["MODEL=INPUT/OUTPUT"]),
        ({"max_usd": float("nan")}, ["max_usd"]),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line_without_showing_a_key(fields, words):
    with pytest.raises(UserError) as error:
        open_judges(Judging(**fields))
    assert all(word in str(error.value) for word in words), error.value
    assert KEY not in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreachable_server_stops_with_one_line_and_writes_no_answer(serve, tmp_path):
    server = serve()
    gone = JudgeServer(lambda _: GOOD)
    gone._server.server_close()
    with pytest.raises(JudgeStoppedError, match="does not answer"):
        ask_all(gone, [question(1)])
    assert log_files(tmp_path) == ""
    ask_all(server, [question(1)])
    assert server.asked == 1


def test_a_server_that_takes_requests_and_never_answers_ends_the_run_and_is_named():
    with socket.create_server(("127.0.0.1", 0), backlog=16) as deaf:
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"

        async def ask() -> None:
            (judge,) = open_judges(Judging(judges=(f"m@{address}",), timeout=0.3), backoff=0.01)
            try:
                await judge.ask(question(0))
            finally:
                await judge.close()

        with pytest.raises(JudgeStoppedError, match=rf"m at {address} does not answer: no answer within 0\.3 s"):
            asyncio.run(ask())
    # With the default settings: three requests and the waits between them.
    assert 3 * Judging().timeout + 30 <= 300


def test_a_server_that_dies_on_the_way_stops_the_run_and_the_same_questions_go_on(serve):
    with JudgeServer(lambda _: GOOD).serving() as server:
        ask_all(server, [question(i) for i in range(5)])
    with pytest.raises(JudgeStoppedError, match="does not answer"):
        ask_all(server, [question(i) for i in range(10)])
    # What it had answered needs no server.
    replies, judge = ask_all(server, [question(i) for i in range(5)])
    assert judge.num_cached == 5
    assert all(reply.cached for reply in replies)


def test_a_token_budget_stops_before_it_is_exceeded_and_the_next_run_goes_on(serve):
    server = serve()
    with pytest.raises(JudgeStoppedError, match="1,000 tokens"):
        ask_all(server, [question(i) for i in range(50)], max_tokens_total=1000)
    spent = server.asked * 110
    assert 500 < spent <= 1000
    with pytest.raises(JudgeStoppedError):
        ask_all(server, [question(i) for i in range(50)], max_tokens_total=1000)
    assert server.asked * 110 == spent, "answers from the log count"
    replies, _ = ask_all(server, [question(i) for i in range(50)])
    assert {reply.status for reply in replies} == {"ok"}
    assert server.asked == 50


def test_a_money_budget_counts_what_the_answers_cost(serve):
    server = serve()
    prices = ("m=10/100",)
    with pytest.raises(JudgeStoppedError, match=re.escape("0.02 USD")):
        ask_all(server, [question(i) for i in range(50)], prices=prices, max_usd=0.02)
    assert 0.008 < server.asked * (100 * 10 + 10 * 100) / 1e6 <= 0.02
    _, judge = ask_all(server, [question(i) for i in range(3)], prices=prices)
    assert judge.budget.usd == pytest.approx(3 * 0.002)


def test_tokens_of_a_server_that_does_not_count_are_estimated_and_said_to_be(serve):
    server = serve(fault=lambda key, attempt: {"usage": None})
    (reply,), _ = ask_all(server, [question(1)])
    assert reply.estimated
    assert reply.prompt_tokens > 0


def test_equal_questions_at_once_are_one_and_only_retry_failed_asks_failures_again(serve):
    server = serve(fault=lambda key, attempt: "garbage" if attempt <= 2 else None)
    replies, _ = ask_all(server, [question(1)] * 5)
    assert {reply.status for reply in replies} == {"invalid"}
    assert server.asked == 2
    ask_all(server, [question(1)])
    assert server.asked == 2
    (reply,), _ = ask_all(server, [question(1)], retry_failed=True)
    assert (reply.status, server.asked) == ("ok", 3)
    ask_all(server, [question(1)], retry_failed=True)
    assert server.asked == 3


def test_answers_can_be_kept_shorter_or_longer_than_questions_allow(serve):
    server = serve()
    ask_all(server, [question(1)], max_answer_tokens=7)
    ask_all(server, [question(1)], max_answer_tokens=70)
    assert [body["max_tokens"] for body in server.requests if "question" in body["messages"][-1]["content"]] == [7, 70]


def test_a_parameter_that_servers_refuse_is_one_entry_and_is_changed_once(monkeypatch):
    monkeypatch.setitem(PARAMETERS, "seed", "random_seed")
    dialect = Dialect()
    sent = ("seed", "temperature", "max_tokens")
    assert dialect.adapt("the model is busy", sent) is None
    assert dialect.adapt("use random_seed", ("temperature",)) is None, "it was not sent"
    assert dialect.adapt("unknown parameter seed, use random_seed", sent) == "seed"
    assert dialect.adapt("max_tokens is too large: 900. It supports at most 512 max_completion_tokens", sent) is None
    assert dialect.adapt("temperature must be 1", sent) == "temperature"
    assert dialect.adapt("temperature must be 1, and random_seed above 0", ("random_seed",)) is None
    assert dialect.spoken({"seed": 3, "temperature": 0, "stop": None, "n": 1}) == {"random_seed": 3, "n": 1}
    dialect.try_again("temperature")
    assert dialect.takes("temperature")


def test_every_format_of_answers_is_asked_for_by_the_name_that_is_logged(serve):
    for mode in FORMATS:
        server = serve(mode=mode)
        ask_all(server, [question(1)])
        assert server.requests[-1]["response_format"]["type"] == mode


def test_two_line_ratings_need_no_repair_and_no_enforced_json(serve):
    server = serve(answer=lambda _: "**Explanation:** mentions animals\n**Score:** [4]", mode="json_schema")
    asked = dataclasses.replace(question(1, Rating), in_lines=True)
    (reply,), _ = ask_all(server, [asked])
    assert "response_format" not in server.requests[-1]
    assert reply.answer == {"explanation": "mentions animals", "score": 4}
    assert server.asked == 1

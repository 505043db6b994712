"""Judges behind servers of every kind, over real HTTP: what each is sent, and that its answers are read. The page's table is written here."""

import asyncio
import functools
import os
import tempfile
from typing import Any, NamedTuple
from unittest import mock

import pytest
from tests.compatibility import assert_listed
from tests.engine.served_like import LIKES, Like

from sarm.contracts.judging import Odd, Question, Rating, Reply
from sarm.engine.llm.judge import open_judges
from sarm.engine.llm.servers import OTHER, SERVERS, Server, server_at
from sarm.settings.checks import UserError
from sarm.settings.identity import identity
from sarm.settings.judging import Judging

BY_NAME = {like.name: like for like in LIKES}
ADDRESSES = {
    "OpenAI": "https://api.openai.com/v1",
    "Azure OpenAI": "https://mine.openai.azure.com/openai/v1",
    "OpenRouter": "https://openrouter.ai/api/v1",
    "Together": "https://api.together.xyz/v1",
    "Mistral": "https://api.mistral.ai/v1",
    "Gemini": "https://generativelanguage.googleapis.com/v1beta/openai",
    "Ollama": "http://localhost:11434/v1",
    "LM Studio": "http://127.0.0.1:1234/v1",
    "llama.cpp": "http://gpu-box:8080/v1",
    "vLLM": "http://10.0.0.7:8000/v1",
}


class Seen(NamedTuple):
    """Replies of a server, what it was sent last, and how many requests it took."""

    replies: list[Reply]
    last: dict[str, Any]
    requests: list[dict[str, Any]]


def entry_of(like: Like) -> Server:
    return next((server for server in SERVERS if server.name == like.name.partition(",")[0]), OTHER)


def ask(like: Like, answer: str = '{"intruder": 3}', form: type = Odd, questions: int = 3, **judging: Any) -> Seen:
    """A few questions at once to a server of this kind."""

    async def run(url: str) -> list[Reply]:
        version = "?api-version=2024-10-21" if like.name == "Azure OpenAI" else ""
        settings = Judging(judges=(f"m@{url}{version}",), timeout=20.0, **judging)
        (judge,) = open_judges(settings, backoff=0.01)
        try:
            asked = [Question("intruder", f"question {number}", form, 50, "You are careful.") for number in range(questions)]  # fmt: skip
            return list(await asyncio.gather(*map(judge.ask, asked)))
        finally:
            await judge.close()

    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, {"SARM_CACHE": cache}),
        mock.patch("sarm.engine.llm.endpoint.server_at", return_value=entry_of(like)),
        like.serve(answer).serving() as server,
    ):
        replies = asyncio.run(run(server.url))
        return Seen(replies, server.requests[-1], server.requests)


@functools.cache
def asked(name: str, effort: str | None = None) -> Seen:
    return ask(BY_NAME[name], reasoning_effort=effort)


@pytest.mark.parametrize("name", BY_NAME)
def test_every_question_is_answered_and_no_text_is_lost(name):
    seen = asked(name)
    assert [(reply.status, reply.answer) for reply in seen.replies] == [("ok", {"intruder": 3})] * 3
    turns = seen.last["messages"]
    said = "\n".join(turn["content"] for turn in turns)
    assert "You are careful." in said
    assert "question" in said
    assert [turn["role"] for turn in turns] in (["system", "user"], ["user"])


@pytest.mark.parametrize("name", [like.name for like in LIKES if like.thinks])
def test_thinking_gets_room_once_and_later_questions_have_it_from_the_first(name):
    seen = asked(name)
    limits = [BY_NAME[name].limit(body) for body in seen.requests]
    assert None not in limits
    assert limits[-1] >= BY_NAME[name].thinks + 10
    # The probe has found it out, so no question had too little.
    assert [reply.requests for reply in seen.replies] == [1] * 3


@pytest.mark.parametrize("name", [like.name for like in LIKES if like.thinks])
def test_room_that_is_fixed_is_sent_from_the_first_and_never_exceeded(name):
    like = BY_NAME[name]
    enough = ask(like, max_answer_tokens=3500)
    assert {reply.status for reply in enough.replies} == {"ok"}
    assert {like.limit(body) for body in enough.requests} - {None} == {3500}
    too_little = ask(like, max_answer_tokens=200)
    assert {reply.status for reply in too_little.replies} == {"truncated"}
    assert "--judging.max-answer-tokens" in too_little.replies[0].reason
    assert {like.limit(body) for body in too_little.requests} - {None} == {200}


def test_a_model_without_so_much_room_gets_what_it_has():
    # It would take 8,192 after 2,048, has 3,796 beside the question, and thinks for 3,000.
    limits = [body["max_tokens"] for body in asked("vLLM").requests]
    assert max(limits) > 4096 - 300
    assert 3010 <= limits[-1] <= 3796


def test_a_model_that_never_stops_thinking_is_truncated_and_says_why():
    endless = Like("Ollama", thinks=10**9, cut={"content": "", "reasoning": "Wait"})
    seen = ask(endless, questions=1)
    assert seen.replies[0].status == "truncated"
    assert "thinking left no room" in seen.replies[0].reason
    assert "--judging.reasoning-effort low" in seen.replies[0].reason
    limits = [body["max_tokens"] for body in seen.requests]
    assert limits == sorted(limits)
    assert max(limits) == 32_768


EFFORTS = {
    "OpenRouter": {"reasoning": {"effort": "low"}},
    "Mistral": {},
    "OpenAI, an early reasoning model": {},
    **{name: {"reasoning_effort": "low"} for name in ("OpenAI", "Azure OpenAI", "Gemini", "Ollama", "LM Studio")},
}
BY_TEMPLATE = {
    "reasoning_effort": "low",
    "chat_template_kwargs": {"enable_thinking": True, "thinking": True, "reasoning_effort": "low"},
}


@pytest.mark.parametrize("name", BY_NAME)
def test_effort_is_sent_as_each_server_takes_it_and_only_if_it_is_set(name, capsys):
    seen = ask(BY_NAME[name], reasoning_effort="low")
    fields = ("reasoning_effort", "reasoning", "chat_template_kwargs")
    sent = {field: seen.last[field] for field in fields if field in seen.last}
    assert sent == EFFORTS.get(name, BY_TEMPLATE)
    assert {reply.status for reply in seen.replies} == {"ok"}
    assert ("which is left out" in capsys.readouterr().out) == (not sent)
    assert not [body for body in asked(name).requests if body.keys() & set(fields)]


def test_a_level_that_a_model_does_not_have_is_left_out_and_said(capsys):
    seen = ask(BY_NAME["OpenAI"], reasoning_effort="none")
    assert {reply.status for reply in seen.replies} == {"ok"}
    assert "m: takes no reasoning_effort 'none', which is left out" in capsys.readouterr().out


def test_effort_decides_answers_and_while_unset_no_folder_or_answer_is_another():
    assert "reasoning_effort" not in identity(Judging())
    assert identity(Judging(reasoning_effort="low")) == identity(Judging()) | {"reasoning_effort": "low"}
    with pytest.raises(UserError, match="reasoning_effort must be one lower-case word"):
        Judging(reasoning_effort="Low effort")


def test_a_repair_turn_follows_the_folded_turn_and_repeats_no_thoughts():
    gemma = Like("vLLM", BY_NAME["vLLM"].refuse, wrap=BY_NAME["Together"].wrap, enforces="plain")
    seen = ask(gemma, answer="it is the third", form=Rating, questions=1)
    assert (seen.replies[0].status, seen.replies[0].requests) == ("invalid", 2)
    assert [turn["role"] for turn in seen.last["messages"]] == ["user", "assistant", "user"]
    assert seen.last["messages"][1]["content"] == "it is the third"


def test_a_refused_system_turn_costs_one_request_however_many_questions_are_asked_at_once():
    seen = ask(BY_NAME["Gemini"], questions=8)
    refused = [body for body in seen.requests if body["messages"][0]["role"] == "system"]
    assert {reply.status for reply in seen.replies} == {"ok"}
    assert 1 <= len(refused) <= 8, "those that were on their way together"
    again = ask(BY_NAME["Gemini"], questions=8, concurrency=1)
    assert sum(body["messages"][0]["role"] == "system" for body in again.requests) == 1


@pytest.mark.parametrize("content", [{"text": "x"}, 7, [{"kind": "text"}], [{"type": "text"}]])
def test_contents_of_no_known_shape_are_named_failures(content):
    odd = Like("Ollama", wrap=lambda text: {"content": content})
    with pytest.raises(UserError, match="the body of the answer is no chat completion"):
        ask(odd, questions=1)


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.name)
def test_addresses_tell_the_kind(server):
    assert server_at(ADDRESSES[server.name]) == server
    assert server_at(f"{ADDRESSES[server.name]}/") == server
    assert server_at("http://api.openai.com.evil.example/v1") == OTHER
    assert server_at("http://localhost:80001/v1") == OTHER
    assert server_at("http://localhost:9000/v1") == OTHER


def test_azures_addresses_of_deployments_need_their_version():
    address = "https://mine.openai.azure.com/openai/deployments/judge"
    (spec,) = Judging(judges=(f"gpt@{address}?api-version=2024-10-21",)).specs()
    assert (spec.base_url, spec.api_version) == (address, "2024-10-21")
    with pytest.raises(
        UserError, match=r"names no version. End it in \?api-version=VERSION, or pass https://mine.*/openai/v1"
    ):
        Judging(judges=(f"gpt@{address}",))
    with pytest.raises(UserError, match="more than a place"):
        Judging(judges=(f"gpt@{address}?api-version=1&key=x",))


def test_the_page_lists_what_each_server_is_sent_and_how_it_answers():
    rows = []
    for like in LIKES:
        seen, lower = asked(like.name), ask(like, reasoning_effort="low", questions=1)
        limit = next(name for name in ("max_completion_tokens", "max_tokens") if name in seen.last)
        enforced = seen.last.get("response_format", {}).get("type", "asked for in words")
        turn = "system turn" if seen.last["messages"][0]["role"] == "system" else "before the question"
        effort = [name for name in ("reasoning_effort", "reasoning", "chat_template_kwargs") if name in lower.last]
        entry = entry_of(like)
        told = {OTHER: "any other address"}.get(entry, f"`{ADDRESSES.get(entry.name)}`")
        rows.append(
            [like.name, told, f"`{limit}`", ", ".join(f"`{name}`" for name in effort) or "left out", enforced, turn]
        )
    header = ["server", "told by an address like", "limit of tokens", "effort", "JSON", "instructions"]
    assert_listed("judges", header, rows)

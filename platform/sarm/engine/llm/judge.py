"""Judges behind any OpenAI-compatible server. A question ends as ok, refused, invalid, api_error or truncated, and is never asked twice.

log -> budget -> pace -> request -> check; a request that failed on its way is sent again, an answer that does not fit gets one repair turn.
What cannot be answered now (wrong key, dead server, spent budget) stops the run and is not written down as an answer.
"""

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from sarm.contracts.judging import FAILURES, Question, Reply, Status, json_schema, parse
from sarm.data.sources.cache import cache_root
from sarm.engine.llm.budget import Budget, Usage
from sarm.engine.llm.dialect import FORMATS, PLAIN, PROBE, Messages, format_of, probe_format
from sarm.engine.llm.endpoint import Completion, DeclinedError, Endpoint, JudgeStoppedError, TransientError
from sarm.engine.llm.log import AnswerLog, content_key
from sarm.engine.llm.pace import Pace
from sarm.engine.llm.room import Room
from sarm.engine.terminal import say
from sarm.settings.judging import JudgeSpec, Judging

# Of a request that the server turns away for its own reasons, and of one that fails on the way.
_MAX_THROTTLED, _MAX_FAILED = 40, 5
# Of the first question of all: who waits for a mistyped address should not wait long.
_MAX_FAILED_AT_FIRST = 3
_MAX_BACKOFF = 30.0
# Questions in a row without an answer after which the server is taken to be down.
_DOWN_AFTER = 10
_BYTES_PER_TOKEN = 3.0
_PROBE_TOKENS = 60


class Judge:
    """One model that can be asked; use inside one event loop and close at the end.

    `backoff` is the first wait in seconds after a failed request, doubled at each further one.
    """

    def __init__(
        self, spec: JudgeSpec, key: str, judging: Judging, budget: Budget, log: AnswerLog, backoff: float = 0.5
    ):
        self.spec, self.budget, self.log, self.backoff = spec, budget, log, backoff
        self.judging = judging
        self.pace = Pace(judging.concurrency)
        self.num_requests = self.num_asked = self.num_cached = 0
        self.total = Usage()
        self._endpoint = Endpoint(spec, key, judging.timeout, judging.reasoning_effort)
        self._room = Room(judging.max_answer_tokens)
        self._under_way: dict[str, asyncio.Task[Reply]] = {}
        self._mode: str | None = None
        self._probing = asyncio.Lock()
        self._stopped: JudgeStoppedError | None = None
        self._unanswered = 0
        self._met: set[str] = set()

    async def ask(self, question: Question, draw: int = 0) -> Reply:
        """The answer to a question; `draw` tells repetitions of one question apart.

        Raises JudgeStoppedError if asking has to end; what is under way is still answered and written down.
        """
        question = dataclasses.replace(question, max_tokens=self.judging.max_answer_tokens or question.max_tokens)
        # What is not set is no part of it, so that answers from before it could be set are found.
        more = [part for part in (self.judging.reasoning_effort, self.spec.api_version) if part]
        key = content_key("answer/v1", self.spec.base_url, self.spec.model, question.kind, question.system, question.user, question.max_tokens, json_schema(question.form), draw, *more)  # fmt: skip
        # Equal questions at the same time are one question.
        if key not in self._under_way:
            found = self.log.find(key)
            if found is not None and key not in self._met:
                self._met.add(key)
                self._count(Usage(found.prompt_tokens, found.completion_tokens, found.estimated))
                if not (self.judging.retry_failed and found.status in FAILURES):
                    self.num_cached += 1
                    return found
            elif found is not None:
                return found
            self._under_way[key] = asyncio.create_task(self._ask(key, question))
            self._under_way[key].add_done_callback(lambda _: self._under_way.pop(key, None))
        return await asyncio.shield(self._under_way[key])

    async def prepare(self) -> str:
        """What the server makes of `response_format`, found out by asking for something that only an enforced format answers.

        Raises JudgeStoppedError if it cannot be asked.
        """
        async with self._probing:
            key = content_key("mode/v1", self.spec.base_url, self.spec.model)
            if self._mode is None and (known := self.log.note(key)):
                self._mode = known["mode"]
                self._count(Usage(known["prompt_tokens"], known["completion_tokens"]))
            if self._mode is None:
                self._mode = await self._probe()
                took = {"prompt_tokens": self.total.prompt_tokens, "completion_tokens": self.total.completion_tokens}
                self.log.add_note(key, mode=self._mode, **took)
                say(f"{self.spec.model}: answers as {self._mode.replace('_', ' ')}")
            return self._mode

    def halt(self, stop: JudgeStoppedError) -> None:
        """Send nothing any more: whoever asks gets `stop` raised. What is under way is still answered and written down."""
        self._stopped = self._stopped or stop

    def cost(self) -> dict[str, Any]:
        """What the answers of this run took, those from the log included; `usd` is None where the price is unknown."""
        return {
            "judge": self.spec.model,
            "base_url": self.spec.base_url,
            "answers_asked": self.num_asked,
            "answers_cached": self.num_cached,
            "requests": self.num_requests,
            "throttled": self.pace.num_throttled,
            "prompt_tokens": self.total.prompt_tokens,
            "completion_tokens": self.total.completion_tokens,
            "tokens_estimated": self.total.estimated,
            "usd": self.spec.usd(self.total.prompt_tokens, self.total.completion_tokens),
        }

    async def close(self) -> None:
        """Wait for what is under way, then close connections and log."""
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)
        await self._endpoint.close()
        self.log.close()

    async def _ask(self, key: str, question: Question) -> Reply:
        usage = Usage()
        mode = await self.prepare()
        try:
            reply = await self._converse(question, mode, usage)
        except DeclinedError as fault:
            reply = self._reply("refused" if fault.by_filter else "api_error", usage, fault.reason)
        except TransientError as fault:
            self._unanswered += 1
            if fault.unreachable or self._unanswered >= _DOWN_AFTER:
                self._stop(JudgeStoppedError(f"{self.spec.model} at {self.spec.base_url} does not answer: {fault.reason}. Answers so far are kept: start it, or pass another --judging.judges, and run the same command."))  # fmt: skip
            reply = self._reply("api_error", usage, f"{fault.reason}, {usage.requests} times")
        self.num_asked += 1
        self.log.add(key, reply, kind=question.kind)
        self._met.add(key)
        return reply

    async def _converse(self, question: Question, mode: str, usage: Usage) -> Reply:
        """The first answer, and where it does not fit a second one that is told why."""
        messages = [{"role": "system", "content": question.system}, {"role": "user", "content": question.user}]
        for turn in (1, 2):
            done = await self._answer(
                messages=messages,
                max_tokens=question.max_tokens,
                response_format=format_of(question, mode),
                usage=usage,
                fits=lambda text: parse(text, question.form).answer is not None,
            )
            if done.refusal or done.finish == "content_filter":
                return self._reply("refused", usage, done.refusal[:200] or "the server's filter", done.text)
            parsed = parse(done.text, question.form)
            if parsed.answer is not None:
                return self._reply("ok", usage, "", done.text, parsed.answer)
            if done.is_cut:
                return self._reply("truncated", usage, _why_cut(done, parsed.reason), done.text)
            if parsed.status == "refused" or turn == 2:
                break
            repair = f"That could not be read ({parsed.reason}). Give the answer again in exactly the form asked for, and nothing else."  # fmt: skip
            messages += [
                {"role": "assistant", "content": done.answer or "(nothing)"},
                {"role": "user", "content": repair},
            ]
        return self._reply(parsed.status, usage, parsed.reason, done.text)

    async def _answer(
        self, messages: Messages, max_tokens: int, response_format: Mapping[str, Any] | None, usage: Usage,
        fits: Callable[[str], bool], tries: int = _MAX_FAILED,
    ) -> Completion:  # fmt: skip
        """One answer, asked for again with more room while the model has spent it on thinking. Raises as Endpoint.send."""
        done, tried, room = None, 0, self._room.first(max_tokens)
        while True:
            try:
                done = await self._request(messages, room, response_format, usage, tries)
            except DeclinedError as fault:
                narrower = self._room.narrower(room, tried or max_tokens) if fault.by_room else room
                if narrower not in (room, tried):
                    room = narrower
                    continue
                if done is None:
                    raise
                return done
            wants_more = done.is_cut and (done.thought or not done.answer) and not fits(done.answer)
            if not wants_more or (wider := self._room.wider(room)) is None:
                return done
            tried, room = room, wider

    async def _request(
        self, messages: Messages, max_tokens: int, response_format: Mapping[str, Any] | None, usage: Usage, tries: int = _MAX_FAILED
    ) -> Completion:  # fmt: skip
        """One answer from the server, however many requests that takes. Raises as Endpoint.send."""
        # Bytes, since a character of some scripts is a token or more.
        guess = int(sum(len(one["content"].encode()) for one in messages) / _BYTES_PER_TOKEN) + 8 * len(messages)
        failed = throttled = 0
        while True:
            async with self.pace:
                if self._stopped is not None:
                    raise self._stopped
                ticket = await self._reserve(guess, max_tokens)
                sent = time.monotonic()
                usage.requests += 1
                self.num_requests += 1
                try:
                    done = await self._endpoint.send(messages, max_tokens, response_format)
                except TransientError as fault:
                    failed, throttled = failed + (not fault.throttled), throttled + fault.throttled
                    wait = self._wait(fault, failed + throttled)
                    if fault.throttled:
                        self.pace.throttled(sent, wait)
                    if failed >= tries or throttled >= _MAX_THROTTLED:
                        raise
                except JudgeStoppedError as stop:
                    self._stop(stop)
                else:
                    self.pace.succeeded()
                    self._unanswered = 0
                    took = Usage(
                        guess if done.prompt_tokens is None else done.prompt_tokens,
                        len(done.text) // 3 if done.completion_tokens is None else done.completion_tokens,
                        done.prompt_tokens is None or done.completion_tokens is None,
                    )
                    usage.add(took)
                    self._count(took)
                    return done
                finally:
                    self.budget.release(ticket)
            await asyncio.sleep(wait)

    def _wait(self, fault: TransientError, failures: int) -> float:
        wait: float = min(_MAX_BACKOFF, self.backoff * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
        if fault.wait is not None:
            if fault.wait > self.judging.max_wait:
                self._stop(JudgeStoppedError(f"{self.spec.model} at {self.spec.base_url} asks to wait {fault.wait:,.0f} s. Answers are kept: run the same command then, or raise --judging.max-wait."))  # fmt: skip
            # Not all at the same moment, and not before.
            wait = fault.wait + min(wait, 0.1 * fault.wait)
        return wait

    async def _reserve(self, prompt_tokens: int, completion_tokens: int) -> int:
        try:
            return await self.budget.reserve(self.spec, prompt_tokens, completion_tokens)
        except JudgeStoppedError as stop:
            self._stop(stop)

    def _stop(self, stop: JudgeStoppedError) -> NoReturn:
        self.halt(stop)
        raise self._stopped or stop

    def _count(self, took: Usage) -> None:
        self.total.add(took)
        self.budget.spend(self.spec, took.prompt_tokens, took.completion_tokens)

    def _reply(self, status: Status, usage: Usage, reason: str, text: str = "", answer: Mapping[str, Any] | None = None) -> Reply:  # fmt: skip
        return Reply(status=status, answer=answer, reason=reason, text=text, prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens, estimated=usage.estimated, requests=usage.requests)  # fmt: skip

    async def _probe(self) -> str:
        usage = Usage()
        messages = [{"role": "user", "content": PROBE}]
        for mode in FORMATS:
            try:
                done = await self._answer(
                    messages=messages,
                    max_tokens=_PROBE_TOKENS,
                    response_format=probe_format(mode),
                    usage=usage,
                    fits=bool,
                    tries=_MAX_FAILED_AT_FIRST,
                )
            except DeclinedError:
                continue
            except TransientError as fault:
                self._stop(JudgeStoppedError(f"{self.spec.model} at {self.spec.base_url} does not answer: {fault.reason}. Start it, or pass another --judging.judges."))  # fmt: skip
            if self._endpoint.dialect.takes("response_format") and done.answer.startswith("{"):
                return mode
            self._endpoint.dialect.try_again("response_format")
        return PLAIN


def _why_cut(done: Completion, reason: str) -> str:
    if done.answer and not done.thought:
        return f"cut by its number of tokens: {reason}"
    return f"thinking left no room for the answer ({reason}). Pass --judging.reasoning-effort low, or more --judging.max-answer-tokens"  # fmt: skip


def open_judges(judging: Judging, backoff: float = 0.5) -> list[Judge]:
    """The judges of the settings, sharing one budget. Raises UserError for a key that is not there."""
    budget = Budget(judging.max_tokens_total, judging.max_usd)
    specs = judging.specs()
    keys = [judging.key_of(spec) for spec in specs]
    folder = cache_root() / "judges"
    return [
        Judge(spec=spec, key=key, judging=judging, budget=budget, log=AnswerLog(folder, spec), backoff=backoff)
        for spec, key in zip(specs, keys, strict=True)
    ]

"""One model that is served: requests' answers are encoded, read by the engine, and rewarded under the heads that were asked for."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sarm.data.sources.conversations import ConversationError
from sarm.data.tokens.written_turns import ForeignTextError
from sarm.serve.batching import Read
from sarm.serve.drift_account import Account
from sarm.serve.encoding import Encoded, Encoder
from sarm.serve.engine import Engine, EngineError, OverloadedError, Tokenised
from sarm.serve.faults import RequestError
from sarm.serve.heads import BASE, Heads
from sarm.serve.metrics import Metrics
from sarm.serve.names import Names
from sarm.serve.variant_routes import Variants
from sarm.serve.watched_answers import Origin, Seen

_ENCODING_THREADS = 2
OnTruncated = Literal["close", "refuse", "penalise"]


@dataclass(frozen=True)
class About:
    """What a response says of the model. Rewards under another `identity` are not comparable."""

    name: str
    identity: str
    template: str
    tokenizer: str
    protocol: int
    reward_mean: float
    reward_std: float
    penalty: float
    """The raw reward of an answer that was cut off, where such answers are penalised and no other is asked for."""
    max_length: int
    feature_edits: tuple[dict[str, Any], ...] = ()
    """`{layer, features, of}` of each edit of features inside the model: how many, and whether the `model` has it or the `server` was given it."""

    def as_json(self) -> dict[str, Any]:
        """What clients compare."""
        own = ("name", "identity", "template", "tokenizer", "protocol")
        return {name: getattr(self, name) for name in own}


class Answer(NamedTuple):
    """An answer as it was encoded and read; `read` is None where it is penalised unread, or `error` says why it has no reward."""

    encoded: Encoded | None
    read: Read | None
    error: RequestError | None = None
    penalty: float | None = None
    """In the request's scale."""


Encoding = Callable[[Encoder], list[Encoded]]


class Service:
    """A model, its heads and its queue. `on_truncated` is the server's default."""

    def __init__(
        self,
        engine: Engine,
        encoder: Encoder,
        heads: Heads,
        variants: Variants,
        about: About,
        metrics: Metrics,
        names: Names,
        account: Account,
        on_truncated: OnTruncated = "close",
    ):
        self.engine, self.encoder, self.heads, self.about, self.metrics = engine, encoder, heads, about, metrics
        self.variants, self.on_truncated, self.names, self.account = variants, on_truncated, names, account
        self.ready_seconds = 0.0
        """From the weights being read to the first answer."""
        self._pool = ThreadPoolExecutor(_ENCODING_THREADS, thread_name_prefix="encoder")

    def close(self) -> None:
        """End its threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.engine.stop()
        self.account.close()

    def check_variants(self, names: Sequence[str]) -> None:
        """Raise RequestError for a head that is not there."""
        self.variants.look(names)
        for name in names:
            if name not in self.heads.names:
                raise RequestError(404, "unknown_variant", f"there is no such variant; known are {', '.join(self.heads.names)}")  # fmt: skip

    async def answers(
        self,
        encodings: Sequence[Encoding],
        *,
        scale: str = "standardised",
        on_truncated: OnTruncated | float | None = None,
        refuse_long: bool = False,
        partial: bool = False,
        timeout: float | None = None,
        origin: Origin | None = None,
        ids: Sequence[str | int | None] = (),
    ) -> list[list[Answer]]:
        """The answers of each item, in order. `on_truncated` may be a fixed reward, in the request's scale.

        `origin` says where they come from, for the watch, and `ids` name the items, so that what is sent again is counted once.

        Raises RequestError for the first item that is refused or fails, unless the request takes partial answers, and OverloadedError.
        """
        rule = self.on_truncated if on_truncated is None else on_truncated
        loop = asyncio.get_running_loop()
        encoded = await loop.run_in_executor(self._pool, self._encode, encodings, rule == "refuse", refuse_long)
        if not partial:
            _raise_first(encoded)
        penalty = self._penalty(rule, scale)
        found: list[list[Answer]] = []
        wanted: list[tuple[int, int]] = []
        for item, own in enumerate(encoded):
            if isinstance(own, RequestError):
                found.append([Answer(None, None, own)])
                continue
            found.append([Answer(one, None, None, penalty if one.is_truncated else None) for one in own])
            wanted += [(item, place) for place, one in enumerate(found[-1]) if one.penalty is None]
        asked = [found[item][place].encoded for item, place in wanted]
        try:
            futures = self.engine.submit(
                [Tokenised(one.ids, one.prompt_tokens, one.beginnings) for one in asked if one], timeout
            )
        except EngineError as error:
            raise _of_engine(error) from error
        reads = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        for (item, place), read in zip(wanted, reads, strict=True):
            if isinstance(read, Read):
                found[item][place] = found[item][place]._replace(read=read)
            elif isinstance(read, EngineError):
                failure = _of_engine(read, item)
                if not partial:
                    raise failure
                found[item][place] = found[item][place]._replace(error=failure)
            elif isinstance(read, BaseException):
                raise read
        self._note(found)
        if origin is not None:
            self._show(found, origin, ids)
        return found

    def value(self, answer: Answer, variant: str, scale: str) -> float:
        """The reward of an answer that has one."""
        if answer.penalty is not None:
            return answer.penalty
        assert answer.read is not None
        # It may have been deleted meanwhile.
        self.check_variants([variant])
        return self.scaled(self.heads.reward(variant, answer.read.reading), scale)

    def scaled(self, raw: float, scale: str) -> float:
        """A raw reward in a scale."""
        return raw if scale == "raw" else (raw - self.about.reward_mean) / self.about.reward_std

    def _penalty(self, rule: OnTruncated | float, scale: str) -> float | None:
        if rule == "penalise":
            return self.scaled(self.about.penalty, scale)
        return None if isinstance(rule, str) else float(rule)

    def _encode(
        self, encodings: Sequence[Encoding], refuse_truncated: bool, refuse_long: bool
    ) -> list[list[Encoded] | RequestError]:
        found: list[list[Encoded] | RequestError] = []
        for item, encoding in enumerate(encodings):
            try:
                own = encoding(self.encoder)
                if refuse_truncated and any(one.is_truncated for one in own):
                    raise ConversationError("the answer was cut off before its end of turn. Send it whole, or ask for close or penalise.", "truncated")  # fmt: skip
                if refuse_long and any(one.is_cut for one in own):
                    raise ConversationError(f"the conversation has more than {self.about.max_length} tokens.", "too_long")  # fmt: skip
                found.append(own)
            except ForeignTextError as error:
                # It quotes the text.
                message = "the text is not in a template that this server reads"
                found.append(RequestError(422, error.reason, message, item=item, detail=str(error)))
            except ConversationError as error:
                message = f"the conversation cannot be encoded ({error.reason})"
                found.append(RequestError(422, error.reason, message, item=item, detail=str(error)))
        return found

    def _show(self, found: Sequence[Sequence[Answer]], origin: Origin, ids: Sequence[str | int | None]) -> None:
        """Let the watch see the answers that were read."""
        seen = []
        for place, own in enumerate(found):
            name = ids[place] if place < len(ids) else None
            for number, answer in enumerate(own):
                if answer.encoded is not None and answer.read is not None:
                    of_answer = None if name is None else f"{name}/{number}"
                    seen.append(Seen(of_answer, answer.encoded, answer.read.reading))
        self.account.note(origin, seen)

    def _note(self, found: Sequence[Sequence[Answer]]) -> None:
        for own in found:
            for answer in own:
                if answer.encoded is None:
                    continue
                flags = [*answer.encoded.flags, *(["truncated"] if answer.encoded.is_truncated else [])]
                self.metrics.note_flags([*flags, *(["cut"] if answer.encoded.is_cut else [])])
                if answer.read is not None:
                    self.metrics.note_reward(self.value(answer, BASE, "standardised"), answer.read)


def _raise_first(encoded: Sequence[list[Encoded] | RequestError]) -> None:
    for one in encoded:
        if isinstance(one, RequestError):
            raise one


def _of_engine(error: EngineError, item: int | None = None) -> RequestError:
    if error.is_memory:
        return RequestError(503, "out_of_memory", str(error), item=item, retry_after=1.0)
    return RequestError(500, "engine_failed", str(error), item=item)


def overloaded(error: OverloadedError, status: int) -> RequestError:
    """What an overload is answered with under a protocol's status."""
    return RequestError(status, "overloaded", f"{error}, longer than answers are held", retry_after=error.seconds)

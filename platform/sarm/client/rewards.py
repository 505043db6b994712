"""Rewards by whatever answers `POST /v1/rewards`: a server, or the model in this process. Synchronous and asynchronous.

Items are written as the route takes them: `{"prompt": [message, ...], "completions": [text, ...], "finish": ["stop" or "length", ...]}`,
`{"messages": [message, ...]}`, `{"text": rendered}` or `{"input_ids": [id, ...]}`.
"""

import abc
import asyncio
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

Item = Mapping[str, Any]
Message = Mapping[str, Any]
Body = dict[str, Any]
# Answers of one request, and requests that are under way at a time.
_ANSWERS, _AT_ONCE = 64, 8


class RewardError(Exception):
    """A request that got no rewards. `status` is None where no server answered; `item` is the place of the item that was refused."""

    def __init__(self, message: str, *, status: int | None = None, code: str = "", item: int | None = None):
        super().__init__(message)
        self.status, self.code, self.item = status, code, item


@dataclass(frozen=True)
class Answer:
    """One answer's reward under the first variant that was asked for, under each of them, and what is to be known of it."""

    reward: float
    variants: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    is_cut: bool = False
    """Whether its beginning was lost to the model's length."""
    is_truncated: bool = False
    """Whether it ended before its end of turn."""
    flags: tuple[str, ...] = ()
    explanation: dict[str, Any] | None = None
    """`features` with id, weight, activation and contribution, `rest` and `sum`, in raw reward; where it was asked for."""


class Rewards(abc.ABC):
    """What both clients share. Each request says which model it expects, once the first answer has said which it is.

    `variants`, `scale` ("standardised" or "raw") and `on_truncated` are sent with every request, and so is `explain`, the number of latents
    that are named, where it is not 0; `run` and `split` say to the server's watch whose answers they are. With `expect_identity` "", the first answer's identity is expected of all that follow.
    """

    def __init__(
        self,
        *,
        variants: Sequence[str] = ("base",),
        scale: str = "standardised",
        explain: int = 0,
        features: Sequence[int] = (),
        on_truncated: Any = None,
        expect_identity: str | None = "",
        run: str = "",
        split: str = "",
    ):
        self._expected = expect_identity
        self._options: Body = {"variants": list(variants), "scale": scale}
        self._options |= {name: value for name, value in (("run", run), ("split", split)) if value}
        if explain or features:
            self._options["explain"] = {"top": explain, "features": list(features)}
        if on_truncated is not None:
            self._options["on_truncated"] = on_truncated

    @property
    def identity(self) -> str | None:
        """Of the model that answered first, or that is expected; None if nothing is expected."""
        return self._expected or None

    def rewards(self, items: Sequence[Item], step: int | None = None) -> list[list[Answer]]:
        """The answers of every item, in the order of the items and of their completions. Raises RewardError.

        `step` is that of the training run, for the server's watch.
        """

        def one(own: dict[str, Body]) -> dict[str, list[Answer]]:
            return self._read(own, self._send(self._body(own, step)))

        parts = list(_parts(items))
        # The first alone: it says which model the others expect.
        first = [one(own) for own in parts[:1]]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return _in_order(items, [*first, *pool.map(one, parts[1:])])

    async def arewards(self, items: Sequence[Item], step: int | None = None) -> list[list[Answer]]:
        """`rewards`, without holding up the loop."""
        limit = asyncio.Semaphore(_AT_ONCE)

        async def one(own: dict[str, Body]) -> dict[str, list[Answer]]:
            async with limit:
                return self._read(own, await self._asend(self._body(own, step)))

        parts = list(_parts(items))
        first = [await one(own) for own in parts[:1]]
        return _in_order(items, [*first, *await asyncio.gather(*map(one, parts[1:]))])

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """The reward of each conversation, which ends with the assistant's message. Raises RewardError."""
        return [answers[0].reward for answers in self.rewards([{"messages": list(one)} for one in conversations])]

    async def ascore(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """`score`, without holding up the loop."""
        found = await self.arewards([{"messages": list(one)} for one in conversations])
        return [answers[0].reward for answers in found]

    @abc.abstractmethod
    def _send(self, body: Body) -> Body:
        """What `/v1/rewards` answers. Raises RewardError."""

    @abc.abstractmethod
    async def _asend(self, body: Body) -> Body:
        """The same."""

    def _body(self, items: Mapping[str, Body], step: int | None) -> Body:
        expected: Body = {"expect_identity": self._expected} if self._expected else {}
        of_step = {} if step is None else {"step": step}
        return {**self._options, **expected, **of_step, "items": list(items.values())}

    def _read(self, asked: Mapping[str, Body], found: Body) -> dict[str, list[Answer]]:
        if self._expected == "":
            self._expected = found["model"]["identity"]
        by_id = {one["id"]: one["answers"] for one in found["items"]}
        if by_id.keys() != asked.keys() or len(found["items"]) != len(asked):
            raise RewardError("the server answered other items than it was asked for", code="other_items")
        return {name: [_answer(one) for one in by_id[name]] for name in asked}


def _parts(items: Sequence[Item]) -> Iterator[dict[str, Body]]:
    """The items in requests, each under an id of its own."""
    own: dict[str, Body] = {}
    num = 0
    for item in items:
        size = len(item.get("completions") or [0])
        if own and num + size > _ANSWERS:
            yield own
            own, num = {}, 0
        name = uuid.uuid4().hex
        own[name] = {**item, "id": name}
        num += size
    if own:
        yield own


def _in_order(items: Sequence[Item], found: Sequence[Mapping[str, list[Answer]]]) -> list[list[Answer]]:
    answers = [one for own in found for one in own.values()]
    for item, own in zip(items, answers, strict=True):
        if len(own) != len(item.get("completions") or [0]):
            raise RewardError(f"the server gave {len(own)} answers to an item", code="other_items")
    return answers


def _answer(found: Mapping[str, Any]) -> Answer:
    return Answer(
        reward=found["reward"],
        variants=found["variants"],
        tokens=found["tokens"],
        is_cut=found["cut"],
        is_truncated=found["truncated"],
        flags=tuple(found["flags"]),
        explanation=found.get("explanation"),
    )

"""A text that a chat template wrote, read back into the messages that it was made of.

Probes with words of their own show what the template writes before, between and behind contents. A text is split at these pieces, and its
messages are rendered again: unless that gives the text, up to white space, BOS and today's date, it is in another template. What an answer
holds is content, whatever it spells: it ends where a turn of the user's or a tool's begins, or where the text does.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sarm.data.sources.conversations import ConversationError, Message
from sarm.data.tokens.templates import FIXED_DATE

Apply = Callable[[Sequence[Message], bool], str]

_SYSTEM, _ASKED, _ANSWER, _AGAIN, _LAST = "Sv5s", "Qz7q", "Az9a", "Qw8q", "Aw6a"
_DATE = r"\d{1,2} [A-Z][a-z]{2} \d{4}"
# Who may speak between two answers.
_BETWEEN = ("user", "tool")
_SHOWN = 40


class Read(NamedTuple):
    """The messages of a text, the last of them the answer, and whether the answer had its end of turn."""

    messages: list[Message]
    is_closed: bool


class ForeignTextError(ConversationError):
    """A text that is in another template than the one that was asked to read it."""

    def __init__(self, message: str):
        super().__init__(message, "foreign_template")


class _Joints(NamedTuple):
    """What stands before a content of the role's behind an answer, and between it and the answer that follows."""

    before: re.Pattern[str]
    opening: re.Pattern[str]


class _Head(NamedTuple):
    """What a conversation begins with, up to its first content, and the role of that."""

    text: str
    pattern: re.Pattern[str]
    role: str


class WrittenTurns:
    """What a template writes around contents.

    `apply` renders turns, and with True behind them the opening of an answer. `ends` are the tokens with which an answer may end; `bos` may
    stand before a text or not.
    """

    def __init__(self, apply: Apply, ends: Sequence[str], bos: str | None):
        self._apply, self._ends, self._bos = apply, [end for end in dict.fromkeys(ends) if end.strip()], bos
        self._heads: list[_Head] = []
        self._joints: dict[str, _Joints] = {}
        self._extra, self._of_system = "", re.compile("")
        try:
            self._probe()
        except ConversationError:
            # Then no text is known for the template's own.
            self._joints = {}

    def read(self, text: str, prompt: str | None = None) -> Read:
        """The messages of a text; where the rendered `prompt` is known, what follows it is the answer.

        Raises ForeignTextError for a text in another template, or in none, and for one that holds no answer.
        """
        # A prompt may hold the beginning of an answer, as where reasoning is opened for it.
        messages, start = self._split_prompt(text, prompt) or self._split(text)
        answer, is_closed = self._without_end(text[start:])
        return Read([*messages, {"role": "assistant", "content": self._without_extra(answer)}], is_closed)

    def without_end(self, answer: str) -> str:
        """The text of an answer without its end of turn, if it has one."""
        return self._without_end(answer)[0]

    def _split_prompt(self, text: str, prompt: str | None) -> tuple[list[Message], int] | None:
        """`_split` of the prompt, if that is known, a part of the text, and in the template."""
        if not prompt or not text.startswith(prompt):
            return None
        try:
            return self._split(prompt)
        except ForeignTextError:
            return None

    def _split(self, text: str) -> tuple[list[Message], int]:
        """The messages before the answer, and where the answer begins."""
        if not self._joints:
            raise ForeignTextError("the template does not show where answers begin, so texts cannot be read back. Send messages.")  # fmt: skip
        head, place = self._begin(text)
        behind_head, messages = place, list[Message]()
        if head.role == "system":
            messages.append({"role": "system", "content": text[place : (found := self._next(self._of_system, text, place)).start()]})  # fmt: skip
            place = found.end()
        role = "user"
        while True:
            found = self._next(self._joints[role].opening, text, place)
            messages.append({"role": role, "content": text[place : found.start()]})
            start = found.end()
            following = {other: joints.before.search(text, start) for other, joints in self._joints.items()}
            turns = [(one.start(), one.end(), other) for other, one in following.items() if one is not None]
            if not turns:
                break
            end, place, role = min(turns)
            messages.append({"role": "assistant", "content": self._without_extra(text[start:end])})
        self._check(head.text + text[behind_head:start], messages)
        return messages, start

    def _begin(self, text: str) -> tuple[_Head, int]:
        for head in self._heads:
            if found := head.pattern.match(text):
                return head, found.end()
        raise _foreign(text, self._heads[0].text, 0)

    def _next(self, joint: re.Pattern[str], text: str, place: int) -> re.Match[str]:
        found = joint.search(text, place)
        if found is None:
            raise ForeignTextError(f"the text is not in this model's template, or holds no answer: behind character {place} its template opens none. Send messages, or name the tokenizer whose template it is.")  # fmt: skip
        return found

    def _check(self, written: str, messages: list[Message]) -> None:
        """Raise ForeignTextError unless the template writes these messages as they stand in the text."""
        try:
            again = self._apply([*messages, {"role": "assistant", "content": _LAST}], False)
        except ConversationError as error:
            raise ForeignTextError(str(error)) from error
        found = _squeezed(again[: again.rfind(_LAST)])
        if found.removesuffix(_squeezed(self._extra)) != _squeezed(written):
            raise ForeignTextError("the template writes these messages in another way. Send messages, or name the tokenizer whose template it is.")  # fmt: skip

    def _without_extra(self, answer: str) -> str:
        """Without the white space that the template writes before every answer."""
        return answer.removeprefix(self._extra) if self._extra.isspace() else answer

    def _without_end(self, answer: str) -> tuple[str, bool]:
        rest, is_closed = answer, False
        while end := next((one for one in self._ends if rest.rstrip().endswith(one)), None):
            rest, is_closed = rest.rstrip().removesuffix(end), True
        return (rest if is_closed else answer), is_closed

    def _probe(self) -> None:
        turns = [("user", _ASKED), ("assistant", _ANSWER), ("user", _AGAIN), ("assistant", _LAST)]
        head, first, before, last, _ = self._pieces(turns)
        offered = self._apply(_messages(turns[:1]), True).partition(_ASKED)[2]
        opening = _common(_common(first, last), offered or first)
        if not opening.strip() or not before.strip():
            return
        self._extra = last[len(opening) :]
        self._add_head(head, "user")
        self._joints["user"] = _Joints(_pattern(before), _pattern(opening))
        for role in _BETWEEN[1:]:
            try:
                _, _, other, last, _ = self._pieces([*turns[:2], (role, _AGAIN), turns[3]])
            except ConversationError:
                continue
            opening = last.removesuffix(self._extra) if self._extra else last
            if other.strip() and opening.strip() and other != before:
                self._joints[role] = _Joints(_pattern(other), _pattern(opening))
        try:
            head, behind, *_ = self._pieces([("system", _SYSTEM), *turns])
        except ConversationError:
            return
        self._of_system = _pattern(behind)
        self._add_head(head, "system")

    def _add_head(self, head: str, role: str) -> None:
        bare = head.removeprefix(self._bos) if self._bos else head
        optional = "" if bare == head else f"(?:{re.escape(self._bos or '')})?"
        pattern = re.compile(rf"\s*{optional}\s*{_pattern(bare).pattern}")
        self._heads.append(_Head(head, pattern, role))
        # The longest that fits: a default system text is the head of a conversation without one.
        self._heads.sort(key=lambda one: -len(one.text))

    def _pieces(self, turns: Sequence[tuple[str, str]]) -> list[str]:
        """What is written before, between and behind the contents of these turns."""
        rest, pieces = self._apply(_messages(turns), False), list[str]()
        for _, content in turns:
            piece, found, rest = rest.partition(content)
            if not found:
                raise ConversationError("the template does not write what it is given")
            pieces.append(piece)
        return [*pieces, rest]


def _messages(turns: Sequence[tuple[str, str]]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]


def _pattern(joint: str) -> re.Pattern[str]:
    """The joint with any white space where it has some, its own at the ends if it is there, and any date for today's."""
    core = joint.strip()
    before, behind = joint[: joint.index(core)], joint[joint.index(core) + len(core) :]
    ends = [f"(?:{re.escape(end)})?" if end else "" for end in (before, behind)]
    written = r"\s*".join(re.escape(part) for part in core.split())
    date = r"\s*".join(re.escape(part) for part in FIXED_DATE.split())
    return re.compile(ends[0] + written.replace(date, _DATE) + ends[1])


def _foreign(text: str, expected: str, place: int) -> ForeignTextError:
    same = len(_common(text[place:], expected))
    wanted, got = (one[:_SHOWN] for one in (expected[same:], text[place + same :]))
    return ForeignTextError(f"the text is not in this model's template: expected {wanted!r} from character {place + same} on, got {got!r}. Send messages, or name the tokenizer whose template it is.")  # fmt: skip


def _common(a: str, b: str) -> str:
    length = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


def _squeezed(text: str) -> str:
    return "".join(text.split())

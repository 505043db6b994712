"""Where answers could have ended, and documents as answers.

The rewarded token has an activation behind every beginning of an answer. It is taken at the answer's end, behind its sentences and, where
asked for, behind some of its words. A document becomes an answer: of half of them the first sentence is what the user says.
"""

import random
from functools import cached_property
from typing import NamedTuple

from sarm.contracts.tables import SENTENCE, WORD
from sarm.data.sources.conversations import Message
from sarm.data.tokens.chat import ChatTokenizer, Tokens
from sarm.data.tokens.control_tokens import Span
from sarm.data.tokens.sentences import SPLITTERS, sentence_end_tokens
from sarm.data.tokens.windows import num_tokens

# A longer first sentence is no message that a user would write.
_MAX_ASKED = 250
# What a user may have said before any text; none of them has anything to do with it.
REQUESTS = (
    "Please continue.",
    "Tell me something interesting.",
    "Write a short passage.",
    "Can you explain this?",
    "What do you know about it?",
    "Go on.",
    "Give me some background.",
    "What happened?",
)


class Turn(NamedTuple):
    """An answer, and the messages before it."""

    prompt: list[Message]
    answer: str


class AnswerEnds:
    """Which tokens of answers end turns: the rules of an extraction under one tokenizer."""

    def __init__(self, chat: ChatTokenizer, splitter: str, word_share: float | None):
        self._chat, self._splitter, self._word_share = chat, splitter, word_share or 0.0

    def branches(self, answer: str, tokens: Tokens, seed: str) -> dict[int, str]:
        """Kind of the end behind each token of the answer that has one, by column; the answer's own end is none of them.

        `tokens` are those of the conversation, with offsets. Which words are taken follows from `seed` alone.
        """
        offsets = tokens.offsets
        # Behind the last of the answer stands its own end.
        stop = len(tokens.ids) - len(self._chat.closing_ids) - 1
        sentences = sentence_end_tokens(SPLITTERS[self._splitter](answer), offsets)
        kinds = dict.fromkeys((column for column in sentences if column < stop), SENTENCE)
        if self._word_share:
            chance = random.Random(f"words of {seed}")
            words = [column for column in range(stop) if _ends_word(answer, offsets[column], offsets[column + 1])]
            chosen = [column for column in words if chance.random() < self._word_share]
            kinds |= dict.fromkeys((column for column in chosen if column not in kinds), WORD)
        return dict(sorted(kinds.items()))

    def turns(self, text: str, seed: str) -> list[Turn]:
        """A document as answers that fit the tokenizer's `max_length` wherever its sentences do.

        Which of them answer their own first sentence, and what the others answer, follows from `seed` alone.
        """
        return [self._turn(piece, f"{seed}:{number}") for number, piece in enumerate(self._pieces(text))]

    def _turn(self, text: str, seed: str) -> Turn:
        chance = random.Random(f"request of {seed}")
        answers_itself, number = chance.random() < 0.5, int(chance.random() * len(REQUESTS))
        first = next(iter(SPLITTERS[self._splitter](text)), len(text))
        rest = text[first + 1 :].strip()
        if answers_itself and first < _MAX_ASKED and rest:
            return Turn(_asked(text[: first + 1].strip()), rest)
        return Turn(_asked(REQUESTS[number]), text)

    def _pieces(self, text: str) -> list[str]:
        """The text, or as many sentences of it at a time as there is room for."""
        # No token is less than a byte.
        if len(text.encode()) <= self._room or num_tokens([text], self._chat)[0] <= self._room:
            return [text]
        stops = [*(end + 1 for end in SPLITTERS[self._splitter](text)), len(text)]
        starts = [0, *stops[:-1]]
        sizes = num_tokens([text[start:stop] for start, stop in zip(starts, stops, strict=True)], self._chat)
        pieces, begin, size = [], 0, 0
        for start, tokens in zip(starts, sizes, strict=True):
            if size and size + tokens > self._room:
                pieces.append(text[begin:start])
                begin, size = start, 0
            size += tokens
        return [piece for piece in (*pieces, text[begin:]) if piece.strip()]

    @cached_property
    def _room(self) -> int:
        """Tokens that an answer may have behind any of the requests."""
        longest = max(len(self._chat.encode_responses(_asked(request), ["."])[0].ids) for request in REQUESTS)
        return max(1, self._chat.max_length - longest)


def _asked(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def _ends_word(text: str, span: Span, following: Span) -> bool:
    """Whether a word ends with the last character of the span, of which the following token has no part."""
    start, stop = span
    is_whole = following[0] >= stop or following[0] == following[1]
    return is_whole and start < stop and text[stop - 1].isalnum() and not text[stop : stop + 1].isalnum()

"""From what a request sends to token ids: messages, texts and ids become answers that end in their rewarded token.

Contents are text: what they spell is never a control token, and is flagged. An answer that was cut off before its end of turn is closed,
refused or penalised, and flagged. A text has to be in the model's template, or in that of the policy whose tokenizer was given.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from sarm.data.sources.conversations import ConversationError, Message, fault_of_content
from sarm.data.sources.tool_turns import ToolFault, more_of, texts_in
from sarm.data.tokens.beginnings import Beginnings, beginnings_of
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.written_turns import ForeignTextError, Read
from sarm.nn.modeling_sarm import SarmForSequenceClassification

Foreign = Literal["refuse", "warn"]

SPELLED, TEMPLATED, FOREIGN, UNOPENED, UNSCORED = (
    "special_tokens_in_content", "already_templated", "foreign_template", "no_answer_opened", "text_behind_answer",
)  # fmt: skip
"""Flags of an answer."""
# Of a longer content the beginning is dropped before it is encoded: no text in use has so many characters a token.
_CHARACTERS_PER_TOKEN = 64


class Encoded(NamedTuple):
    """An answer as the engine reads it, and what is to be said of it."""

    ids: list[int]
    prompt_tokens: int
    is_cut: bool
    """Whether its beginning was lost to `max_length`."""
    is_truncated: bool
    """Whether it had no end of turn."""
    flags: tuple[str, ...]
    beginnings: Beginnings | None = None
    """Of the answer, where they are read too."""


class Encoder:
    """Encodes what requests send for one model. May be called from several threads.

    `policy` reads texts that are not in the model's own template. `on_foreign` says what happens with texts that neither reads: "refuse", or
    "warn" where the prompt is known, which scores prompt and answer as what a user and an assistant say.
    """

    def __init__(
        self,
        chat: ChatTokenizer,
        model: SarmForSequenceClassification,
        policy: ChatTokenizer | None = None,
        on_foreign: Foreign = "refuse",
    ):
        self._chat, self._model, self._policy, self._on_foreign = chat, model, policy, on_foreign
        self._opening = tuple(chat.opening_ids)

    def completions(
        self, prompt: Sequence[Message], completions: Sequence[str], truncated: Sequence[bool] | None = None
    ) -> list[Encoded]:
        """Answers to one prompt; `truncated` says which of them ran into their limit.

        Raises ConversationError for what is no conversation, or cannot be encoded.
        """
        if not prompt:
            raise ConversationError("the prompt has no message. Pass at least the user's.", "empty")
        given = list(prompt)
        prompt, shorter = self._shortened(prompt), [self._tail(text) for text in completions]
        tokens = self._chat.encode_responses(prompt, shorter)
        is_shorter = prompt != given or shorter != list(completions)
        if is_shorter and any(not one.num_truncated for one in tokens):
            # A text of such long words that what was dropped would have had room.
            tokens, is_shorter = self._chat.encode_responses(given, list(completions)), False
        of_prompt = self._flags_of_prompt(given)
        cut_off = truncated or [False] * len(completions)
        return [
            Encoded(
                ids=one.ids,
                prompt_tokens=self._prompt_tokens(one.ids),
                is_cut=one.num_truncated > 0,
                is_truncated=is_off,
                flags=tuple(dict.fromkeys([*of_prompt, *self._flags_of([text])])),
            )
            for one, text, is_off in zip(tokens, completions, cut_off, strict=True)
        ]

    def messages(self, messages: Sequence[Message], *, is_truncated: bool = False) -> Encoded:
        """A conversation that ends with the assistant's turn. Raises ConversationError as `completions` does, and for another end."""
        if not messages or messages[-1].get("role") != "assistant":
            last = messages[-1].get("role") if messages else "nothing"
            raise ConversationError(f"the conversation ends with {str(last)[:40]}, expected the assistant's turn, which is what is rewarded.", "no_answer")  # fmt: skip
        content = messages[-1].get("content")
        if content is None and messages[-1].get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise ConversationError("the message of assistant has no text as its content. Pass a string.", "not_text")
        try:
            more = more_of(messages[-1])
        except ToolFault as fault:
            raise ConversationError("the answer has calls or tools that cannot be read. Write them as OpenAI's API does.", str(fault)) from fault  # fmt: skip
        if more.keys() <= {"name"}:
            return self.completions(messages[:-1], [content], [is_truncated])[0]
        # Calls are a part of the answer, which the template alone can write.
        (tokens,) = self._chat.encode([messages])
        flags = dict.fromkeys([*self._flags_of_prompt(messages[:-1]), *self._flags_of([content]), *self._flags_beside(messages[-1:])])  # fmt: skip
        return Encoded(
            tokens.ids, self._prompt_tokens(tokens.ids), tokens.num_truncated > 0, is_truncated, tuple(flags)
        )

    def with_beginnings(self, messages: Sequence[Message]) -> Encoded:
        """The same with the answer's beginnings. Raises as `messages`, and for an answer that has none: one that calls tools or is not read whole."""
        encoded = self.messages(messages)
        if more_of(messages[-1]).keys() - {"name"}:
            raise ConversationError("the answer calls tools, and a card is of an answer's text alone.", "calls")
        (tokens,) = self._chat.encode_responses(messages[:-1], [messages[-1]["content"]], offsets=True)
        found = beginnings_of(tokens)
        if found is None or tokens.ids != encoded.ids:
            raise ConversationError("the answer has no token of its own, or is longer than the model reads.", "no_beginnings")  # fmt: skip
        return encoded._replace(beginnings=found)

    def text(self, text: str, prompt: str | None = None) -> Encoded:
        """A rendered conversation, whose `prompt` may be known.

        Raises ForeignTextError for a text in an unknown template, ConversationError as `messages` does.
        """
        try:
            found = _read(self._chat, text, prompt)
        except ForeignTextError as error:
            if self._policy is not None:
                found = _read(self._policy, text, prompt)
            elif self._on_foreign == "warn" and prompt and text.startswith(prompt):
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text[len(prompt) :]}]
                encoded = self.messages(turns)
                return encoded._replace(flags=tuple(dict.fromkeys([*encoded.flags, FOREIGN])))
            else:
                raise error
        return self.messages(found.messages, is_truncated=not found.is_closed)

    def without_end(self, answer: str) -> str:
        """An answer's text without the end of turn that it may be written with."""
        return (self._policy or self._chat).written.without_end(answer)

    def ids(self, ids: Sequence[int]) -> Encoded:
        """Token ids of a conversation, with the rewarded token where the model itself looks for it.

        Raises ConversationError for ids that the vocabulary lacks, and, where foreign texts are refused, for ids in which no answer is opened.
        """
        rows = self._model.model.get_input_embeddings().weight.shape[0]
        if not ids or not all(0 <= one < rows for one in ids):
            raise ConversationError(f"token ids must be between 0 and {rows - 1}, and at least one.", "bad_ids")
        places = self._model.answer_places(
            torch.tensor([list(ids)]), torch.ones(1, len(ids), dtype=torch.long), "close"
        )
        if places.unopened.item() and self._on_foreign == "refuse":
            raise ForeignTextError("the model's template opens no answer in these token ids. Send the ids of its own template, or messages.")  # fmt: skip
        kept = places.input_ids[0, : int(places.columns.item()) + 1].tolist()
        excess, limit = len(kept) - self._chat.max_length, self._chat.max_length
        if excess > 0:
            start = 1 if self._chat.bos_id is not None and kept[0] == self._chat.bos_id else 0
            kept = [*kept[:start], *kept[len(kept) - limit + start :]]
        flags = [(UNOPENED, places.unopened), (UNSCORED, places.unscored)]
        return Encoded(
            ids=kept,
            prompt_tokens=self._prompt_tokens(kept),
            is_cut=excess > 0,
            is_truncated=bool(places.cut_off.item()),
            flags=tuple(name for name, is_set in flags if is_set.item()),
        )

    def _shortened(self, messages: Sequence[Message]) -> list[Message]:
        return [
            {**message, "content": self._tail(message["content"])}
            if isinstance(message.get("content"), str)
            else message
            for message in messages
        ]

    def _tail(self, text: str) -> str:
        """The end of a text that is far longer than the model can read; what is too large for any reader is left to be refused."""
        limit = _CHARACTERS_PER_TOKEN * self._chat.max_length
        if len(text) <= limit or fault_of_content(text) not in (None, TEMPLATED):
            return text
        found = re.compile(r"\s").search(text, len(text) - limit, len(text) - limit // 2)
        return text[found.start() if found else len(text) - limit :]

    def _prompt_tokens(self, ids: Sequence[int]) -> int:
        """Tokens up to the last opening of an answer, which contents cannot hold."""
        size = len(self._opening)
        for end in range(len(ids) - 1, size - 1, -1) if size else ():
            if ids[end - 1] == self._opening[-1] and tuple(ids[end - size : end]) == self._opening:
                return end
        return 0

    def _flags_of_prompt(self, messages: Sequence[Message]) -> list[str]:
        """Flags of messages that have been checked. Raises ConversationError `already_templated`."""
        found = self._flags_of([message.get("content") or "" for message in messages])
        if TEMPLATED in found and self._on_foreign == "refuse":
            raise ConversationError("a message of the prompt is a conversation in some template already, and would be templated twice. Send its messages.", TEMPLATED)  # fmt: skip
        return list(dict.fromkeys([*found, *self._flags_beside(messages)]))

    def _flags_beside(self, messages: Sequence[Message]) -> list[str]:
        beside = [text for message in messages for text in texts_in(more_of(message))]
        return [SPELLED] if self._chat.spelled_in(beside).control_tokens else []

    def _flags_of(self, contents: Sequence[str]) -> list[str]:
        spelled = self._chat.spelled_in(contents)
        is_templated = any(fault_of_content(content) == TEMPLATED for content in contents)
        return [name for name, is_set in ((SPELLED, spelled.control_tokens), (TEMPLATED, is_templated)) if is_set]


def _read(chat: ChatTokenizer, text: str, prompt: str | None) -> Read:
    """The messages of a rendered text, which may lack its first token: verl takes off what the tokenizer calls the beginning of a text, as which
    some name the token that opens every turn.

    Raises ForeignTextError, for the text as it came.
    """
    try:
        return chat.written.read(text, prompt)
    except ForeignTextError as error:
        first = chat.tokenizer.bos_token
        if not first or text.startswith(first):
            raise
        try:
            return chat.written.read(first + text, None if prompt is None else first + prompt)
        except ForeignTextError:
            raise error from None

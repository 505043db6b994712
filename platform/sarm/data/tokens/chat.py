"""The one path from messages to token ids: extraction, training, evaluation and serving all call `ChatTokenizer`.

A conversation is rendered by the model's chat template without a date, has exactly one BOS where the tokenizer uses one, ends in
the response's end-of-turn token (the rewarded token; whatever the template writes after it is left out), and loses
its beginning, never its end, when it is too long. Contents are encoded as text (`control_tokens`): nothing in them becomes a control token.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sarm.contracts.passes import Spelled
from sarm.data.formats.reward_classes import is_attached, read_behind
from sarm.data.sources.conversations import ConversationError, Message, check_messages
from sarm.data.tokens.control_tokens import ControlTokens, Encoded, Rendered, Span
from sarm.data.tokens.opening import opening_of
from sarm.data.tokens.said_beside import apply_template, kinds_said, turns_of
from sarm.data.tokens.spans import NOWHERE, spans_within
from sarm.data.tokens.spelling import NotEncodableError
from sarm.data.tokens.templated_text import template_spelled_in
from sarm.data.tokens.templates import (
    chosen_template,
    left_out,
    pin_template,
    with_system_prompt,
    without_system_prompt,
)
from sarm.data.tokens.written_turns import WrittenTurns
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings

_PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


class Tokens(NamedTuple):
    """Token ids of a conversation and how many of its first tokens were cut off."""

    ids: list[int]
    num_truncated: int
    offsets: Sequence[Span] = ()
    """Characters of the response that each token covers (empty spans elsewhere), where they were asked for."""


class TextTokens(NamedTuple):
    """Token ids of a plain text without BOS, and the characters each token covers."""

    ids: list[int]
    offsets: list[Span]


class ChatTokenizer:
    """A tokenizer with a pinned chat template.

    Without a `system_prompt`, one that was written into the template (`templates.with_system_prompt`) counts. `opening_ids` are the tokens with
    which the template opens an answer, empty where nothing tells that place from others.

    `chat_template` is a template, or the name of one that the tokenizer has, instead of its own. Raises UserError if there is no chat template,
    or one that does not close the assistant's turn with a special token.

    With `reads_last`, a conversation ends where the template ends it, and behind that in the tokens `appended`: there other reward models read.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        system_prompt: str | None = None,
        chat_template: str = "",
        reads_last: bool = False,
        appended: Sequence[int] = (),
    ):
        self._reads_last, self._appended = reads_last, list(appended)
        chosen = chosen_template(tokenizer, chat_template, "--model.chat-template")
        template, written = without_system_prompt(chosen)
        self.tokenizer, self.max_length = tokenizer, max_length
        self.system_prompt = written if system_prompt is None else system_prompt
        self.template = pin_template(template)
        try:
            self.control = ControlTokens(tokenizer)
        except NotEncodableError as error:
            raise UserError(f"{error} Pass another --model.name.") from error
        plain = tokenizer("a").input_ids
        self.bos_id = tokenizer.bos_token_id if plain and plain[0] == tokenizer.bos_token_id else None
        probe = self._rendered(_PROBE)
        if lacking := left_out(probe.text, _PROBE):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} leaves out the {' and the '.join(lacking)} of a conversation, so that all would be alike. Pass another to --model.chat-template."
            )
        closed = self._tokenise([probe])[0].ids[: -len(self._appended) or None]
        self.end_of_turn_id = next(token for token in reversed(closed) if not self._is_blank(token))
        if self.end_of_turn_id not in set(tokenizer.all_special_ids) | self.control.ids:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} does not close the assistant's turn with a special token, so there is no token to reward. Pass another --model.name."
            )
        self.opening_ids = opening_of(
            apply=self._apply,
            control=self.control,
            template=self.template,
            end_of_turn_id=self.end_of_turn_id,
            is_blank=self._is_blank,
        )

    @property
    def answer_place(self) -> dict[str, Any]:
        """Where answers are in token ids, for a model that is given no more than those (`SarmConfig.answer_place`)."""
        turns = [*_PROBE, *_PROBE]
        (whole,) = self.control.encode([self.control.render(turns, self._apply, self.template)])
        (tokens,) = self._tokenise([self.control.render(turns, self._apply, self.template)])
        # What begins turns, and not what the template writes within answers, as around reasoning.
        try:
            (asked,) = self._tokenise([self.control.render(_PROBE[:1], self._apply, self.template)])
        except ConversationError:
            asked = TextTokens([], [])
        written = {*asked.ids, *self.opening_ids} & self.control.ids - {self.end_of_turn_id, self.bos_id}
        end = len(whole.ids) - 1 - whole.ids[::-1].index(self.end_of_turn_id)
        return {
            "opening": list(self.opening_ids),
            "turns": sorted(written),
            "first": tokens.ids[0],
            "trailing": len(whole.ids) - 1 - end,
        }

    @cached_property
    def closing_ids(self) -> tuple[int, ...]:
        """What the template writes behind an answer, as far as the end-of-turn token: that alone for most, white space before it for some."""
        probe, answer = self._rendered(_PROBE), _PROBE[-1]["content"]
        (tokens,) = self._tokenise([probe], offsets=True)
        own = [
            column
            for column, (start, end) in enumerate(spans_within(probe.text, answer, tokens.offsets))
            if start < end
        ]
        return tuple(tokens.ids[own[-1] + 1 :])

    @cached_property
    def written(self) -> WrittenTurns:
        """What the template writes around contents: it reads rendered texts back into messages."""
        end = self.tokenizer.convert_ids_to_tokens(self.end_of_turn_id)
        bos = None if self.bos_id is None else self.tokenizer.bos_token
        return WrittenTurns(self._apply, [end, self.tokenizer.eos_token or end], bos)

    @property
    def exported_template(self) -> str:
        """The template as a model carries it: whoever renders with it gets the system prompt that the model was trained with."""
        return with_system_prompt(self.template, self.system_prompt)

    @property
    def template_hash(self) -> str:
        """Identity of the pinned template: rewards under another one are not comparable."""
        return hashlib.sha256(self.template.encode()).hexdigest()[:16]

    @property
    def tokenizer_hash(self) -> str:
        """Identity of the vocabulary and merges."""
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]

    @property
    def pad_id(self) -> int:
        """A token to fill rows with; which one never matters, since masks come from lengths."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_of_turn_id

    def beyond(self, num_embeddings: int) -> str:
        """A token that texts may hold and that has no embedding among so many, empty if there is none.

        A control token is none that a text holds; it counts if the template writes it.
        """
        written = {i for tokens in self._tokenise([self._rendered(_PROBE)]) for i in tokens.ids} | {*self.opening_ids}
        lost = {text: i for text, i in self.tokenizer.get_vocab().items() if i >= num_embeddings}
        occur = [text for text, i in lost.items() if i in written or i not in self.control.ids or text in self.template]
        return min(occur, default="")

    def encode_text(self, text: str) -> TextTokens:
        """Token ids and character offsets of a plain text; nothing is inserted, and control tokens in it are text like any other."""
        (encoded,) = self._encoded([self.control.plain(text)], offsets=True)
        return TextTokens(encoded.ids, encoded.offsets)

    def spelled_in(self, contents: Iterable[str]) -> Spelled:
        """What of the contents would be taken for control tokens or for turns, were it not encoded as text."""
        each = list(contents)
        return Spelled(
            sum(self.control.spelled_in(text) for text in each),
            sum(template_spelled_in(text) is not None for text in each),
        )

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, ending where the template ends it; in it, what contents spell looks like the template's own.

        Raises ConversationError if these are no messages, or the template refuses them.
        """
        return self._apply(self._turns(messages))

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Tokens]:
        """Token ids of whole conversations, each ending in its rewarded token. Raises ConversationError as `render` does."""
        return [self._truncate(tokens) for tokens in self._tokenise([self._rendered(c) for c in conversations])]

    def encode_responses(
        self, prompt: Sequence[Message], responses: Sequence[str], *, offsets: bool = False
    ) -> list[Tokens]:
        """Token ids of one prompt with each of its responses, with `offsets` if asked for."""
        conversations = [[*prompt, {"role": "assistant", "content": response}] for response in responses]
        texts = [self._rendered(conversation) for conversation in conversations]
        found = [self._truncate(tokens) for tokens in self._tokenise(texts, offsets=offsets)]
        if not offsets:
            return found
        return [
            tokens._replace(offsets=spans_within(text.text, response, tokens.offsets))
            for text, response, tokens in zip(texts, responses, found, strict=True)
        ]

    @cached_property
    def says(self) -> frozenset[str]:
        """What the template writes beside contents, of `said_beside.KINDS`."""
        return kinds_said(self._apply)

    def _turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        check_messages(messages)
        turns = turns_of(messages, lambda: self.says)
        if self.system_prompt is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        return turns

    def _rendered(self, messages: Sequence[Message]) -> Rendered:
        try:
            return self.control.render(self._turns(messages), self._apply, self.template)
        except NotEncodableError as error:
            raise ConversationError(str(error), "not_encodable") from error

    def _apply(self, turns: Sequence[dict[str, Any]], opened: bool = False) -> str:
        """What the template makes of the turns; with `opened`, and of the beginning of an answer to them."""
        try:
            return apply_template(self.tokenizer, turns, chat_template=self.template, add_generation_prompt=opened)
        except Exception as error:  # a template raises whatever its author chose, jinja's errors among them
            roles = [turn["role"] for turn in turns]
            raise ConversationError(f"the chat template refuses these roles {roles}: {error}") from error

    def _tokenise(self, texts: list[Rendered], *, offsets: bool = False) -> list[TextTokens]:
        bos = [] if self.bos_id is None else [self.bos_id]
        sequences = []
        for ids, covered in self._encoded(texts, offsets=offsets):
            end = len(ids)
            while not self._reads_last and end > 1 and self._is_blank(ids[end - 1]):
                end -= 1
            start = 0
            if self.bos_id is not None:
                while start < end and ids[start] == self.bos_id:
                    start += 1
            spans = [NOWHERE for _ in bos] + covered[start:end] + [NOWHERE for _ in self._appended]
            sequences.append(TextTokens([*bos, *ids[start:end], *self._appended], spans))
        return sequences

    def _encoded(self, texts: list[Rendered], *, offsets: bool) -> list[Encoded]:
        try:
            return self.control.encode(texts, offsets=offsets)
        except NotEncodableError as error:
            raise ConversationError(str(error), "not_encodable") from error

    def _is_blank(self, token_id: int) -> bool:
        return not self.tokenizer.decode([token_id]).strip()

    def _truncate(self, tokens: TextTokens) -> Tokens:
        ids, offsets = tokens
        excess = len(ids) - self.max_length
        if excess <= 0:
            return Tokens(ids, 0, offsets)
        kept = 0 if self.bos_id is None else 1
        return Tokens(ids[:kept] + ids[excess + kept :], excess, offsets[:kept] + offsets[excess + kept :])


def load_chat_tokenizer(model: ModelSettings, folder: str | Path) -> ChatTokenizer:
    """The tokenizer in `folder` (or of a Hugging Face id) for the settings of `model`.

    Raises UserError if there is none, or none with a usable chat template.
    """
    tokenizer, reads_last = load_tokenizer(model, folder), model.rewarded_token == "last"
    return ChatTokenizer(
        tokenizer,
        max_length=model.max_length,
        system_prompt=model.system_prompt,
        chat_template=model.chat_template,
        reads_last=reads_last,
        appended=read_behind(tokenizer, str(folder), model.revision) if reads_last else (),
    )


def load_tokenizer(model: ModelSettings, folder: str | Path) -> Any:
    """The tokenizer alone, with a chat template or without. Raises UserError if there is none."""
    from transformers import AutoTokenizer, PretrainedConfig

    more: dict[str, Any] = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    # `transformers` would warn that it does not know this type of model, and take an empty config.
    more |= {"config": PretrainedConfig()} if is_attached(Path(folder)) else {}
    try:
        return AutoTokenizer.from_pretrained(str(folder), revision=model.revision, trust_remote_code=False, **more)
    # A tokenizer's files are read by its own class, which raises what it likes.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read a tokenizer from {folder}: {reason} Pass --model.name.") from error

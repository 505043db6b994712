"""The one path from messages to token ids: extraction, training, evaluation and serving all call `ChatTokenizer`.

A conversation is rendered by the model's chat template without a date, has exactly one BOS where the tokenizer uses one, ends in
the response's end-of-turn token (the rewarded token; whatever the template writes after it is left out), and loses
its beginning, never its end, when it is too long.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sarm.config import Model, UserError

Message = dict[str, str]

# Llama 3.2's template writes today's date, so rewards would drift by the day; 3.1's writes this one.
_FIXED_DATE = "26 Jul 2024"
_PIN_DATE = (
    f'{{%- set date_string = "{_FIXED_DATE}" %}}{{%- macro strftime_now(format) %}}{_FIXED_DATE}{{% endmacro %}}'
)
_PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


Span = tuple[int, int]
_NOWHERE: Span = (0, 0)


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

    Raises UserError if the tokenizer has no chat template, or one that does not close the assistant's turn with a special token.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, system_prompt: str | None = None):
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template, so it cannot render preferences. Pass an instruct model to --model.name."
            )
        self.tokenizer, self.max_length, self.system_prompt = tokenizer, max_length, system_prompt
        self.template = pin_template(tokenizer.chat_template)
        plain = tokenizer("a").input_ids
        self.bos_id = tokenizer.bos_token_id if plain and plain[0] == tokenizer.bos_token_id else None
        self.end_of_turn_id = self._tokenise([self.render(_PROBE)])[0].ids[-1]
        if self.end_of_turn_id not in set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values()):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} does not close the assistant's turn with a special token, so there is no token to reward. Pass another --model.name."
            )

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

    def encode_text(self, text: str) -> TextTokens:
        """Token ids and character offsets of a plain text; nothing is inserted, and special tokens in it are text like any other."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        return TextTokens(encoded.input_ids, encoded.offset_mapping)

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, ending where the template ends it."""
        turns = list(messages)
        if self.system_prompt is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        try:
            return self.tokenizer.apply_chat_template(turns, chat_template=self.template, tokenize=False)
        except Exception as error:  # a template raises whatever its author chose, jinja's errors among them
            raise UserError(f"the chat template refuses these roles {[m['role'] for m in turns]}: {error}") from error

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Tokens]:
        """Token ids of whole conversations, each ending in its rewarded token."""
        return [self._truncate(tokens) for tokens in self._tokenise([self.render(c) for c in conversations])]

    def encode_responses(
        self, prompt: Sequence[Message], responses: Sequence[str], *, offsets: bool = False
    ) -> list[Tokens]:
        """Token ids of one prompt with each of its responses, with `offsets` if asked for."""
        conversations = [[*prompt, {"role": "assistant", "content": response}] for response in responses]
        texts = [self.render(conversation) for conversation in conversations]
        found = [self._truncate(tokens) for tokens in self._tokenise(texts, offsets=offsets)]
        if not offsets:
            return found
        return [
            tokens._replace(offsets=_within(text, response, tokens.offsets))
            for text, response, tokens in zip(texts, responses, found, strict=True)
        ]

    def _tokenise(self, texts: list[str], *, offsets: bool = False) -> list[TextTokens]:
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=offsets)
        spans = encoded.offset_mapping if offsets else [[] for _ in texts]
        bos = [] if self.bos_id is None else [self.bos_id]
        sequences = []
        for ids, covered in zip(encoded.input_ids, spans, strict=True):
            end = len(ids)
            while end > 1 and not self.tokenizer.decode([ids[end - 1]]).strip():
                end -= 1
            start = 0
            if self.bos_id is not None:
                while start < end and ids[start] == self.bos_id:
                    start += 1
            sequences.append(TextTokens([*bos, *ids[start:end]], [_NOWHERE for _ in bos] + covered[start:end]))
        return sequences

    def _truncate(self, tokens: TextTokens) -> Tokens:
        ids, offsets = tokens
        excess = len(ids) - self.max_length
        if excess <= 0:
            return Tokens(ids, 0, offsets)
        kept = 0 if self.bos_id is None else 1
        return Tokens(ids[:kept] + ids[excess + kept :], excess, offsets[:kept] + offsets[excess + kept :])


def _within(text: str, part: str, spans: Sequence[Span]) -> list[Span]:
    """Spans of `text` as spans of the last place where it holds `part`, empty where they lie outside or it is not there."""
    stripped = part.strip()
    start = text.rfind(stripped) if stripped else -1
    if start < 0:
        return [_NOWHERE] * len(spans)
    # Some templates strip what they are given.
    shift = part.find(stripped) - start
    inside = [(max(a, start), min(b, start + len(stripped))) for a, b in spans]
    return [(a + shift, b + shift) if a < b else _NOWHERE for a, b in inside]


def pin_template(template: str) -> str:
    """The template with today's date replaced by a fixed one; pinning twice changes nothing."""
    mentions_date = "date_string" in template or "strftime_now" in template
    return template if not mentions_date or template.startswith(_PIN_DATE) else _PIN_DATE + template


def load_chat_tokenizer(model: Model, folder: str | Path) -> ChatTokenizer:
    """The tokenizer in `folder` (or of a Hugging Face id) for the settings of `model`.

    Raises UserError if there is none, or none with a usable chat template.
    """
    from transformers import AutoTokenizer

    source = {
        "revision": model.revision,
        "trust_remote_code": False,
        **({"gguf_file": model.gguf_file} if model.gguf_file else {}),
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read a tokenizer from {folder}: {str(error).splitlines()[0]} Pass --model.name."
        ) from error
    return ChatTokenizer(tokenizer, max_length=model.max_length, system_prompt=model.system_prompt)

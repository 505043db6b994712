"""Contents as text: what is spelled in a message never becomes a control token, whatever the template and the tokenizer.

A conversation is rendered with a mark behind every character of its contents that a control token could begin with, so that none is whole
even where the template leaves out a part of the content. What is left unbroken is the template's own, and becomes a stand-in: two private-use characters that no content has. A second tokenizer, with the same model and rules, knows the stand-ins
instead of the spellings. So contents meet the template's pieces as they always do (merges at the borders included), and the ids of
conversations without control tokens are those of the model's own tokenizer.

Registered models carry copies of this module and of `spelling`, which it imports relatively; they need `tokenizers` and `jinja2` alone.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from .spelling import NotEncodableError, any_of, literals_of, pieces_of, unknown_id

# Role and content, and beside them what a template may write: a name, calls of tools, tools that are offered.
Message = dict[str, Any]
Span = tuple[int, int]
Render = Callable[[Sequence[Message]], str]

# Vocabulary, not control: Gemma has these among its added tokens, and texts are full of them.
_HTML_TAGS = (
    "a b blockquote br caption code dd del div dl dt em h1 h2 h3 h4 h5 h6 i img kbd li ol p pre q s samp span strong sub "
    "sup table tbody td tfoot th thead tr u ul"
)
_HTML = re.compile(rf"</?(?:{_HTML_TAGS.replace(' ', '|')})>")
# Private use: marks from the basic plane, a stand-in's two characters from the two planes beyond.
_MARKS, _STARTS, _FIRST_INDEX = range(0xE000, 0xF900), range(0x100000, 0x10FFFE), 0xF0000
# What a template reads in contents by itself (`</think>`) is a few tokens; a content with more of them only spells them.
_MAX_READ = 8


class Rendered(NamedTuple):
    """A rendered conversation or a plain text; in `text`, `start` and the character behind it stand for a control token."""

    text: str
    start: str


class Encoded(NamedTuple):
    """Token ids, and the characters of `Rendered.text` that each token covers, where they were asked for."""

    ids: list[int]
    offsets: list[Span]


class ControlTokens:
    """The control tokens of a tokenizer, and an encoder that takes only the template's own for such.

    A control token is an added token that is special, or that is neither white space nor an HTML tag nor a word. Raises NotEncodableError for a tokenizer
    that the `tokenizers` library does not run.
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise NotEncodableError(
                f"the tokenizer of {tokenizer.name_or_path} is not run by the tokenizers library, so control tokens in contents cannot be told apart."
            )
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self.texts = sorted({token.content for token in self._added.values() if _is_control(token)})
        self.ids = frozenset(number for number, token in self._added.items() if _is_control(token))
        self._not_special = {token.content for token in self._added.values() if not token.special} & set(self.texts)
        # What the model's vocabulary itself may write, merged from characters: by id, since the encoder shares that model.
        self._of_model = {i for i in self.ids if backend.model.id_to_token(i) is not None}
        self._unknown = unknown_id(backend.model)
        # One character cannot be broken: contents get another in its place.
        self._single = [text for text in self.texts if len(text) == 1]
        self._index = {text: chr(_FIRST_INDEX + place) for place, text in enumerate(self.texts)}
        self._spelled = re.compile(any_of(self.texts))
        self._firsts = "".join(sorted({text[0] for text in self.texts if len(text) > 1}))
        self._first = re.compile(any_of(self._firsts))
        self._beginnings = tuple({text[:n] for text in self.texts for n in range(1, len(text))})
        self._endings = tuple({text[n:] for text in self.texts for n in range(1, len(text))})
        self._all_texts = "".join(self.texts)
        self._literals: dict[str, re.Pattern[str]] = {}
        self._encoders: dict[str, tuple[Any, dict[int, int]]] = {}

    def spelled_in(self, text: str) -> bool:
        """Whether the text spells a control token."""
        return self._spelled.search(text) is not None

    def render(self, turns: Sequence[Message], render: Render, template: str) -> Rendered:
        """What `render` makes of the turns, with stand-ins for the control tokens that are the template's own.

        `template` is its source: it tells which tokens it may read in contents by itself, as reasoning between `<think>` and `</think>`
        is. Those, and no others of the contents, count as the template's. Raises what `render` raises, and NotEncodableError if the contents leave no private-use character free.
        """
        contents = [turn["content"] for turn in turns]
        beside = [text for turn in turns for text in _texts_in(_beside(turn))]
        if not any(self._needs_marks(text) for text in (*contents, *beside)):
            return self._with_stand_ins(render(turns))
        mark, *aliases = _absent_from(_MARKS, [*contents, *beside, template, self._all_texts], 1 + len(self._single))
        alias_of = dict(zip(self._single, aliases, strict=True))
        whole = self._read_whole(template)
        if beside:
            marked_text = partial(self._marked, mark=mark, alias_of=alias_of, whole=whole)
            turns = [{**turn, **_each_text(_beside(turn), marked_text)} for turn in turns]
        marked = [self._marked(content, mark, alias_of, whole) for content in contents]
        read = [text for text in self._not_special if text in template]
        if read and any(text in turn["content"] for text in read for turn in turns if turn["role"] == "assistant"):
            marked = self._unmarked_where_read(turns, marked, render, mark, read)
        rendered = self._with_stand_ins(render(_with_contents(turns, marked)))
        text = rendered.text.replace(mark, "")
        for character, alias in alias_of.items():
            text = text.replace(alias, character)
        return rendered._replace(text=text)

    def plain(self, text: str) -> Rendered:
        """A text without any control token."""
        return Rendered(text, *_absent_from(_STARTS, [text]))

    def encode(self, rendered: Sequence[Rendered], *, offsets: bool = False) -> list[Encoded]:
        """Token ids of each, nothing inserted. Raises NotEncodableError where the vocabulary can write a content by a control token alone."""
        found: dict[int, Encoded] = {}
        for start in dict.fromkeys(one.start for one in rendered):
            backend, original = self._encoder(start)
            own = [place for place, one in enumerate(rendered) if one.start == start]
            texts = [rendered[place].text for place in own]
            # Characters are counted where asked for, and where an unknown one has to be told from its token's spelling.
            fast = not offsets and self._unknown not in self._of_model
            encode = backend.encode_batch_fast if fast else backend.encode_batch
            for place, encoding in zip(own, encode(texts, add_special_tokens=False), strict=True):
                ids, spans = encoding.ids, [] if fast else encoding.offsets
                if not self._of_model.isdisjoint(ids):
                    ids, spans = self._by_characters(rendered[place].text, ids, spans)
                found[place] = Encoded([original.get(i, i) for i in ids], spans if offsets else [])
        return [found[place] for place in range(len(rendered))]

    def _by_characters(self, text: str, ids: list[int], spans: list[Span]) -> tuple[list[int], list[Span]]:
        """The same with the model's own spelling of control tokens, which no stand-in was written for, in smaller pieces."""
        new_ids: list[int] = []
        new_spans: list[Span] = []
        for place, number in enumerate(ids):
            pieces = [number]
            if number in self._of_model:
                spelling = self._backend.id_to_token(number)
                covered = text[slice(*spans[place])] if spans else ""
                if number != self._unknown:
                    pieces = pieces_of(spelling, self._backend.model, self.ids, self._unknown)
                elif spelling in covered:
                    pieces = pieces_of(covered, self._backend.model, self.ids, self._unknown)
            new_ids += pieces
            if spans:
                first, end = spans[place]
                each = [(n, n + 1) for n in range(first, end)]
                new_spans += each if len(each) == len(pieces) else [(first, end)] * len(pieces)
        return new_ids, new_spans

    def _needs_marks(self, content: str) -> bool:
        """Whether the content, or what the template leaves of it, could spell a control token by itself or with what the template writes beside it."""
        return (
            self._first.search(content) is not None
            or any(character in content for character in self._single)
            or content.strip().startswith(self._endings)
        )

    def _marked(self, content: str, mark: str, alias_of: Mapping[str, str], whole: re.Pattern[str]) -> str:
        for character, alias in alias_of.items():
            content = content.replace(character, alias)
        # Inside of white space, which templates trim.
        core = content.strip()
        if not core:
            return self._spelled.sub(lambda found: found[0][0] + mark + found[0][1:], content)
        start = content.index(core)
        begin = mark if core.startswith(self._endings) else ""
        core = whole.sub(lambda found: found[0] + mark if len(found[0]) == 1 else found[0], core)
        while self.spelled_in(core):
            core = self._spelled.sub(lambda found: found[0][0] + mark + found[0][1:], core)
        return content[:start] + begin + core + content[start + len(content.strip()) :]

    def _read_whole(self, template: str) -> re.Pattern[str]:
        """A pattern for first characters of control tokens, and for texts that the template looks for in contents, which stay whole."""
        if template not in self._literals:
            texts = {
                text
                for text in literals_of(template)
                if len(text) > 1
                and self._first.search(text)
                and not self.spelled_in(text)
                and not text.endswith(self._beginnings)
            }
            self._literals[template] = re.compile(any_of([*texts, *self._firsts]))
        return self._literals[template]

    def _unmarked_where_read(
        self, turns: Sequence[Message], marked: list[str], render: Render, mark: str, read: Sequence[str]
    ) -> list[str]:
        """The marked contents, without marks in the tokens that the template reads in an answer: those whose mark changes what it writes."""
        broken = {self._first.sub(lambda found: found[0] + mark, text): text for text in read}
        pattern = re.compile(any_of(broken))
        places = [
            (number, found.span())
            for number, (turn, content) in enumerate(zip(turns, marked, strict=True))
            if turn["role"] == "assistant"
            for found in pattern.finditer(content)
        ]
        if not places or len(places) > _MAX_READ:
            return marked

        def with_whole(kept: set[int]) -> list[str]:
            contents = list(marked)
            for place in sorted(kept, reverse=True):
                number, (first, end) = places[place]
                contents[number] = (
                    contents[number][:first] + broken[contents[number][first:end]] + contents[number][end:]
                )
            return contents

        def written(kept: set[int]) -> str:
            return render(_with_contents(turns, with_whole(kept))).replace(mark, "")

        kept = set(range(len(places)))
        wanted = written(kept)
        for place in range(len(places)):
            if written(kept - {place}) == wanted:
                kept.discard(place)
        return with_whole(kept)

    def _with_stand_ins(self, text: str) -> Rendered:
        (start,) = _absent_from(_STARTS, [text])
        return Rendered(self._spelled.sub(lambda found: start + self._index[found[0]], text), start)

    def _encoder(self, start: str) -> tuple[Any, dict[int, int]]:
        """A tokenizer of the same model that knows stand-ins, and the ids that its added tokens have in the model's own."""
        if start not in self._encoders:
            encoder = Tokenizer(self._backend.model)
            for part in ("normalizer", "pre_tokenizer"):
                if (own := getattr(self._backend, part)) is not None:
                    setattr(encoder, part, own)
            named = {}
            for number, token in sorted(self._added.items()):
                stand_in = start + self._index[token.content] if _is_control(token) else token.content
                flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
                named[stand_in] = number
                encoder.add_tokens([AddedToken(stand_in, **flags)])
            self._encoders[start] = encoder, {int(encoder.token_to_id(text) or 0): n for text, n in named.items()}
        return self._encoders[start]


def _is_control(token: Any) -> bool:
    text = token.content
    # Words that somebody added, and white space, are vocabulary like any other.
    is_word = all(character.isalnum() or character in "_ \t\r\n\u2581" for character in text)
    return bool(text) and (token.special or not (is_word or _HTML.fullmatch(text)))


def _absent_from(candidates: Iterable[int], texts: Sequence[str], count: int = 1) -> list[str]:
    free = (chr(number) for number in candidates if not any(chr(number) in text for text in texts))
    found = list(islice(free, count))
    if len(found) < count:
        raise NotEncodableError("a text uses every private-use character that Unicode has. Leave it out.")
    return found


def _beside(turn: Message) -> dict[str, Any]:
    return {name: value for name, value in turn.items() if name not in ("role", "content")}


def _texts_in(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for name, one in value.items() for text in (name, *_texts_in(one))]
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in _texts_in(one)]
    return [value] if isinstance(value, str) else []


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, the names of fields among them: all are written as somebody spelled them."""
    if isinstance(value, Mapping):
        return {change(name): _each_text(one, change) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_text(one, change) for one in value]
    return change(value) if isinstance(value, str) else value


def _with_contents(turns: Sequence[Message], contents: Sequence[str]) -> list[Message]:
    return [{**turn, "content": content} for turn, content in zip(turns, contents, strict=True)]

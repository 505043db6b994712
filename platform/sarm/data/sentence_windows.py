"""A text too long for the model, cut into windows of tokens, and which tokens end its sentences."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from sarm.data.chat import ChatTokenizer
from sarm.data.sentences import sentence_end_tokens, sentence_ends


class Window(NamedTuple):
    """Tokens `start` onwards of a text, after the BOS if the model has one; `columns` are the wanted places in `ids`."""

    start: int
    ids: list[int]
    columns: list[int]
    sentences: list[int]
    """Number of the sentence that each column ends; empty where every token is wanted."""


def sentence_columns(text: str, offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Token that ends a sentence -> number of the sentence in the text; sentences whose end no token covers have none."""
    ends = sentence_ends(text)
    return {token: bisect.bisect_left(ends, offsets[token][0]) for token in sentence_end_tokens(ends, offsets)}


def text_windows(text: str, chat: ChatTokenizer, max_length: int, *, sentences: bool = True) -> list[Window]:
    """The windows of at most `max_length` tokens; wanted are the tokens that end sentences, or all, never the BOS."""
    encoded = chat.encode_text(text)
    sentence_of = sentence_columns(text, encoded.offsets) if sentences else {}
    wanted = list(sentence_of) if sentences else list(range(len(encoded.ids)))
    prefix = [] if chat.bos_id is None else [chat.bos_id]
    width = max_length - len(prefix)
    windows = []
    for start in range(0, len(encoded.ids), width):
        first, behind = bisect.bisect_left(wanted, start), bisect.bisect_left(wanted, start + width)
        own = wanted[first:behind]
        columns = [token - start + len(prefix) for token in own]
        numbers = [sentence_of[token] for token in own] if sentences else []
        windows.append(Window(start, prefix + encoded.ids[start : start + width], columns, numbers))
    return windows

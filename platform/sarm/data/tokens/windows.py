"""Texts as windows of tokens for forward passes, and the places in them that are taken.

A window is one sequence: the BOS, where the tokenizer uses one, and up to `max_length` tokens. N windows, L columns.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int
from torch import Tensor

from sarm.contracts.passes import Spelled
from sarm.data.sources.conversations import ConversationError, Message
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.sentences import SPLITTERS, ended_sentences, sentence_end_tokens

# A tokenizer needs some 200 bytes a character: longer texts go through it in pieces that end behind a sentence.
PIECE_CHARACTERS = 100_000
_NONE = np.zeros(0, np.int64)


class Window(NamedTuple):
    """One sequence; `columns[unit]` are the columns that the unit takes, `first` the position of column 0 among the text's tokens."""

    row_id: int
    first: int
    ids: Int[np.ndarray, " columns"]
    columns: dict[str, Int[np.ndarray, " taken"]]
    truncated: bool
    sentences: Int[np.ndarray, " sentences"] = _NONE
    """Number of the sentence in the text that each column of `document` ends."""
    spelled: Spelled = Spelled()
    """Contents of the conversation that spell control tokens or turns."""

    @property
    def taken(self) -> Int[np.ndarray, " taken"]:
        """The columns that any unit takes, increasing."""
        found = list(self.columns.values())
        return found[0] if len(found) == 1 else np.unique(np.concatenate(found))


class WindowBatch(NamedTuple):
    """Windows of one forward pass, padded on the right: `rows[n]`, `columns[n]` is the n-th place that is taken."""

    input_ids: Int[Tensor, "rows columns"]
    rows: Int[Tensor, " taken"]
    columns: Int[Tensor, " taken"]


def text_windows(
    row_id: int, text: str, units: Sequence[str], splitter: str, chat: ChatTokenizer, max_length: int
) -> list[Window]:
    """The windows of a text: shared by `document` and `token`, and one for each sentence for `sentence`.

    Documents longer than `max_length` are cut into windows; a longer sentence loses its beginning, as a conversation does.
    """
    prefix = [] if chat.bos_id is None else [chat.bos_id]
    width = max_length - len(prefix)
    windows: list[Window] = []
    if not {"document", "token", "sentence"} & set(units):
        return windows
    ends = SPLITTERS[splitter](text)
    whole = [unit for unit in units if unit in ("document", "token")]
    if whole:
        ids, end_tokens, sentences = _encoded(text, ends, chat)
        for start in range(0, len(ids), width):
            stop = min(len(ids), start + width)
            columns, own = {}, _NONE
            if "document" in whole:
                first_end, last_end = np.searchsorted(end_tokens, (start, stop))
                columns["document"] = end_tokens[first_end:last_end] - start + len(prefix)
                own = sentences[first_end:last_end]
            if "token" in whole:
                columns["token"] = np.arange(len(prefix), stop - start + len(prefix))
            windows.append(
                Window(
                    row_id=row_id,
                    first=start,
                    ids=np.array([*prefix, *ids[start:stop]], np.int64),
                    columns=columns,
                    truncated=False,
                    sentences=own,
                )
            )
    if "sentence" in units:
        first = start = 0
        for end in ends:
            ids, _, _ = _encoded(text[start : end + 1].strip(), [], chat)
            start = end + 1
            cut = max(0, len(ids) - width)
            if len(ids):
                members = np.array([*prefix, *ids[cut:]], np.int64)
                windows.append(
                    Window(
                        row_id=row_id,
                        first=first + cut,
                        ids=members,
                        columns={"sentence": np.array([len(members) - 1])},
                        truncated=cut > 0,
                    )
                )
            first += len(ids)
    return windows


def chat_windows(
    row_id: int, messages: list[Message] | None, chat: ChatTokenizer, refused: dict[int, str] | None = None
) -> list[Window]:
    """The window of a conversation, of which `chat` takes the final token; none if it cannot be encoded, and why in `refused`."""
    if messages is None:
        return []
    try:
        (tokens,) = chat.encode([messages])
    except ConversationError as error:
        if refused is not None:
            refused[row_id] = error.reason
        return []
    last = np.array([len(tokens.ids) - 1])
    cut, spelled = tokens.num_truncated, chat.spelled_in(message["content"] for message in messages)
    return [
        Window(
            row_id=row_id,
            first=cut,
            ids=np.array(tokens.ids, np.int64),
            columns={"chat": last},
            truncated=cut > 0,
            sentences=_NONE,
            spelled=spelled,
        )
    ]


def window_batches(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of the windows of which anything is taken, long to short, in batches of at most `batch_tokens` tokens with padding.

    A batch that is large enough to keep the machine busy ends where windows get so short that padding would tell.
    """
    order = sorted((n for n, window in enumerate(windows) if len(window.taken)), key=lambda n: -len(windows[n].ids))
    members: list[int] = []
    for n in order:
        longest = len(windows[members[0]].ids) if members else 0
        is_full = (len(members) + 1) * longest > batch_tokens
        if members and (
            is_full or (len(members) * longest >= batch_tokens // 4 and len(windows[n].ids) < 0.9 * longest)
        ):
            yield members
            members = []
        members.append(n)
    if members:
        yield members


def collate_windows(windows: Sequence[Window], members: Sequence[int], pad_id: int) -> WindowBatch:
    """One batch of the windows with these numbers, in this order."""
    length = max(len(windows[n].ids) for n in members)
    ids_NL = np.full((len(members), length), pad_id, np.int64)
    for i, n in enumerate(members):
        ids_NL[i, : len(windows[n].ids)] = windows[n].ids
    taken = [windows[n].taken for n in members]
    rows = np.repeat(np.arange(len(members)), [len(columns) for columns in taken])
    return WindowBatch(torch.from_numpy(ids_NL), torch.from_numpy(rows), torch.from_numpy(np.concatenate(taken)))


class Places:
    """The places that were taken: all columns of the windows `members`, as arrays, in the order in which they were computed."""

    def __init__(self, windows: list[Window], members: list[int]):
        self._windows = windows
        taken = [windows[n].taken for n in members]
        self._window = np.repeat(np.array(members, np.int64), [len(columns) for columns in taken])
        self._column = np.concatenate(taken) if taken else _NONE
        self.row_ids = np.array([window.row_id for window in windows], np.int64)[self._window]

    def of(self, unit: str) -> Int[np.ndarray, " places"]:
        """Numbers of the places of a unit, by window and column."""
        order = np.lexsort((self._column, self._window))
        lists = [window.columns.get(unit, _NONE) for window in self._windows]
        own = np.repeat(np.arange(len(lists)), [len(columns) for columns in lists])
        width = max((len(window.ids) for window in self._windows), default=1)
        keys = own * width + (np.concatenate(lists) if lists else _NONE)
        return order[np.isin(self._window[order] * width + self._column[order], keys)]

    def columns(self, chosen: Int[np.ndarray, " places"]) -> dict[str, Any]:
        """The key columns of activations/v1 of these places."""
        window, column = self._window[chosen], self._column[chosen]
        names = pa.array([f"{w.row_id:016x}" for w in self._windows], pa.string())
        return {
            "row_id": self.row_ids[chosen],
            "doc_id": names.take(pa.array(window)),
            "side": pa.repeat("text", len(chosen)),
            "position": np.array([w.first for w in self._windows])[window] + column,
            "token_id": np.array([self._windows[n].ids[c] for n, c in zip(window, column, strict=True)]),
            "num_tokens": np.array([len(w.ids) for w in self._windows])[window],
            "truncated": np.array([w.truncated for w in self._windows])[window],
        }


def num_tokens(texts: Sequence[str], chat: ChatTokenizer) -> list[int]:
    """Tokens of each text, without BOS."""
    return [sum(len(chat.encode_text(piece).ids) for _, piece in _pieces(text, [])) for text in texts]


def _encoded(
    text: str, ends: Sequence[int], chat: ChatTokenizer
) -> tuple[Int[np.ndarray, " columns"], Int[np.ndarray, " taken"], Int[np.ndarray, " taken"]]:
    """Token ids of the whole text, the tokens in which the `ends` lie, and the numbers of the sentences that those end."""
    ids, tokens, sentences, num = [], [], [], 0
    places = np.array(ends, np.int64)
    for start, piece in _pieces(text, ends):
        encoded = chat.encode_text(piece)
        first, last = np.searchsorted(places, (start, start + len(piece)))
        own_ends = (places[first:last] - start).tolist()
        own = sentence_end_tokens(own_ends, encoded.offsets)
        tokens.append(np.array(own, np.int64) + num)
        sentences.append(np.array(ended_sentences(own_ends, own, encoded.offsets), np.int64) + first)
        ids.append(np.array(encoded.ids, np.int64))
        num += len(encoded.ids)
    return np.concatenate(ids), np.concatenate(tokens), np.concatenate(sentences)


def _pieces(text: str, ends: Sequence[int]) -> Iterator[tuple[int, str]]:
    """(first character, piece): the whole text, or pieces that end behind a sentence, else behind white space, else anywhere."""
    start = 0
    places = np.array(ends, np.int64) + 1
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        place = int(np.searchsorted(places, limit, side="right"))
        stop = int(places[place - 1]) if place and places[place - 1] > start else text.rfind(" ", start + 1, limit)
        stop = stop if stop > start else limit
        yield start, text[start:stop]
        start = stop
    yield start, text[start:]

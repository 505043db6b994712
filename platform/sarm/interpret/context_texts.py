"""From references back to texts: how a place of a text is remembered as one number, cut into sentences, and shown to a reader."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from sarm.data.tokens.sentences import sentence_ends

_LEFT_CHARS = 400
_PROMPT_CHARS = 1000
# A single sentence is taken apart into runs of words; shorter ones are no parts.
_WORDS_OF_PART = 8
_SIDES = ("chosen", "rejected")
# Bits of a packed reference, from the lowest: sentence + 1, side, row of the file, file, whether it is a corpus.
_SENTENCE, _SIDE, _ROW, _FILE = 18, 1, 30, 13

Span = tuple[int, int]


class Ref(NamedTuple):
    """A place in the files that were read: an answer (sentence -1) or one of its sentences, or a sentence of a plain text."""

    is_corpus: bool
    file: int
    row: int
    side: int
    sentence: int

    def pack(self) -> int:
        """The place as one number; numbers are in order of place."""
        number = int(self.is_corpus)
        for value, bits in ((self.file, _FILE), (self.row, _ROW), (self.side, _SIDE), (self.sentence + 1, _SENTENCE)):
            assert 0 <= value < 1 << bits, self
            number = number << bits | value
        return number


def unpack(number: int) -> Ref:
    """The place of a packed number."""
    fields = []
    for bits in (_SENTENCE, _SIDE, _ROW, _FILE):
        fields.append(number & (1 << bits) - 1)
        number >>= bits
    sentence, side, row, file = fields
    return Ref(is_corpus=bool(number), file=file, row=row, side=side, sentence=sentence - 1)


def text_key(text: str) -> int:
    """64 bits that depend on the text alone."""
    digest = hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def sentence_spans(text: str) -> list[Span]:
    """Characters of each sentence without the space before it; what follows the last stop is no sentence."""
    spans, start = [], 0
    for end in sentence_ends(text):
        begin = start + len(text[start : end + 1]) - len(text[start : end + 1].lstrip())
        spans.append((begin, end + 1))
        start = end + 1
    return spans


def parts(text: str, limit: int) -> list[Span]:
    """At most `limit` consecutive parts of a text to leave out in turn: sentences, or runs of words of a single one; none of a short one."""
    spans = sentence_spans(text)
    tail = spans[-1][1] if spans else 0
    if text[tail:].strip():
        spans.append((tail + len(text[tail:]) - len(text[tail:].lstrip()), len(text.rstrip())))
    if len(spans) == 1:
        words = [found.span() for found in re.finditer(r"\S+", text)]
        spans = words if len(words) >= 2 * _WORDS_OF_PART else []
        limit = min(limit, len(words) // _WORDS_OF_PART)
    if len(spans) < 2:
        return []
    groups = [group for group in np.array_split(np.array(spans), min(limit, len(spans))) if len(group)]
    return [(int(group[0, 0]), int(group[-1, 1])) for group in groups]


def fetch(refs: Iterable[int], pairs: Sequence[Path], corpus: Sequence[Path]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every distinct reference with the row that it points into, row group after row group."""
    wanted: dict[tuple[bool, int], list[tuple[int, int]]] = {}
    for number in np.unique(np.fromiter(refs, np.int64)).tolist():
        ref = unpack(number)
        wanted.setdefault((ref.is_corpus, ref.file), []).append((ref.row, number))
    for (is_corpus, file), own in sorted(wanted.items()):
        with pq.ParquetFile((corpus if is_corpus else pairs)[file], page_checksum_verification=True) as parquet:
            first, place = 0, 0
            for number in range(parquet.num_row_groups):
                behind = first + parquet.metadata.row_group(number).num_rows
                group = parquet.read_row_group(number) if own[place][0] < behind else None
                while group is not None and place < len(own) and own[place][0] < behind:
                    yield own[place][1], group.slice(own[place][0] - first, 1).to_pylist()[0]
                    place += 1
                first = behind
                if place == len(own):
                    break


def shown(number: int, row: dict[str, Any], text_chars: int) -> dict[str, Any]:
    """The text columns of LATENT_CONTEXTS for one reference; the span is that of a sentence, unknown for a whole answer."""
    ref = unpack(number)
    if ref.is_corpus:
        document = str(row["row_id"])
        known: dict[str, Any] = {"text_id": f"corpus/{document}", "pair_id": None, "side": "text", "prompt": ""}
        prompt, text = document, row["text"]
    else:
        side = _SIDES[ref.side]
        known = {"text_id": f"{row['pair_id']}/{side}", "pair_id": row["pair_id"], "side": side}
        prompt, text = (
            json.dumps([[m["role"], m["content"], *([m["more"]] if m.get("more") else [])] for m in row["prompt"]]),
            row[side],
        )
        known["prompt"] = next((m["content"] for m in reversed(row["prompt"]) if m["role"] == "user"), "")[:_PROMPT_CHARS]  # fmt: skip
    start, end = -1, -1
    if ref.sentence >= 0:
        start, end = sentence_spans(text)[ref.sentence]
        text = text[:end]
        text_chars = min(text_chars, max(end - start, 0) + _LEFT_CHARS)
    cut, text = max(0, len(text) - text_chars), text[-text_chars:]
    span = (max(0, start - cut), end - cut) if ref.sentence >= 0 else (-1, -1)
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    return {**known, "prompt_hash": digest, "text": text, "span_start": span[0], "span_end": span[1], "cut": cut}

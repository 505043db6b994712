"""What actors compute for contexts: pairs or texts in, latents at sentence ends and at rewarded tokens out; then the parts that drive them.

A block is read in slices of a few rows, which depend on the rows alone: what a forward pass holds, and so every bit of its result, is
the same on any cluster.
"""

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sarm.contracts.ids import stable_int
from sarm.contracts.passes import Beat, Cost, Tables
from sarm.data.store.blocks import FILE, ROW
from sarm.data.store.parts import with_sink_columns
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.data.tokens.packing import Row, answer_rows, text_row
from sarm.data.tokens.sentences import sentence_columns
from sarm.data.tokens.windows import text_windows
from sarm.interpret.context_texts import Ref, parts, sentence_spans, text_key
from sarm.passes.reader import Reader, Reading

# Rows of one slice: enough for batches of like length; a prompt's pairs stay together up to four times as many.
_SLICE_ROWS = 64
# A unit is a place of a text; `row_ids` are the rows that it stands for.
UNITS = pa.schema(
    [
        pa.field("place", pa.string()),
        pa.field("ref", pa.int64()),
        pa.field("key", pa.uint64()),
        pa.field("readers", pa.list_(pa.int64())),
        pa.field("latents", pa.list_(pa.int32())),
        pa.field("values", pa.list_(pa.float32())),
        pa.field("row_ids", pa.list_(pa.int64())),
    ]
)
ANSWERS = pa.schema(
    [
        pa.field("ref", pa.int64()),
        pa.field("prompt", pa.string()),
        pa.field("text", pa.string()),
        pa.field("latents", pa.list_(pa.int64())),
    ]
)
SPANS = pa.schema([pa.field(name, pa.int64()) for name in ("ref", "latent", "start", "end")])


class _Unit(NamedTuple):
    """A unit before it is read."""

    place: str
    key: Hashable
    ref: Ref
    text: str
    readers: list[int]
    row_ids: list[int]


class _Slice(NamedTuple):
    """What shares forward passes, tokenised; and the rows that give no unit, with the reason."""

    rows: list[Row]
    units: list[_Unit]
    refused: dict[int, str]


class _ContextUnits:
    """UNITS of the rows of a block, under the one target `units`; `files` numbers the files as references do."""

    def __init__(self, reader: Reader, files: Mapping[str, int], threads: int):
        self._reader, self._files = reader.ready(threads), files

    def compute(self, prepared: Sequence[_Slice], beat: Beat) -> tuple[Tables, Cost]:
        """The units, slice by slice."""
        cost, records = Cost(), []
        for piece in prepared:
            readings = self._reader.read(piece.rows, cost, beat)
            records += [_record(unit, readings[unit.key]) for unit in piece.units]
            records += [_reject(row_id, reason) for row_id, reason in piece.refused.items()]
        return _tables(records), cost


class PairUnits(_ContextUnits):
    """Pairs in: the rewarded token and the sentence ends of every distinct response out."""

    def prepare(self, table: pa.Table) -> list[_Slice]:
        """The slices, tokenised."""
        cuts = pair_slices(table["prompt_id"].to_pylist())
        return [self._slice(table.slice(start, stop - start)) for start, stop in cuts]

    def rejected(self, table: pa.Table, reason: str) -> Tables:
        """What is left of pairs that cannot be read."""
        return _tables([_reject(stable_int(pair_id), reason) for pair_id in table["pair_id"].to_pylist()])

    def _slice(self, table: pa.Table) -> _Slice:
        row_of = dict(zip(table["pair_id"].to_pylist(), table[ROW].to_pylist(), strict=True))
        file = self._files[table[FILE][0].as_py()]
        refused: dict[str, str] = {}
        groups = list(prompt_groups(table, self._reader.chat, offsets=True, refused=refused))
        ends = {
            (group.prompt_id, place): sentence_columns(text, tokens.offsets)
            for group in groups
            for place, (text, tokens) in enumerate(zip(group.responses, group.tokens, strict=True))
        }
        columns: dict[Hashable, Sequence[int]] = {key: list(own) for key, own in ends.items()}
        rows = [row for group in groups for row in group.rows(self._reader.settings.max_length, columns)]
        units = []
        for group in groups:
            for place, text in enumerate(group.responses):
                key = (group.prompt_id, place)
                readers, ref, row_ids = _readers(group, place, row_of, file)
                units.append(_Unit("rewarded", key, ref, text, readers, row_ids))
                spans = sentence_spans(text)
                for column, sentence in ends[key].items():
                    start, end = spans[sentence]
                    own = ref._replace(sentence=sentence)
                    units.append(_Unit("sentence", (key, column), own, text[start:end], readers, row_ids))
        return _Slice(rows, units, {stable_int(pair_id): reason for pair_id, reason in refused.items()})


class TextUnits(_ContextUnits):
    """Texts in, their sentence ends out."""

    def prepare(self, table: pa.Table) -> list[_Slice]:
        """The slices, tokenised."""
        return [self._slice(table.slice(start, stop - start)) for start, stop in text_slices(table.num_rows)]

    def rejected(self, table: pa.Table, reason: str) -> Tables:
        """What is left of texts that cannot be read."""
        return _tables([_reject(row_id, reason) for row_id in table["row_id"].to_pylist()])

    def _slice(self, table: pa.Table) -> _Slice:
        rows: list[Row] = []
        units: list[_Unit] = []
        refused: dict[int, str] = {}
        file = self._files[table[FILE][0].as_py()]
        columns = (table[name].to_pylist() for name in (ROW, "row_id", "text"))
        for row, row_id, text in zip(*columns, strict=True):
            before, spans = len(units), sentence_spans(text)
            for window in text_windows(
                row, text, ["document"], "rules", self._reader.chat, self._reader.settings.max_length
            ):
                key, ends = (row, window.first), window.columns["document"].tolist()
                rows.append(text_row(key, window.ids.tolist(), ends))
                for column, sentence in zip(ends, window.sentences.tolist(), strict=True):
                    start, end = spans[sentence]
                    ref = Ref(True, file, row, 0, sentence)
                    units.append(_Unit("sentence", (key, column), ref, text[start:end], [0, 0, 1], [row_id]))
            if len(units) == before:
                refused[row_id] = "no_sentence_end"
        return _Slice(rows, units, refused)


class DrivingParts:
    """ANSWERS in, for each wanted latent the part without which it loses most of its activation at the rewarded token out.

    Leaving a part out costs one forward pass for all latents at once, where a gradient would cost one backward pass a latent, and
    it is the difference itself, not its linear approximation; what parts do only together it cannot see. The target is `spans`.
    """

    def __init__(self, reader: Reader, limit: int, threads: int):
        self._reader, self._limit = reader.ready(threads), limit

    def prepare(self, table: pa.Table) -> list[tuple[dict[str, Any], list[tuple[int, int]], list[Row]]]:
        """Each answer with its parts, and the rows of the whole answer and of what is left without each part."""
        return [self._apart(answer) for answer in table.to_pylist()]

    def compute(self, prepared: Sequence[tuple[Any, Any, list[Row]]], beat: Beat) -> tuple[Tables, Cost]:
        """One row of SPANS for each answer and latent; -1 where no part lowers it."""
        cost, records = Cost(), []
        for answer, spans, rows in prepared:
            readings = self._reader.read(rows, cost, beat)
            whole, *without = (
                dict(zip(readings[place].latents.tolist(), readings[place].values.tolist(), strict=True))
                for place in range(len(spans) + 1)
            )
            for latent in answer["latents"]:
                drops = [whole.get(latent, 0.0) - left.get(latent, 0.0) for left in without]
                start, end = spans[int(np.argmax(drops))] if max(drops) > 0 else (-1, -1)
                records.append({"ref": answer["ref"], "latent": latent, "start": start, "end": end, "truncated": False})
        return {"spans": pa.Table.from_pylist(records, schema=with_sink_columns(SPANS))}, cost

    def rejected(self, table: pa.Table, reason: str) -> Tables:
        """What is left of answers that cannot be read."""
        rows = [{"ref": ref, "reject": reason, "truncated": False} for ref in table["ref"].to_pylist()]
        return {"spans": pa.Table.from_pylist(rows, schema=with_sink_columns(SPANS))}

    def _apart(self, answer: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[int, int]], list[Row]]:
        text, spans = answer["text"], parts(answer["text"], self._limit)
        texts = [text, *(text[:start] + text[end:] for start, end in spans)]
        tokens = self._reader.chat.encode_responses(json.loads(answer["prompt"]), texts)
        answers = [(place, one.ids) for place, one in enumerate(tokens)]
        return answer, spans, answer_rows(answers, self._reader.settings.max_length)


def pair_slices(prompt_ids: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Where pairs are cut into slices, (start, stop); pairs of one prompt that follow one another stay together."""
    start = 0
    for row in range(1, len(prompt_ids)):
        is_new = prompt_ids[row] != prompt_ids[row - 1]
        if row - start >= 4 * _SLICE_ROWS or (is_new and row - start >= _SLICE_ROWS // 2):
            yield start, row
            start = row
    if len(prompt_ids):
        yield start, len(prompt_ids)


def text_slices(num_rows: int) -> Iterator[tuple[int, int]]:
    """Where texts are cut into slices, (start, stop)."""
    size = _SLICE_ROWS // 4
    return ((start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def _readers(group: PromptGroup, place: int, row_of: Mapping[str, int], file: int) -> tuple[list[int], Ref, list[int]]:
    """How many pairs have this response as their chosen and rejected one, the first of them, and the ids of all."""
    sides = [
        (row_of[pair.pair_id], side, pair.pair_id)
        for pair in group.pairs
        for side, own in enumerate((pair.chosen, pair.rejected))
        if own == place
    ]
    row, side, _ = min(sides)
    counts = [sum(own == side for _, own, _ in sides) for side in (0, 1)]
    return [*counts, 0], Ref(False, file, row, side, -1), [stable_int(pair_id) for *_, pair_id in sides]


def _record(unit: _Unit, reading: Reading) -> dict[str, Any]:
    return {
        "place": unit.place,
        "ref": unit.ref.pack(),
        "key": text_key(unit.text),
        "readers": unit.readers,
        "latents": reading.latents.astype(np.int32),
        "values": reading.values,
        "row_ids": unit.row_ids,
        "truncated": False,
    }


def _reject(row_id: int, reason: str) -> dict[str, Any]:
    return {"row_ids": [row_id], "reject": reason, "truncated": False}


def _tables(records: Sequence[Mapping[str, Any]]) -> Tables:
    return {"units": pa.Table.from_pylist(records, schema=with_sink_columns(UNITS))}

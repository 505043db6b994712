"""Ray Data actors that read latents off a reward model at sentence ends and at rewarded tokens: slices of Parquet files in, units out.

A slice is a few rows of one row group, chosen by the driver from the files alone: what a forward pass holds, and so every bit of
its result, is the same on any cluster.
"""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sarm.data.formats.sarm_folder import load_sarm
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.data.tokens.packing import Row, answer_rows, text_row, token_batches
from sarm.data.tokens.sentences import sentence_columns
from sarm.data.tokens.windows import text_windows
from sarm.interpret.context_texts import Ref, parts, sentence_spans, text_key
from sarm.passes.actor_progress import Progress, Source
from sarm.passes.models import sarm_settings
from sarm.passes.usage import device_of_worker
from sarm.settings.contexts import ContextsSettings
from sarm.settings.model import ModelSettings

SLICES = pa.schema(
    [
        pa.field("kind", pa.string()),
        pa.field("file", pa.int64()),
        pa.field("path", pa.string()),
        pa.field("row_group", pa.int64()),
        pa.field("first", pa.int64()),
        pa.field("rows", pa.list_(pa.int64())),
    ]
)
UNITS = pa.schema(
    [
        pa.field("place", pa.string()),
        pa.field("ref", pa.int64()),
        pa.field("key", pa.uint64()),
        pa.field("readers", pa.list_(pa.int64())),
        pa.field("latents", pa.list_(pa.int64())),
        pa.field("values", pa.list_(pa.float32())),
    ]
)


DROPS = pa.schema(
    [
        pa.field("ref", pa.int64()),
        pa.field("prompt", pa.string()),
        pa.field("text", pa.string()),
        pa.field("latents", pa.list_(pa.int64())),
    ]
)
SPANS = pa.schema([pa.field(name, pa.int64()) for name in ("ref", "latent", "start", "end")])


class Reader(NamedTuple):
    """What loads a SARM and its tokenizer in a worker."""

    folder: Path
    model: ModelSettings
    dtype: str
    batch_tokens: int

    def chat(self) -> ChatTokenizer:
        """The folder's tokenizer and template."""
        chat = load_chat_tokenizer(self.model, self.folder)
        # Texts are cut here; the tokenizer would warn of each long one.
        chat.tokenizer.model_max_length = 1 << 30
        return chat


def reader_of(folder: Path, settings: ContextsSettings, dtype: str) -> Reader:
    """What loads the SARM in `folder` on a worker.

    Raises UserError if it holds no reward model with latents, or its tokenizer cannot be loaded.
    """
    reader = Reader(folder, sarm_settings(folder), dtype, settings.batch_tokens)
    reader.chat()
    return reader


class LatentReader:
    """A SARM on this worker's GPU, else on its cores: rows of tokens in, active latents at every wanted place out."""

    def __init__(self, reader: Reader, threads: int):
        torch.set_num_threads(threads)
        self.chat, self._batch_tokens = reader.chat(), reader.batch_tokens
        self._device = device_of_worker()
        self._model: Any = load_sarm(reader.folder, getattr(torch, reader.dtype)).to(self._device)  # type: ignore[arg-type]

    def read(self, rows: Sequence[Row]) -> dict[Hashable, tuple[np.ndarray, np.ndarray]]:
        """Latents and values (zeros left out) of each key."""
        found: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {}
        for batch in token_batches([row for row in rows if row.taken], self._batch_tokens, self.chat.pad_id):
            with torch.inference_mode():
                output = self._model(**batch.model_inputs(self._device))
            latents, values = output.latent_indices.cpu().numpy(), output.latent_values.float().cpu().numpy()
            for key, latent, value in zip(batch.keys, latents, values, strict=True):
                found[key] = (latent[value != 0], value[value != 0])
        return found


class ContextUnits:
    """One slice in, its units with their active latents out."""

    def __init__(self, reader: Reader, source: Source, threads: int):
        self._latents, self._max_length = LatentReader(reader, threads), reader.model.max_length
        self._progress = Progress(source)
        self._held: tuple[tuple[str, int], pa.Table] | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.concat_tables(self.units(item) for item in batch.to_pylist())

    def units(self, item: dict[str, Any]) -> pa.Table:
        """UNITS of one row of SLICES."""
        table = self._row_group(item).take(item["rows"])
        make = self._of_pairs if item["kind"] == "pairs" else self._of_texts
        records, num_tokens = make(table, [item["first"] + row for row in item["rows"]], item["file"])
        self._progress.add(table.num_rows, num_tokens)
        return pa.Table.from_pylist(records, schema=UNITS)

    def _row_group(self, item: dict[str, Any]) -> pa.Table:
        # Slices of a row group come one after the other.
        place = (item["path"], item["row_group"])
        if self._held is None or self._held[0] != place:
            with pq.ParquetFile(item["path"], page_checksum_verification=True) as file:
                self._held = (place, file.read_row_group(item["row_group"]))
        return self._held[1]

    def _of_pairs(self, table: pa.Table, rows: Sequence[int], file: int) -> tuple[list[dict[str, Any]], int]:
        row_of = dict(zip(table["pair_id"].to_pylist(), rows, strict=True))
        # What cannot be encoded has no contexts; extraction, training and evaluation count it.
        groups = list(prompt_groups(table, self._latents.chat, offsets=True, refused={}))
        ends = {
            (group.prompt_id, place): sentence_columns(text, tokens.offsets)
            for group in groups
            for place, (text, tokens) in enumerate(zip(group.responses, group.tokens, strict=True))
        }
        columns: dict[Hashable, Sequence[int]] = {key: list(found) for key, found in ends.items()}
        packed = [row for group in groups for row in group.rows(self._max_length, columns)]
        found = self._latents.read(packed)
        records = []
        for group in groups:
            for place, text in enumerate(group.responses):
                readers, ref = _readers(group, place, row_of, file)
                key = (group.prompt_id, place)
                records.append(_record("rewarded", ref, text, readers, found[key]))
                spans = sentence_spans(text)
                for column, sentence in ends[key].items():
                    start, end = spans[sentence]
                    records.append(
                        _record(
                            "sentence", ref._replace(sentence=sentence), text[start:end], readers, found[key, column]
                        )
                    )
        return records, sum(len(row.ids) for row in packed)

    def _of_texts(self, table: pa.Table, rows: Sequence[int], file: int) -> tuple[list[dict[str, Any]], int]:
        packed, wanted = [], []
        for row, text in zip(rows, table["text"].to_pylist(), strict=True):
            spans = sentence_spans(text)
            for window in text_windows(row, text, ["document"], "rules", self._latents.chat, self._max_length):
                key, columns = (row, window.first), window.columns["document"].tolist()
                packed.append(text_row(key, window.ids.tolist(), columns))
                for column, number in zip(columns, window.sentences.tolist(), strict=True):
                    start, end = spans[number]
                    wanted.append(((key, column), Ref(True, file, row, 0, number), text[start:end]))
        found = self._latents.read(packed)
        records = [_record("sentence", ref, text, [0, 0, 1], found[key]) for key, ref, text in wanted]
        return records, sum(len(row.ids) for row in packed if row.taken)


class SentenceDrops:
    """Answers in, for each wanted latent the part without which it loses most of its activation at the rewarded token out.

    Leaving a part out costs one forward pass for all latents at once, where a gradient would cost one backward pass a latent, and
    it is the difference itself, not its linear approximation; what parts do only together it cannot see.
    """

    def __init__(self, reader: Reader, limit: int, source: Source, threads: int):
        self._latents, self._limit, self._progress = LatentReader(reader, threads), limit, Progress(source)
        self._max_length = reader.model.max_length

    def __call__(self, batch: pa.Table) -> pa.Table:
        found: list[dict[str, Any]] = []
        num_tokens = 0
        for item in batch.to_pylist():
            spans = parts(item["text"], self._limit)
            if not spans:
                continue
            texts = [item["text"], *(item["text"][:a] + item["text"][b:] for a, b in spans)]
            tokens = self._latents.chat.encode_responses(json.loads(item["prompt"]), texts)
            rows = answer_rows([(place, one.ids) for place, one in enumerate(tokens)], self._max_length)
            num_tokens += sum(len(row.ids) for row in rows)
            read = self._latents.read(rows)
            whole = dict(zip(*(part.tolist() for part in read[0]), strict=True))
            without = [
                dict(zip(*(part.tolist() for part in read[place]), strict=True)) for place in range(1, len(texts))
            ]
            for latent in item["latents"]:
                drops = [whole.get(latent, 0.0) - left.get(latent, 0.0) for left in without]
                start, end = spans[int(np.argmax(drops))] if max(drops) > 0 else (-1, -1)
                found.append({"ref": item["ref"], "latent": latent, "start": start, "end": end})
        self._progress.add(batch.num_rows, num_tokens)
        return pa.Table.from_pylist(found, schema=SPANS)


def _readers(group: PromptGroup, place: int, row_of: dict[str, int], file: int) -> tuple[list[int], Ref]:
    """How many pairs have this response as their chosen and rejected one, and the first of them."""
    sides = [
        (row_of[pair.pair_id], side)
        for pair in group.pairs
        for side, own in enumerate((pair.chosen, pair.rejected))
        if own == place
    ]
    row, side = min(sides)
    return [sum(s == 0 for _, s in sides), sum(s == 1 for _, s in sides), 0], Ref(False, file, row, side, -1)


def _record(
    place: str, ref: Ref, text: str, readers: list[int], active: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    return {
        "place": place,
        "ref": ref.pack(),
        "key": text_key(text),
        "readers": readers,
        "latents": active[0],
        "values": active[1],
    }

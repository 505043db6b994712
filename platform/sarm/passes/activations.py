"""What actors compute: a table of texts or pairs in, activations out.

Each has `prepare` (tokenising; may run beside another block's forward pass), `compute` (the forward passes, one block at a time) and
`rejected` (rows for the sink that say why an input gave nothing).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from sarm.contracts.ids import stable_int
from sarm.contracts.passes import Beat, Cost, Tables, Target
from sarm.contracts.tables import TRUE_END
from sarm.data.formats.models import backbone_of
from sarm.data.store.activations import activation_table
from sarm.data.store.parts import with_sink_columns
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.data.tokens.packing import Row, collate, row_batches
from sarm.data.tokens.windows import Places, Window, chat_windows, collate_windows, text_windows, window_batches
from sarm.nn.backbone import residuals_at
from sarm.passes.usage import ForwardClock, device_of_worker, keep_freed_memory
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.model import ModelSettings

# Key columns and what is counted instead of stored, by the names of activations/v1.
Keys = dict[str, Any]
# Reasons of a place by the code that `_stored` gives it.
_REASONS = np.array([None, "not_finite", "overflow"], dtype=object)
# Of a text without a place that the unit takes.
_NOTHING_TAKEN = {"token": "no_token", "chat": "not_rendered"}
_BLANK = {
    "row_id": 0,
    "doc_id": "",
    "side": "text",
    "position": -1,
    "token_id": -1,
    "num_tokens": 0,
    "truncated": False,
    "kind": TRUE_END,
}


class Backbone:
    """The truncated backbone on this worker's GPU, else on its cores."""

    def __init__(
        self,
        model: ModelSettings,
        folder: str,
        extraction: ExtractionSettings,
        schemas: Mapping[Target, pa.Schema],
        threads: int,
    ):
        torch.set_num_threads(threads)
        keep_freed_memory()
        self._device, self._extraction, self._schemas = device_of_worker(), extraction, dict(schemas)
        self._chat, self._max_length = load_chat_tokenizer(model, folder), model.max_length
        self._layers = sorted({target.layer for target in schemas})
        dtype = getattr(torch, model.dtype)
        backbone = backbone_of(model, folder, self._layers[-1], dtype)
        self._backbone = backbone.eval().to(self._device)
        self._clock = ForwardClock(self._device)
        self._stored_dtype = getattr(torch, extraction.dtype)

    def _taken(self, cost: Cost, num_tokens: int, **inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(16-bit vectors, codes of `_REASONS`) for each layer, on their way to the CPU."""
        on_device = {name: tensor.to(self._device, non_blocking=True) for name, tensor in inputs.items()}
        with torch.inference_mode(), self._clock.running():
            found = [self._stored(x_ND) for x_ND in residuals_at(self._backbone, self._layers, **on_device)]
        cost.tokens, cost.padded_tokens = cost.tokens + num_tokens, cost.padded_tokens + inputs["input_ids"].numel()
        return found

    def _stored(self, x_ND: Float[Tensor, "rows d_in"]) -> tuple[Float[Tensor, "rows d_in"], UInt8[Tensor, " rows"]]:
        stored_ND = x_ND.to(self._stored_dtype)
        is_finite = x_ND.isfinite().all(-1)
        fits = stored_ND.isfinite().all(-1)
        return _to_host(stored_ND), _to_host((~is_finite).byte() + 2 * (is_finite & ~fits).byte())

    def _split_on_oom(self, members: list[Any], forward: Callable[[list[Any]], Any]) -> list[tuple[list[Any], Any]]:
        """(members, result) of parts that fit the memory; the result of a single one that does not is None."""
        try:
            return [(members, forward(members))]
        except torch.OutOfMemoryError:
            if len(members) == 1:
                return [(members, None)]
        # Behind the handler: the error holds the tensors of the pass that failed.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(members) // 2
        return self._split_on_oom(members[:half], forward) + self._split_on_oom(members[half:], forward)

    def _ready(self, cost: Cost) -> None:
        """Wait for all passes, and add up their time."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        cost.forward_seconds += self._clock.seconds()

    def _read(self, rows: Sequence[Row], cost: Cost, beat: Beat) -> "_Found":
        """What the model has at every wanted token of packed rows."""
        place_of: dict[Hashable, int | None] = {}
        found: list[list[tuple[Tensor, Tensor]]] = []

        def forward(members: list[Row]) -> tuple[list[Any], list[tuple[Tensor, Tensor]]]:
            batch = collate(members, self._chat.pad_id)
            inputs = {"rows": batch.rows, "columns": batch.columns, "input_ids": batch.input_ids}
            places = {"positions": batch.position_ids, "segments": batch.segment_ids}
            return batch.keys, self._taken(cost, sum(len(row.ids) for row in members), **inputs, **places)

        num_places = 0
        for part in row_batches(rows, self._extraction.batch_tokens):
            for members, result in self._split_on_oom(part, forward):
                if result is None:
                    place_of.update({key: None for row in members for key, _ in row.taken})
                    continue
                place_of.update({key: num_places + i for i, key in enumerate(result[0])})
                num_places += len(result[0])
                found.append(result[1])
            beat()
        self._ready(cost)
        return _Found(place_of, found)

    def _of_records(
        self, target: Target, records: Sequence[tuple[Hashable, Keys]], read: "_Found", left_out: Sequence[Keys]
    ) -> pa.Table:
        """The table of a target: a row for each record, which names a wanted token and gives its keys, and `left_out` with their reasons."""
        if not read.found:
            return self._blank(target, [row | {"reject": "out_of_memory"} for _, row in records] + [*left_out])
        where = [read.place_of[key] for key, _ in records]
        index = torch.tensor([0 if place is None else place for place in where], dtype=torch.long)
        number = self._layers.index(target.layer)
        x_ND = torch.cat([result[number][0] for result in read.found])[index]
        codes = torch.cat([result[number][1] for result in read.found])[index].numpy()
        reasons = ["out_of_memory" if place is None else _REASONS[c] for place, c in zip(where, codes, strict=True)]
        columns = {name: [row.get(name, blank) for _, row in records] for name, blank in _BLANK.items()}
        table = self._table(target, columns | {"reject": reasons}, x_ND)
        return pa.concat_tables([table, self._blank(target, left_out)]) if left_out else table

    def _table(self, target: Target, columns: dict[str, Any], x_ND: Float[Tensor, "rows d_in"]) -> pa.Table:
        return activation_table(columns, x_ND, self._extraction.dtype, with_sink_columns(self._schemas[target]))

    def _blank(self, target: Target, rows: Sequence[Keys]) -> pa.Table:
        width = self._schemas[target].field("activation").type.byte_width // 2
        names = with_sink_columns(self._schemas[target]).names
        columns = {name: [{**_BLANK, **row}[name] for row in rows] for name in names if name != "activation"}
        return self._table(target, columns, torch.zeros(len(rows), width))


class _Found(NamedTuple):
    """What forward passes over packed rows gave."""

    place_of: dict[Hashable, int | None]
    """Where the token of a key is in the results put together; None if its row did not fit the memory."""
    found: list[list[tuple[Tensor, Tensor]]]
    """Of each pass and layer, what `Backbone._taken` gives."""


class TextActivations(Backbone):
    """A table of corpus/v1 in; for every target one row for each token that its unit takes."""

    def prepare(self, table: pa.Table) -> tuple[list[int], list[Window], dict[int, str]]:
        """Row ids, the windows of all texts, and why conversations have none."""
        units = sorted({target.unit for target in self._schemas})
        row_ids = table.column("row_id").to_pylist()
        texts = zip(row_ids, table.column("text").to_pylist(), strict=True)
        splitter, chat, length = self._extraction.sentence_ends, self._chat, self._max_length
        windows = [
            w
            for i, text in texts
            for w in text_windows(row_id=i, text=text, units=units, splitter=splitter, chat=chat, max_length=length)
        ]
        refused: dict[int, str] = {}
        if "chat" in units:
            conversations = zip(row_ids, table.column("messages").to_pylist(), strict=True)
            windows += [w for i, messages in conversations for w in chat_windows(i, messages, chat, refused)]
        return row_ids, windows, refused

    def compute(self, prepared: tuple[list[int], list[Window], dict[int, str]], beat: Beat) -> tuple[Tables, Cost]:
        """The tables of all targets, texts in their order."""
        row_ids, windows, refused = prepared
        cost, done, failed = Cost(), [], []
        cost.note(window.spelled for window in windows)

        def forward(members: list[int]) -> list[tuple[Tensor, Tensor]]:
            batch = collate_windows(windows, members, self._chat.pad_id)
            tokens = sum(len(windows[n].ids) for n in members)
            return self._taken(cost, tokens, rows=batch.rows, columns=batch.columns, input_ids=batch.input_ids)

        for batch in window_batches(windows, self._extraction.batch_tokens):
            for members, found in self._split_on_oom(batch, forward):
                if found is None:
                    failed += members
                else:
                    done.append((members, found))
            beat()
        self._ready(cost)
        places = Places(windows, [n for members, _ in done for n in members])
        tables: Tables = {}
        for number, layer in enumerate(self._layers):
            x_ND = torch.cat([found[number][0] for _, found in done]) if done else torch.zeros(0, 0)
            codes = np.concatenate([found[number][1].numpy() for _, found in done] or [np.zeros(0, np.uint8)])
            for target in self._schemas:
                if target.layer != layer:
                    continue
                chosen = places.of(target.unit)
                lost = [windows[n] for n in failed if target.unit in windows[n].columns]
                rows = [{"row_id": w.row_id, "position": w.first, "reject": "out_of_memory"} for w in lost]
                empty = set(row_ids) - set(places.row_ids[chosen].tolist()) - {w.row_id for w in lost}
                reason = _NOTHING_TAKEN.get(target.unit, "no_sentence_end")
                known = refused if target.unit == "chat" else {}
                rows += [{"row_id": i, "reject": known.get(i, reason)} for i in row_ids if i in empty]
                blank = self._blank(target, rows)
                if len(chosen):
                    columns = places.columns(chosen) | {"reject": pa.array(_REASONS[codes[chosen]], pa.string())}
                    blank = pa.concat_tables([self._table(target, columns, x_ND[torch.from_numpy(chosen)]), blank])
                tables[target] = blank
        return tables, cost

    def rejected(self, table: pa.Table, reason: str) -> Tables:
        """What is left of texts that cannot be computed."""
        rows = [{"row_id": row_id, "reject": reason} for row_id in table.column("row_id").to_pylist()]
        return {target: self._blank(target, rows) for target in self._schemas}


class ChatActivations(Backbone):
    """A table of pairs/v1 in; one row per pair and side for every target. Each distinct response goes through the model once."""

    def prepare(self, table: pa.Table) -> tuple[list[PromptGroup], dict[str, str]]:
        """The prompts with their responses, tokenised; and pairs that cannot be, with the reason."""
        refused: dict[str, str] = {}
        return list(prompt_groups(table, self._chat, refused=refused)), refused

    def compute(self, prepared: tuple[list[PromptGroup], dict[str, str]], beat: Beat) -> tuple[Tables, Cost]:
        """The tables of all targets, prompt by prompt."""
        groups, refused = prepared
        cost = Cost()
        cost.note(group.spelled for group in groups)
        read = self._read([row for group in groups for row in group.rows(self._max_length)], cost, beat)
        records = [record for group in groups for record in pair_records(group)]
        left_out = pair_rejects(refused)
        return {target: self._of_records(target, records, read, left_out) for target in self._schemas}, cost

    def rejected(self, table: pa.Table, reason: str) -> Tables:
        """What is left of pairs that cannot be computed."""
        rows = pair_rejects(dict.fromkeys(table.column("pair_id").to_pylist(), reason))
        return {target: self._blank(target, rows) for target in self._schemas}


def pair_rejects(refused: Mapping[str, str]) -> list[Keys]:
    """Key columns of both sides of pairs that give nothing, with the reason."""
    return [
        {"row_id": stable_int(pair_id), "side": side, "reject": reason}
        for pair_id, reason in refused.items()
        for side in ("chosen", "rejected")
    ]


def _to_host(tensor: Shaped[Tensor, " *shape"]) -> Shaped[Tensor, " *shape"]:
    """A copy in pinned memory that is complete after the next synchronisation."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def pair_records(group: PromptGroup) -> list[tuple[Hashable, Keys]]:
    """(key of the response, key columns) for both sides of every pair."""
    found: list[tuple[Hashable, Keys]] = []
    for pair in group.pairs:
        for side, place in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            tokens = group.tokens[place]
            row = {
                "row_id": stable_int(pair.pair_id),
                # Pairs of one prompt share responses: what keeps documents apart has to keep prompts apart.
                "doc_id": group.prompt_id,
                "side": side,
                "position": len(tokens.ids) - 1,
                "token_id": tokens.ids[-1],
                "num_tokens": len(tokens.ids),
                "truncated": tokens.num_truncated > 0,
            }
            found.append(((group.prompt_id, place), row))
    return found

"""Ray Data actors that hold a model: batches of texts or pairs in, activations or rewards out."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from sarm import schema
from sarm.config import Extraction, Model
from sarm.data.activations import activation_table
from sarm.data.artifacts import load_sarm
from sarm.data.chat import load_chat_tokenizer
from sarm.data.groups import prompt_groups
from sarm.data.packing import Row, text_row, token_batches
from sarm.data.windows import text_windows
from sarm.nn.backbone import load_backbone, residual_stream

_PRINT_EVERY_SECONDS = 5.0


class Source(NamedTuple):
    """What all actors of one pass have to read, for their progress lines."""

    name: str
    num_rows: int


class Progress:
    """Prints how far an actor is, every few seconds."""

    def __init__(self, source: Source):
        self._source, self._rows, self._tokens = source, 0, 0
        self._started = self._printed = time.monotonic()

    def add(self, rows: int, tokens: int) -> None:
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens
        now = time.monotonic()
        if now - self._printed >= _PRINT_EVERY_SECONDS or self._rows >= self._source.num_rows:
            self._printed = now
            elapsed = now - self._started
            left = elapsed * max(0.0, self._source.num_rows / max(1, self._rows) - 1)
            rate = self._tokens / max(elapsed, 1e-9)
            print(
                f"{self._source.name} {self._rows:,} of {self._source.num_rows:,} rows  {rate:,.0f} tokens/s  {left:.0f} s left",
                flush=True,
            )


class _BackboneActor:
    """Holds the truncated backbone on this worker's GPU, else on its cores."""

    def __init__(
        self, model: Model, folder: str, extraction: Extraction, table_schema: pa.Schema, source: Source, threads: int
    ):
        torch.set_num_threads(threads)
        self._device, self._extraction, self._schema = device_of_worker(), extraction, table_schema
        self._chat, self._max_length = load_chat_tokenizer(model, folder), model.max_length
        dtype = getattr(torch, model.dtype)
        backbone = load_backbone(folder, model.layer, dtype, revision=model.revision, gguf_file=model.gguf_file)
        self._backbone = backbone.eval().to(self._device)
        self._progress = Progress(source)

    def _forward(self, rows: list[Row]) -> dict[Any, torch.Tensor]:
        """Residual vector at every wanted place of the rows, in float32 on the CPU."""
        found: dict[Any, torch.Tensor] = {}
        for batch in token_batches(
            [row for row in rows if row.taken], self._extraction.batch_tokens, self._chat.pad_id
        ):
            inputs = batch.model_inputs(self._device)
            with torch.inference_mode():
                hidden = residual_stream(
                    self._backbone, inputs["input_ids"], inputs["position_ids"], inputs["segment_ids"]
                )
                taken = hidden[inputs["rewarded_rows"], inputs["rewarded_columns"]].float().cpu()
            found.update(zip(batch.keys, taken, strict=True))
        return found


class TextActivations(_BackboneActor):
    """A batch of corpus/v1 rows in, one row per sentence end (or, as `extraction.unit` says, per token) out."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[Row] = []
        places: dict[Any, dict[str, Any]] = {}
        unusable: list[dict[str, Any]] = []
        for row_id, text in zip(batch.column("row_id").to_pylist(), batch.column("text").to_pylist(), strict=True):
            windows = text_windows(text, self._chat, self._max_length, sentences=self._extraction.unit == "sentence")
            for start, ids, columns, _ in windows:
                rows.append(text_row((row_id, start), ids, columns))
                for column in columns:
                    places[(row_id, start), column] = {
                        "row_id": row_id,
                        "doc_id": f"{row_id:016x}",
                        "side": "text",
                        "position": start + column,
                        "token_id": ids[column],
                        "num_tokens": len(ids),
                        "truncated": False,
                    }
            if not any(window.columns for window in windows):
                unusable.append({"row_id": row_id, "side": "text", "reject": "no_sentence_end"})
        found = self._forward(rows)
        self._progress.add(batch.num_rows, sum(len(row.ids) for row in rows if row.taken))
        return _for_sink(places, found, unusable, self._extraction.dtype, self._schema)


class ChatActivations(_BackboneActor):
    """A batch of pairs/v1 rows in, one row per pair and side out; each distinct response goes through the model once."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        groups = list(prompt_groups(batch, self._chat))
        rows = [row for group in groups for row in group.rows(self._max_length)]
        responses = self._forward(rows)
        places, found = {}, {}
        for group in groups:
            for pair in group.pairs:
                for side, place in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                    tokens, key = group.tokens[place], (pair.pair_id, side)
                    found[key] = responses[group.prompt_id, place]
                    places[key] = {
                        "row_id": schema.stable_int(pair.pair_id),
                        # Pairs of one prompt share responses: what keeps documents apart has to keep prompts apart.
                        "doc_id": group.prompt_id,
                        "side": side,
                        "position": len(tokens.ids) - 1,
                        "token_id": tokens.ids[-1],
                        "num_tokens": len(tokens.ids),
                        "truncated": tokens.num_truncated > 0,
                    }
        self._progress.add(batch.num_rows, sum(len(row.ids) for row in rows))
        return _for_sink(places, found, [], self._extraction.dtype, self._schema)


class PairScores:
    """A batch of pairs/v1 rows in, their rewards (and active latents, if the head has any) out."""

    def __init__(
        self, model: Model, folder: str, reward_model: Path, extraction: Extraction, source: Source, threads: int
    ):
        torch.set_num_threads(threads)
        self._device, self._extraction = device_of_worker(), extraction
        self._chat, self._max_length = load_chat_tokenizer(model, folder), model.max_length
        self._model = load_sarm(reward_model, getattr(torch, model.dtype)).to(self._device)  # type: ignore[arg-type]
        self._progress = Progress(source)

    def __call__(self, batch: pa.Table) -> pa.Table:
        groups = list(prompt_groups(batch, self._chat))
        rows = [row for group in groups for row in group.rows(self._max_length)]
        scored: dict[Any, dict[str, Any]] = {}
        for tokens in token_batches(rows, self._extraction.batch_tokens, self._chat.pad_id):
            with torch.inference_mode():
                output = self._model(**tokens.model_inputs(self._device))
            for i, (key, reward) in enumerate(zip(tokens.keys, output.logits.squeeze(-1).cpu().tolist(), strict=True)):
                scored[key] = {"reward": reward, **_active(output, i)}
        out = []
        for group in groups:
            for pair in group.pairs:
                record: dict[str, Any] = {
                    "pair_id": pair.pair_id,
                    "prompt_id": group.prompt_id,
                    "subset": pair.subset,
                    "truncated": False,
                }
                for side, place in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                    values = scored[group.prompt_id, place] | {"tokens": len(group.tokens[place].ids)}
                    record |= {f"{side}_{name}": value for name, value in values.items()}
                    record["truncated"] |= group.tokens[place].num_truncated > 0
                out.append(record)
        self._progress.add(batch.num_rows, sum(len(row.ids) for row in rows))
        return pa.Table.from_pylist(out, schema=_with_sink_columns(schema.PAIR_SCORES))


def device_of_worker() -> torch.device:
    """The GPU that Ray gave this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _for_sink(
    places: dict[Any, dict[str, Any]],
    found: dict[Any, torch.Tensor],
    unusable: list[dict[str, Any]],
    dtype: str,
    table_schema: pa.Schema,
) -> pa.Table:
    """Rows for the sink: activations, those that 16 bits cannot hold marked, and inputs that gave none."""
    d_in = table_schema.field("activation").type.byte_width // 2
    keys = sorted(places)
    x_ND = torch.stack([found[key] for key in keys]) if keys else torch.zeros(0, d_in)
    fits = x_ND.to(getattr(torch, dtype)).isfinite().all(-1).tolist()
    records = [{**places[key], "reject": None if ok else "not_finite"} for key, ok in zip(keys, fits, strict=True)]
    blank = {"doc_id": "", "position": -1, "token_id": -1, "num_tokens": 0, "truncated": False}
    records += [{**blank, **row} for row in unusable]
    x_ND = torch.cat([x_ND, torch.zeros(len(unusable), d_in)])
    names = (*table_schema.names[:-1], "reject", "truncated")
    return activation_table(
        {name: [record[name] for record in records] for name in names}, x_ND, dtype, _with_sink_columns(table_schema)
    )


def _with_sink_columns(table_schema: pa.Schema) -> pa.Schema:
    return table_schema.append(pa.field("reject", pa.string())).append(pa.field("truncated", pa.bool_()))


def _active(output: Any, i: int) -> dict[str, Any]:
    if output.latent_values is None:
        return {"latents": [], "values": []}
    on = output.latent_values[i] != 0
    return {"latents": output.latent_indices[i][on].tolist(), "values": output.latent_values[i][on].tolist()}

"""Ray Data pipelines over actors that hold a model: activations of texts and responses, and rewards of pairs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext

from sarm import schema
from sarm.config import Extraction, Model, Run, UserError
from sarm.data.activations import activation_table
from sarm.data.artifacts import load_sarm
from sarm.data.chat import load_chat_tokenizer
from sarm.data.groups import PromptGroup, prompt_groups
from sarm.data.packing import Row, text_row, token_batches
from sarm.data.sentences import sentence_end_tokens, sentence_ends
from sarm.nn.backbone import load_backbone, residual_stream
from sarm.runtime.cluster import Cluster
from sarm.runtime.parquet_sink import ParquetSink, read_counts, remove_temporaries

_BATCH_ROWS = 64
# Ray's own default lets a starved pipeline hang for half an hour.
_NO_PROGRESS_SECONDS = 300


def device_of_worker() -> torch.device:
    """The GPU that Ray gave this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class TextActivations:
    """Actor: a batch of corpus/v1 rows in, one row per sentence end out."""

    def __init__(self, model: Model, folder: str, extraction: Extraction, table_schema: pa.Schema, threads: int):
        torch.set_num_threads(threads)
        self._device, self._extraction, self._schema = device_of_worker(), extraction, table_schema
        self._chat = load_chat_tokenizer(model, folder)
        dtype = getattr(torch, model.dtype)
        self._backbone = (
            load_backbone(folder, model.layer, dtype, revision=model.revision, gguf_file=model.gguf_file)
            .eval()
            .to(self._device)
        )
        self._max_length = model.max_length

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[Row] = []
        places: dict[Any, dict[str, Any]] = {}
        unusable: list[dict[str, Any]] = []
        for row_id, text in zip(batch.column("row_id").to_pylist(), batch.column("text").to_pylist(), strict=True):
            windows = self._windows(text)
            for start, ids, columns in windows:
                rows.append(text_row((row_id, start), ids, columns))
                for column in columns:
                    places[(row_id, start), column] = {
                        "row_id": row_id,
                        "doc_id": f"{row_id:016x}",
                        "side": "text",
                        "position": start + column,
                        "token_id": ids[column],
                        "num_tokens": len(ids),
                        "reject": None,
                        "truncated": False,
                    }
            if not any(columns for _, _, columns in windows):
                unusable.append({"row_id": row_id, "side": "text", "reject": "no_sentence_end"})
        found = _forward(self._backbone, rows, self._extraction.batch_tokens, self._chat.pad_id, self._device)
        return _with_rejects(places, found, unusable, self._extraction.dtype, self._schema)

    def _windows(self, text: str) -> list[tuple[int, list[int], list[int]]]:
        """(first token, ids, columns of sentence ends) of the text cut into windows of `max_length` tokens."""
        encoded = self._chat.encode_text(text)
        ends = sentence_end_tokens(sentence_ends(text), encoded.offsets)
        prefix = [] if self._chat.bos_id is None else [self._chat.bos_id]
        width = self._max_length - len(prefix)
        windows = []
        for start in range(0, len(encoded.ids), width):
            ids = prefix + encoded.ids[start : start + width]
            windows.append((start, ids, [end - start + len(prefix) for end in ends if start <= end < start + width]))
        return windows


class ChatActivations:
    """Actor: a batch of pairs/v1 rows in, one row per pair and side out; each distinct response goes through the model once."""

    def __init__(self, model: Model, folder: str, extraction: Extraction, table_schema: pa.Schema, threads: int):
        torch.set_num_threads(threads)
        self._device, self._extraction, self._schema = device_of_worker(), extraction, table_schema
        self._chat = load_chat_tokenizer(model, folder)
        dtype = getattr(torch, model.dtype)
        self._backbone = (
            load_backbone(folder, model.layer, dtype, revision=model.revision, gguf_file=model.gguf_file)
            .eval()
            .to(self._device)
        )
        self._max_length = model.max_length

    def __call__(self, batch: pa.Table) -> pa.Table:
        groups = list(prompt_groups(batch, self._chat))
        rows = [row for group in groups for row in group.rows(self._max_length)]
        responses = _forward(self._backbone, rows, self._extraction.batch_tokens, self._chat.pad_id, self._device)
        places, found = {}, {}
        for group in groups:
            for pair in group.pairs:
                for side, place in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                    tokens = group.tokens[place]
                    key = (pair.pair_id, side)
                    found[key] = responses[group.prompt_id, place]
                    places[key] = {
                        "row_id": schema.stable_int(pair.pair_id),
                        "doc_id": pair.pair_id,
                        "side": side,
                        "position": len(tokens.ids) - 1,
                        "token_id": tokens.ids[-1],
                        "num_tokens": len(tokens.ids),
                        "reject": None,
                        "truncated": tokens.num_truncated > 0,
                    }
        return _with_rejects(places, found, [], self._extraction.dtype, self._schema)


class PairScores:
    """Actor: a batch of pairs/v1 rows in, their rewards (and active latents, if the head has any) out."""

    def __init__(self, model: Model, folder: str, reward_model: Path, extraction: Extraction, threads: int):
        torch.set_num_threads(threads)
        self._device, self._extraction = device_of_worker(), extraction
        self._chat = load_chat_tokenizer(model, folder)
        self._model = load_sarm(reward_model, getattr(torch, model.dtype)).to(self._device)
        self._max_length = model.max_length

    def __call__(self, batch: pa.Table) -> pa.Table:
        groups = list(prompt_groups(batch, self._chat))
        scored = {}
        rows = [row for group in groups for row in group.rows(self._max_length)]
        for tokens in token_batches(rows, self._extraction.batch_tokens, self._chat.pad_id):
            with torch.inference_mode():
                output = self._model(**tokens.model_inputs(self._device))
            rewards = output.logits.squeeze(-1).cpu().tolist()
            for i, key in enumerate(tokens.keys):
                scored[key] = (rewards[i], *_active(output, i))
        out = []
        for group in groups:
            for pair in group.pairs:
                chosen, rejected = scored[group.prompt_id, pair.chosen], scored[group.prompt_id, pair.rejected]
                out.append(
                    {
                        "pair_id": pair.pair_id,
                        "prompt_id": group.prompt_id,
                        "subset": pair.subset,
                        "chosen_reward": chosen[0],
                        "rejected_reward": rejected[0],
                        "chosen_tokens": len(group.tokens[pair.chosen].ids),
                        "rejected_tokens": len(group.tokens[pair.rejected].ids),
                        "chosen_latents": chosen[1],
                        "chosen_values": chosen[2],
                        "rejected_latents": rejected[1],
                        "rejected_values": rejected[2],
                        "reject": None,
                        "truncated": _truncated(group, pair.chosen) or _truncated(group, pair.rejected),
                    }
                )
        return pa.Table.from_pylist(out, schema=_extended(schema.PAIR_SCORES))


def run_over(
    source: Sequence[Path],
    keep: Callable[[pa.Table], pa.Table] | None,
    actor: type,
    arguments: dict[str, Any],
    table_schema: pa.Schema,
    folder: Path,
    rows_per_file: int,
    run: Run,
    cluster: Cluster,
) -> dict[str, Any]:
    """Stream Parquet files through a pool of actors into Parquet files in `folder`; returns the sink's counts.

    Raises UserError if the pool does not fit the cluster, or no row comes out.
    """
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.max_errored_blocks = 0
    context.execution_no_progress_timeout_s = _NO_PROGRESS_SECONDS
    context.print_on_execution_start = False
    threads = cluster.cpus_each(run, run.num_actors)
    data = ray.data.read_parquet([str(path) for path in source])
    if keep is not None:
        data = data.map_batches(keep, batch_format="pyarrow")
    data = data.map_batches(
        actor,
        fn_constructor_kwargs={**arguments, "threads": threads},
        batch_size=_BATCH_ROWS,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=run.num_actors),
        num_cpus=threads,
        num_gpus=1 if cluster.use_gpu else None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    data.write_datasink(ParquetSink(folder, table_schema, rows_per_file))
    remove_temporaries(folder)
    counts = read_counts(folder)
    if counts["rows"] == 0:
        raise UserError(
            f"nothing usable came out of {len(source)} files: {counts['rejected'] or 'they are empty'}. Look at the source."
        )
    return counts


def _forward(
    backbone: Any, rows: list[Row], batch_tokens: int, pad_id: int, device: torch.device
) -> dict[Any, torch.Tensor]:
    """Residual vector at every wanted place of the rows, in float32 on the CPU."""
    found = {}
    for batch in token_batches([row for row in rows if row.taken], batch_tokens, pad_id):
        inputs = batch.model_inputs(device)
        with torch.inference_mode():
            hidden = residual_stream(backbone, inputs["input_ids"], inputs["position_ids"], inputs["segment_ids"])
            taken = hidden[inputs["rewarded_rows"], inputs["rewarded_columns"]].float().cpu()
        found.update(zip(batch.keys, taken, strict=True))
    return found


def _with_rejects(
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
    columns = {name: [record[name] for record in records] for name in (*table_schema.names[:-1], "reject", "truncated")}
    table = activation_table(columns, x_ND, dtype, table_schema)
    return table.append_column("reject", pa.array(columns["reject"], pa.string())).append_column(
        "truncated", pa.array(columns["truncated"], pa.bool_())
    )


def _extended(table_schema: pa.Schema) -> pa.Schema:
    return table_schema.append(pa.field("reject", pa.string())).append(pa.field("truncated", pa.bool_()))


def _active(output: Any, i: int) -> tuple[list[int], list[float]]:
    if output.latent_values is None:
        return [], []
    on = output.latent_values[i] > 0
    return output.latent_indices[i][on].tolist(), output.latent_values[i][on].tolist()


def _truncated(group: PromptGroup, place: int) -> bool:
    return group.tokens[place].num_truncated > 0

"""The codes stage of an audit: every response through the SARM once, on the cluster, into codes/v2."""

import collections
import shutil
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch

from sarm.audit.codes import CODE_PAIRS, RESPONSES
from sarm.contracts.ids import response_id_of
from sarm.data.formats.sarm_folder import load_sarm
from sarm.data.store.parts import with_sink_columns
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.data.tokens.groups import prompt_groups
from sarm.data.tokens.packing import TokenBatch, token_batches
from sarm.data.tokens.sentences import sentence_columns
from sarm.engine.ray.cluster import Cluster
from sarm.engine.ray.parquet_sink import ParquetSink
from sarm.engine.ray.passes import through_actors
from sarm.nn.backbone import residual_stream
from sarm.nn.sae import standardise
from sarm.passes.actor_progress import Progress, Source
from sarm.passes.models import sarm_settings
from sarm.passes.usage import device_of_worker
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings

_BATCH_ROWS = 64


class ResponseCodes:
    """A batch of pairs in, a row of codes per distinct response out."""

    def __init__(self, reward_model: Path, batch_tokens: int, source: Source, threads: int):
        torch.set_num_threads(threads)
        # Loading the model registers its type, which the tokenizer's loader asks for.
        self._model = load_sarm(reward_model).to(device_of_worker())  # type: ignore[arg-type]
        self._chat = load_chat_tokenizer(sarm_settings(reward_model), reward_model)
        self._batch_tokens, self._progress = batch_tokens, Progress(source)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows, out = [], {}
        columns: dict[Hashable, Sequence[int]] = {}
        prompt_of = dict(zip(batch["pair_id"].to_pylist(), batch["prompt"].to_pylist(), strict=True))
        for group in prompt_groups(batch, self._chat, offsets=True, refused={}):
            spelt = {place: prompt_of[pair.pair_id] for pair in group.pairs for place in (pair.chosen, pair.rejected)}
            for place, (text, tokens) in enumerate(zip(group.responses, group.tokens, strict=True)):
                key = (group.prompt_id, place)
                columns[key] = list(sentence_columns(text, tokens.offsets))
                out[key] = {
                    "response_id": response_id_of(spelt[place], text),
                    "prompt_id": group.prompt_id,
                    "answer_tokens": sum(start < end for start, end in tokens.offsets),
                    "truncated": tokens.num_truncated > 0,
                }
            rows += group.rows(self._chat.max_length, columns)
        found: dict[Any, dict[str, Any]] = {}
        for packed in token_batches(rows, self._batch_tokens, self._chat.pad_id):
            found.update(zip(packed.keys, self._encode(packed), strict=True))
        for key, record in out.items():
            record |= found[key]
            ends = [found[key, column] for column in columns[key]]
            record["sentence_sizes"] = [len(end["latents"]) for end in ends]
            record["sentence_latents"] = [latent for end in ends for latent in end["latents"]]
            record["sentence_values"] = [value for end in ends for value in end["values"]]
        self._progress.add(batch.num_rows, sum(len(row.ids) for row in rows))
        return pa.Table.from_pylist(list(out.values()), schema=with_sink_columns(RESPONSES))

    def _encode(self, packed: TokenBatch) -> list[dict[str, Any]]:
        inputs = packed.model_inputs(self._model.device)
        with torch.inference_mode():
            hidden = residual_stream(
                self._model.model, inputs["input_ids"], inputs["position_ids"], inputs["segment_ids"]
            )
            h_ND = hidden[inputs["rewarded_rows"], inputs["rewarded_columns"]].float()
            codes = self._model.sae(standardise(h_ND))
            rewards = self._model.score(codes).squeeze(-1).tolist()
        records = []
        for h_D, reward, values, indices in zip(h_ND.cpu(), rewards, codes.values.cpu(), codes.indices.cpu(), strict=True):  # fmt: skip
            on = values != 0
            records.append({"reward": reward, "latents": indices[on].tolist(), "values": values[on].tolist(), "residual": h_D.numpy().tobytes()})  # fmt: skip
        return records


def write_codes(
    pairs: pa.Table, reward_model: Path, batch_tokens: int, folder: Path, run: RunSettings, cluster: Cluster
) -> Mapping[str, Any]:
    """Encode every distinct response of AUDIT_PAIRS and write `responses.parquet` and `pairs.parquet`; returns counts."""
    parts = folder / "parts"
    source = Source("codes", pairs.num_rows)
    through_actors(
        [pairs.slice(i, _BATCH_ROWS) for i in range(0, pairs.num_rows, _BATCH_ROWS)],
        _BATCH_ROWS,
        ResponseCodes,
        {"reward_model": reward_model, "batch_tokens": batch_tokens, "source": source},
        ParquetSink(parts, RESPONSES, 1),
        run,
        cluster,
    )
    table = ds.dataset([str(path) for path in sorted(parts.glob("*.parquet"))]).to_table().replace_schema_metadata(None)
    # A prompt whose pairs fell into two batches has responses in both.
    first = {response_id: row for row, response_id in reversed(list(enumerate(table["response_id"].to_pylist())))}
    responses = table.take(sorted(first.values()))
    pq.write_table(responses, folder / "responses.parquet", write_page_checksum=True)
    shutil.rmtree(parts)
    rows = pairs.to_pylist()
    ids = [{f"{side}_id": response_id_of(row["prompt"], row[side]) for side in ("chosen", "rejected")} for row in rows]
    named = [{**row, **own} for row, own in zip(rows, ids, strict=True)]
    has_codes = [row["chosen_id"] in first and row["rejected_id"] in first for row in named]
    kept = [row for row, is_kept in zip(named, has_codes, strict=True) if is_kept]
    rejected = _reasons(pairs.filter(pa.array([not is_kept for is_kept in has_codes])), reward_model)
    if not kept:
        raise UserError(f"no pair can be encoded: {rejected}. Pass pairs whose roles the template of {reward_model} takes.")  # fmt: skip
    pq.write_table(pa.Table.from_pylist(kept, schema=CODE_PAIRS), folder / "pairs.parquet", write_page_checksum=True)
    return {"responses": responses.num_rows, "pairs": len(kept), "rejected": rejected}


def _reasons(left_out: pa.Table, reward_model: Path) -> dict[str, int]:
    """Why pairs have no codes, by the reason word that every stage gives."""
    if not left_out.num_rows:
        return {}
    refused: dict[str, str] = {}
    chat = load_chat_tokenizer(sarm_settings(reward_model), reward_model)
    collections.deque(prompt_groups(left_out, chat, refused=refused), maxlen=0)
    return dict(collections.Counter(refused.values()))

"""What actors compute to score pairs with a reward model: pairs/v1 in, rewards out."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from sarm.contracts.passes import Beat, Cost, Tables
from sarm.contracts.tables import PAIR_SCORES_TABLE
from sarm.data.formats.sarm_folder import load_sarm
from sarm.data.store.parts import with_sink_columns
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.data.tokens.packing import collate, row_batches
from sarm.passes.usage import device_of_worker
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.model import ModelSettings


class PairScores:
    """A table of pairs/v1 in, their rewards (and active latents, if the head has any) out, under the one target `scores`."""

    def __init__(
        self, model: ModelSettings, folder: str, reward_model: Path, extraction: ExtractionSettings, threads: int
    ):
        torch.set_num_threads(threads)
        self._device, self._extraction = device_of_worker(), extraction
        self._chat, self._max_length = load_chat_tokenizer(model, folder), model.max_length
        self._model = load_sarm(reward_model, getattr(torch, model.dtype)).to(self._device)  # type: ignore[arg-type]

    def prepare(self, table: pa.Table) -> tuple[list[PromptGroup], dict[str, str]]:
        """The prompts with their responses, tokenised; and pairs that cannot be, with the reason."""
        refused: dict[str, str] = {}
        return list(prompt_groups(table, self._chat, refused=refused)), refused

    def compute(self, prepared: tuple[list[PromptGroup], dict[str, str]], beat: Beat) -> tuple[Tables, Cost]:
        """One row of PAIR_SCORES a pair."""
        groups, refused = prepared
        rows = [row for group in groups for row in group.rows(self._max_length)]
        scored: dict[Any, dict[str, Any]] = {}
        cost = Cost()
        cost.note(group.spelled for group in groups)
        for members in row_batches(rows, self._extraction.batch_tokens):
            tokens = collate(members, self._chat.pad_id)
            started = time.perf_counter()
            with torch.inference_mode():
                output = self._model(**tokens.model_inputs(self._device))
            for i, (key, reward) in enumerate(zip(tokens.keys, output.logits.squeeze(-1).cpu().tolist(), strict=True)):
                scored[key] = {"reward": reward, **_active(output, i)}
            cost.tokens += sum(len(row.ids) for row in members)
            cost.padded_tokens += tokens.input_ids.numel()
            cost.forward_seconds += time.perf_counter() - started
            beat()
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
        out += _rejects(refused)
        return {"scores": pa.Table.from_pylist(out, schema=with_sink_columns(PAIR_SCORES_TABLE))}, cost

    def rejected(self, table: pa.Table, reason: str) -> Tables:
        """What is left of pairs that cannot be scored."""
        rows = _rejects(dict.fromkeys(table.column("pair_id").to_pylist(), reason))
        return {"scores": pa.Table.from_pylist(rows, schema=with_sink_columns(PAIR_SCORES_TABLE))}


def _rejects(refused: Mapping[str, str]) -> list[dict[str, Any]]:
    blank: dict[str, Any] = {"prompt_id": "", "truncated": False}
    blank |= dict.fromkeys(("chosen_reward", "rejected_reward"), 0.0)
    blank |= dict.fromkeys(("chosen_tokens", "rejected_tokens"), 0)
    return [{"pair_id": pair_id, **blank, "reject": reason} for pair_id, reason in refused.items()]


def _active(output: Any, i: int) -> dict[str, Any]:
    if output.latent_values is None:
        return {"latents": [], "values": []}
    on = output.latent_values[i] != 0
    return {"latents": output.latent_indices[i][on].tolist(), "values": output.latent_values[i][on].tolist()}

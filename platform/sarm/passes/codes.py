"""What actors compute for an audit: pairs in, the codes of each distinct response out, at the rewarded token and at sentence ends."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from sarm.audit.codes import RESPONSES
from sarm.contracts.ids import response_id_of
from sarm.contracts.passes import Beat, Cost, Tables
from sarm.data.store.parts import with_sink_columns
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.data.tokens.sentences import sentence_columns
from sarm.passes.reader import Reader

# A response of several pairs stands in one row, which names them.
CODES_PART = RESPONSES.append(pa.field("pair_ids", pa.list_(pa.string()), nullable=False))


class _Prepared(NamedTuple):
    groups: list[PromptGroup]
    prompts: dict[str, list[dict[str, str]]]
    """The prompt of each pair, to the letter."""
    refused: dict[str, str]


class ResponseCodes:
    """A table of AUDIT_PAIRS in, a row of CODES_PART for each distinct response out, under the one target `responses`."""

    def __init__(self, reader: Reader, threads: int):
        self._reader = reader.ready(threads)

    def prepare(self, table: pa.Table) -> _Prepared:
        """The prompts with their responses, tokenised; and pairs that cannot be, with the reason."""
        refused: dict[str, str] = {}
        groups = list(prompt_groups(table, self._reader.chat, offsets=True, refused=refused))
        return _Prepared(
            groups, dict(zip(table["pair_id"].to_pylist(), table["prompt"].to_pylist(), strict=True)), refused
        )

    def compute(self, prepared: _Prepared, beat: Beat) -> tuple[Tables, Cost]:
        """One row a response, in the order of their first pairs."""
        cost = Cost()
        cost.note(group.spelled for group in prepared.groups)
        columns: dict[Hashable, Sequence[int]] = {
            (group.prompt_id, place): list(sentence_columns(text, tokens.offsets))
            for group in prepared.groups
            for place, (text, tokens) in enumerate(zip(group.responses, group.tokens, strict=True))
        }
        rows = [row for g in prepared.groups for row in g.rows(self._reader.settings.max_length, columns)]
        readings = self._reader.read(rows, cost, beat, residuals=True)
        records: list[dict[str, Any]] = []
        refused = dict(prepared.refused)
        for group in prepared.groups:
            for place, (text, tokens) in enumerate(zip(group.responses, group.tokens, strict=True)):
                key = (group.prompt_id, place)
                pair_ids = [pair.pair_id for pair in group.pairs if place in (pair.chosen, pair.rejected)]
                answer, ends = readings[key], [readings[key, column] for column in columns[key]]
                if math.isnan(answer.reward):
                    refused |= dict.fromkeys(pair_ids, "prompt_cut_off")
                    continue
                assert answer.residual is not None
                records.append(
                    {
                        "response_id": response_id_of(prepared.prompts[pair_ids[-1]], text),
                        "prompt_id": group.prompt_id,
                        "answer_tokens": sum(start < end for start, end in tokens.offsets),
                        "truncated": tokens.num_truncated > 0,
                        "reward": answer.reward,
                        "latents": answer.latents.tolist(),
                        "values": answer.values.tolist(),
                        "residual": answer.residual.numpy().tobytes(),
                        "sentence_sizes": [len(end.latents) for end in ends],
                        "sentence_latents": [latent for end in ends for latent in end.latents.tolist()],
                        "sentence_values": [value for end in ends for value in end.values.tolist()],
                        "pair_ids": pair_ids,
                    }
                )
        return _tables([*records, *_rejects(refused)]), cost

    def rejected(self, table: pa.Table, reason: str) -> Tables:
        """What is left of pairs that cannot be read."""
        return _tables(_rejects(dict.fromkeys(table["pair_id"].to_pylist(), reason)))


def _tables(records: Sequence[Mapping[str, Any]]) -> Tables:
    return {"responses": pa.Table.from_pylist(records, schema=with_sink_columns(CODES_PART))}


def _rejects(refused: Mapping[str, str]) -> list[dict[str, Any]]:
    blank: dict[str, Any] = {"response_id": "", "prompt_id": "", "answer_tokens": 0, "reward": 0.0, "residual": b""}
    blank |= {name: [] for name in ("latents", "values", "sentence_sizes", "sentence_latents", "sentence_values")}
    return [
        {**blank, "pair_ids": [pair_id], "truncated": False, "reject": reason} for pair_id, reason in refused.items()
    ]

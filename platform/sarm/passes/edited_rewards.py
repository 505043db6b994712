"""What actors compute for interventions inside a classifier: pairs in; of each distinct response its reward, and what each edit does to it, out."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import torch

from sarm.contracts.ids import response_id_of
from sarm.contracts.passes import Beat, Cost, Tables
from sarm.data.store.parts import with_sink_columns
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.data.tokens.packing import Row, answer_row, collate, row_batches
from sarm.nn.splice import LatentEdit, Splice
from sarm.passes.attached_model import AttachedReader, last_place
from sarm.passes.path_attribution import path_terms
from sarm.passes.reward_gradients import Conversations, effects

# A response of several pairs stands in one row, which names them.
EDITED = pa.schema(
    [
        pa.field("response_id", pa.string(), nullable=False),
        pa.field("reward", pa.float32(), nullable=False),
        # Of each edit, in their order: the change of the reward by patching, and to first order.
        pa.field("patched", pa.list_(pa.float32()), nullable=False),
        pa.field("linear", pa.list_(pa.float32()), nullable=False),
        # Of the edits that are taken apart, one after the other: what each of their latents has of the patched change, and the places of the sums.
        pa.field("terms", pa.list_(pa.float32()), nullable=False),
        pa.field("places", pa.list_(pa.int32()), nullable=False),
        pa.field("pair_ids", pa.list_(pa.string()), nullable=False),
    ]
)
Scope = Literal["all", "rewarded"]


class CodeEdit(NamedTuple):
    """Some latents times a factor, at all tokens of a conversation or at its rewarded token alone."""

    latents: tuple[int, ...]
    factor: float = 0.0
    scope: Scope = "all"
    apart: bool = False
    """Whether its effect is taken apart into terms of its latents (`path_attribution`)."""


class _Prepared(NamedTuple):
    groups: list[PromptGroup]
    prompts: dict[str, list[dict[str, str]]]
    """The prompt of each pair, to the letter."""
    refused: dict[str, str]


class EditedRewards:
    """A table of AUDIT_PAIRS in, a row of EDITED for each distinct response out, under the one target `edited`."""

    def __init__(self, reader: AttachedReader, edits: Sequence[CodeEdit], threads: int):
        reader.ready(threads)
        self._reader, self._edits = reader, list(edits)

    def prepare(self, table: pa.Table) -> _Prepared:
        """The prompts with their responses, tokenised; and pairs that cannot be, with the reason."""
        refused: dict[str, str] = {}
        groups = list(prompt_groups(table, self._reader.chat, refused=refused))
        prompts = dict(zip(table["pair_id"].to_pylist(), table["prompt"].to_pylist(), strict=True))
        return _Prepared(groups, prompts, refused)

    def compute(self, prepared: _Prepared, beat: Beat) -> tuple[Tables, Cost]:
        """One row a response."""
        cost, refused = Cost(), dict(prepared.refused)
        model = self._reader.model
        own = [
            Splice(model.sae, model.layer, [LatentEdit(latent, "scale", edit.factor) for latent in edit.latents])
            for edit in self._edits
        ]
        owner = {(g.prompt_id, n): (g, n) for g in prepared.groups for n in range(len(g.responses))}
        rows = [answer_row(key, group.tokens[n].ids) for key, (group, n) in owner.items()]
        records: list[dict[str, Any]] = []
        for members in row_batches(rows, self._reader.batch_tokens):
            batch = conversations(members, self._reader.chat.pad_id, self._reader.opening, model.device)
            is_whole = [batch.gates is None or bool(batch.gates[row] >= 0) for row in range(len(members))]
            scopes = {"all": batch.is_token, "rewarded": batch.is_rewarded}
            edits = [(one, scopes[edit.scope]) for one, edit in zip(own, self._edits, strict=True)]
            found = effects(model, batch, edits)
            apart = [path_terms(model, batch, *one) for one, edit in zip(edits, self._edits, strict=True) if edit.apart]
            cost.tokens += sum(len(row.ids) for row in members)
            cost.padded_tokens += batch.input_ids.numel()
            for line, row in enumerate(members):
                group, place = owner[row.taken[0][0]]  # type: ignore[index]
                pair_ids = [pair.pair_id for pair in group.pairs if place in (pair.chosen, pair.rejected)]
                if not is_whole[line]:
                    refused |= dict.fromkeys(pair_ids, "prompt_cut_off")
                    continue
                records.append(
                    {
                        "response_id": response_id_of(prepared.prompts[pair_ids[-1]], group.responses[place]),
                        "reward": float(found.reward[line]),
                        "patched": found.patched[line].tolist(),
                        "linear": found.linear[line].tolist(),
                        "terms": [value for one in apart for value in one.terms[line].tolist()],
                        "places": [int(one.places[line]) for one in apart],
                        "pair_ids": pair_ids,
                        "truncated": group.tokens[place].num_truncated > 0,
                    }
                )
            beat()
        return _tables([*records, *_rejects(refused)]), cost

    def rejected(self, table: pa.Table, reason: str) -> Tables:
        """What is left of pairs that cannot be read."""
        return _tables(_rejects(dict.fromkeys(table["pair_id"].to_pylist(), reason)))


def conversations(rows: Sequence[Row], pad_id: int, opening: Sequence[int], device: torch.device) -> Conversations:
    """The rows, each with one answer; with an `opening`, of each the place where a gate reads its prompt, -1 where that was cut off."""
    batch = collate(rows, pad_id, join=False)
    gates = None
    if opening:
        places = [last_place(row.ids, opening) for row in rows]
        gates = torch.tensor([-1 if place is None else place for place in places], device=device)
    return Conversations(batch.input_ids.to(device), batch.columns.to(device), gates)


def _tables(records: Sequence[Mapping[str, Any]]) -> Tables:
    return {"edited": pa.Table.from_pylist(records, schema=with_sink_columns(EDITED))}


def _rejects(refused: Mapping[str, str]) -> list[dict[str, Any]]:
    blank: dict[str, Any] = {
        "response_id": "",
        "reward": 0.0,
        "patched": [],
        "linear": [],
        "terms": [],
        "places": [],
        "truncated": False,
    }
    return [{**blank, "pair_ids": [pair_id], "reject": reason} for pair_id, reason in refused.items()]

"""What actors compute to score pairs with a reward model: pairs/v1 in, rewards out."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from sarm.contracts.passes import Beat, Cost, Tables
from sarm.contracts.tables import PAIR_SCORES_TABLE
from sarm.data.store.parts import with_sink_columns
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.passes.reader import Reader


class PairScores:
    """A table of pairs/v1 in, their rewards (and active latents, if the head has any) out, under the one target `scores`."""

    def __init__(self, reader: Reader, threads: int):
        self._reader = reader.ready(threads)

    def prepare(self, table: pa.Table) -> tuple[list[PromptGroup], dict[str, str]]:
        """The prompts with their responses, tokenised; and pairs that cannot be, with the reason."""
        refused: dict[str, str] = {}
        return list(prompt_groups(table, self._reader.chat, refused=refused)), refused

    def compute(self, prepared: tuple[list[PromptGroup], dict[str, str]], beat: Beat) -> tuple[Tables, Cost]:
        """One row of PAIR_SCORES a pair."""
        groups, refused = prepared
        cost = Cost()
        cost.note(group.spelled for group in groups)
        readings = self._reader.read(
            [row for g in groups for row in g.rows(self._reader.settings.max_length)], cost, beat
        )
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
                    reading = readings[group.prompt_id, place]
                    record |= {
                        f"{side}_reward": reading.reward,
                        f"{side}_latents": reading.latents.tolist(),
                        f"{side}_values": reading.values.tolist(),
                        f"{side}_tokens": len(group.tokens[place].ids),
                    }
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

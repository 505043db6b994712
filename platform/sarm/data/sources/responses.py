"""Conversations to responses/v1: answers in no pair, that dictionaries learn from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sarm.contracts.ids import hash_share, prompt_id_of, response_id_of, stable_int
from sarm.contracts.tables import RESPONSES_TABLE
from sarm.data.sources import texts as text_sources
from sarm.data.sources.conversations import answer_text
from sarm.data.sources.prepare import Tally, write_rows
from sarm.settings.checks import UserError
from sarm.settings.data import DataSettings

MESSAGES = "messages"


def prepare_responses(data: DataSettings, pairs: Path, folder: Path) -> dict[str, Any]:
    """Write the last answers of the conversations of `data.responses` to `folder`, each once.

    Left out and counted: conversations that no answer ends (`no_answer`), responses of held-out prompts (`heldout`), by the same hash as
    pairs, and responses that are in a pair of `pairs`, a finished pairs/v1 (`in_pairs`). Raises UserError if a source is unusable or
    nothing is left.
    """
    for spec in data.responses:
        text_sources.check_source(spec, MESSAGES)
    tally = Tally()
    left_out = {"no_answer": 0, "heldout": 0, "in_pairs": 0}
    paired = _response_ids(pairs)
    seen: set[int] = set()

    def rows() -> Iterator[dict[str, Any]]:
        for spec in data.responses:
            for record in tally.usable(text_sources.open_texts(spec, MESSAGES), spec):
                messages = record.messages
                response = answer_text(messages[-1]) if messages and messages[-1]["role"] == "assistant" else None
                if messages is None or response is None or len(messages) < 2:
                    left_out["no_answer"] += 1
                    continue
                prompt = messages[:-1]
                row_id, prompt_id = stable_int(response_id_of(prompt, response)), prompt_id_of(prompt)
                if row_id in seen:
                    tally.duplicates += 1
                elif hash_share(prompt_id) < data.heldout_share:
                    left_out["heldout"] += 1
                elif row_id in paired:
                    left_out["in_pairs"] += 1
                else:
                    tally.sources[spec] += 1
                    tally.note(message["content"] for message in messages)
                    yield {"row_id": row_id, "text": record.text, "source": spec, MESSAGES: messages, "prompt_id": prompt_id}  # fmt: skip
                seen.add(row_id)

    num_rows = write_rows(rows(), RESPONSES_TABLE, folder)
    if num_rows == 0:
        reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
        raise UserError(
            f"no response in {', '.join(data.responses)} is left ({reasons}; {tally.describe()}). Check --data.responses."
        )
    return {"rows": num_rows, **left_out, **tally.counts()}


def _response_ids(pairs: Path) -> set[int]:
    found: set[int] = set()
    for path in sorted(pairs.glob("*.parquet")):
        for row in pq.read_table(path, columns=["prompt", "chosen", "rejected"]).to_pylist():
            found |= {stable_int(response_id_of(row["prompt"], row[side])) for side in ("chosen", "rejected")}
    return found

"""Texts with every latent that fires in them, from the pairs that an evaluation scored: where a latent is not listed, it is silent."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

from sarm.contracts.folders import EVALUATION_FOLDER, PAIRS_FOLDER
from sarm.contracts.manifest import read_manifest
from sarm.settings.checks import UserError


def scored_texts(run: Path, contexts: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `schema.CONTEXT_POOL` at the rewarded token, for the held-out answers of a finished run.

    Answers are cut as contexts are, so that one text is one text. Raises UserError if the run is unfinished, or shares no answer
    with the contexts: they are of other data then.
    """
    pairs, evaluation = run / "pairs", run / "evaluation"
    read_manifest(pairs, PAIRS_FOLDER)
    read_manifest(evaluation, EVALUATION_FOLDER)
    texts = {row["pair_id"]: row for row in _rows(pairs)}
    known = {row["text_id"]: row for row in contexts}
    longest = max((len(row["text"]) for row in contexts), default=0)
    found = []
    for scores in _rows(evaluation / "sarm_scores"):
        pair = texts[scores["pair_id"]]
        prompt = json.dumps(
            [[m["role"], m["content"], *([m["more"]] if m.get("more") else [])] for m in pair["prompt"]]
        )
        digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
        for side in ("chosen", "rejected"):
            firing = [(i, v) for i, v in zip(scores[f"{side}_latents"], scores[f"{side}_values"], strict=True) if v > 0]
            found.append(
                {
                    "place": "rewarded",
                    "text_id": f"{pair['pair_id']}/{side}",
                    "pair_id": pair["pair_id"],
                    "side": side,
                    "prompt_hash": digest,
                    "prompt": next((one["content"] for one in reversed(pair["prompt"]) if one["role"] == "user"), ""),
                    "text": pair[side][-longest:] if longest else pair[side],
                    "latents": [i for i, _ in firing],
                    "values": [v for _, v in firing],
                }
            )
    own = [row for row in found if row["text_id"] in known]
    if not own or any(row["prompt_hash"] != known[row["text_id"]]["prompt_hash"] for row in own):
        raise UserError(f"the held-out answers of {run} are none of the contexts' texts. Pass the --scored run that the contexts were collected from.")  # fmt: skip
    return found


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (
        ds.dataset([str(path) for path in sorted(folder.glob("part-*.parquet"))]).to_table().to_pylist()
    )
    return rows

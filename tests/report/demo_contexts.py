"""contexts/v1 of a finished run's held-out answers, from the scores of its evaluation: real texts without another pass of the model."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sarm.contracts.folders import CONTEXTS_FOLDER
from sarm.contracts.manifest import StageFolder
from sarm.contracts.tables import LATENT_CONTEXTS_TABLE, LATENT_SUMMARIES_TABLE
from sarm.interpret.context_store import CONTEXTS_FILE, LATENTS_FILE
from sarm.interpret.silence import scored_texts

_TOP, _OF_DECILE = 40, 3


def write_contexts(run: Path, folder: Path) -> Path:
    """The folder, with top and decile contexts at the rewarded token."""
    stage = StageFolder(folder, CONTEXTS_FOLDER, {"run": "held-out answers"})
    stage.claim()
    rows = scored_texts(run, _all_texts(run))
    firing: dict[int, list[tuple[float, dict[str, Any]]]] = defaultdict(list)
    for row in rows:
        for latent, value in zip(row["latents"], row["values"], strict=True):
            firing[latent].append((value, row))
    weights = {
        row["latent"]: row["weight"] for row in pq.read_table(run / "evaluation" / "features.parquet").to_pylist()
    }
    contexts, latents = [], []
    for latent, found in sorted(firing.items()):
        found.sort(key=lambda one: (-one[0], one[1]["text_id"]))
        contexts += [_context(latent, "top", rank, -1, *one) for rank, one in enumerate(found[:_TOP])]
        for tenth in range(10):
            part = found[len(found) * tenth // 10 : len(found) * (tenth + 1) // 10][:_OF_DECILE]
            contexts += [_context(latent, "decile", rank, 10 - tenth, *one) for rank, one in enumerate(part)]
        values = [value for value, _ in found]
        facts = {
            "latent": latent,
            "place": "rewarded",
            "count": len(found),
            "total": len(rows),
            "density": len(found) / len(rows),
        }
        latents.append({**facts, "max": max(values), "mean": sum(values) / len(values), "quantiles": [], "weight": weights.get(latent), "histogram": []})  # fmt: skip
    pq.write_table(pa.Table.from_pylist(contexts, schema=LATENT_CONTEXTS_TABLE), folder / CONTEXTS_FILE)
    pq.write_table(pa.Table.from_pylist(latents, schema=LATENT_SUMMARIES_TABLE), folder / LATENTS_FILE)
    stage.finish({"model": "demo"})
    return folder


def _all_texts(run: Path) -> list[dict[str, Any]]:
    import hashlib
    import json

    found = []
    for path in sorted((run / "pairs").glob("*.parquet")):
        for pair in pq.read_table(path).to_pylist():
            prompt = json.dumps([[one["role"], one["content"]] for one in pair["prompt"]])
            digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
            found += [{"text_id": f"{pair['pair_id']}/{side}", "prompt_hash": digest, "text": pair[side]} for side in ("chosen", "rejected")]  # fmt: skip
    return found


def _context(latent: int, kind: str, rank: int, decile: int, value: float, row: dict[str, Any]) -> dict[str, Any]:
    own = {name: row[name] for name in ("place", "text_id", "pair_id", "side", "prompt_hash", "prompt", "text")}
    return {"latent": latent, "kind": kind, "rank": rank, "decile": decile, "activation": value, **own, "span_start": -1, "span_end": -1}  # fmt: skip

"""Latents with a known rule, as a finished contexts/v1 folder: latent i fires where its word is, as strongly as the word is frequent."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sarm.contracts.folders import CONTEXTS_FOLDER
from sarm.contracts.manifest import StageFolder
from sarm.contracts.tables import CONTEXT_POOL_TABLE, LATENT_CONTEXTS_TABLE, LATENT_SUMMARIES_TABLE
from sarm.interpret.context_store import CONTEXTS_FILE, LATENTS_FILE

WORDS = ("otter", "violin", "glacier", "pepper", "harbor", "meteor")
FILLER = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "it",
    "was",
    "that",
    "with",
    "for",
    "on",
    "as",
    "at",
    "by",
    "from",
    "they",
    "this",
    "had",
    "not",
    "are",
    "but",
    "one",
    "all",
    "were",
    "when",
]
NUM_PROMPTS, TOP = 70, 40


def make_texts(seed: int = 0) -> list[dict[str, Any]]:
    """Two answers to each of 70 prompts; each planted word is in a third of them, once to three times."""
    rng = random.Random(seed)
    rows = []
    for number in range(NUM_PROMPTS):
        prompt = f"question {number}"
        for side in ("chosen", "rejected"):
            counts = {i: rng.randint(1, 3) for i in range(len(WORDS)) if rng.random() < 1 / 3}
            words = rng.choices(FILLER, k=rng.randint(12, 40)) + [WORDS[i] for i, n in counts.items() for _ in range(n)]
            rng.shuffle(words)
            rows.append(
                {
                    "place": "rewarded",
                    "text_id": f"p{number}/{side}",
                    "pair_id": f"p{number}",
                    "side": side,
                    "prompt_hash": hashlib.sha256(prompt.encode()).hexdigest(),
                    "prompt": prompt,
                    "text": " ".join(words),
                    "latents": list(counts),
                    "values": [float(n) for n in counts.values()],
                }
            )
    return rows


def write_planted(folder: Path, *, with_pool: bool = True, top: int = TOP) -> Path:
    """A finished contexts/v1 folder of the planted latents."""
    stage = StageFolder(folder, CONTEXTS_FOLDER, {"planted": True, "pool": with_pool, "top": top})
    stage.claim()
    rows = make_texts()
    contexts, latents = [], []
    for latent in range(len(WORDS)):
        firing = [(row["values"][row["latents"].index(latent)], row) for row in rows if latent in row["latents"]]
        firing.sort(key=lambda one: (-one[0], one[1]["text_id"]))
        contexts += [_context(latent, "top", rank, -1, *one) for rank, one in enumerate(firing[:top])]
        for decile in range(1, 11):
            part = firing[len(firing) * (decile - 1) // 10 : len(firing) * decile // 10][:2]
            contexts += [_context(latent, "decile", rank, 11 - decile, *one) for rank, one in enumerate(part)]
        latents.append(_summary(latent, [value for value, _ in firing], len(rows)))
    pq.write_table(pa.Table.from_pylist(contexts, schema=LATENT_CONTEXTS_TABLE), folder / CONTEXTS_FILE)
    pq.write_table(pa.Table.from_pylist(latents, schema=LATENT_SUMMARIES_TABLE), folder / LATENTS_FILE)
    if with_pool:
        pq.write_table(pa.Table.from_pylist(rows, schema=CONTEXT_POOL_TABLE), folder / "pool.parquet")
    stage.finish({"model": "planted", "d_sae": 16})
    return folder


def _context(latent: int, kind: str, rank: int, decile: int, value: float, row: dict[str, Any]) -> dict[str, Any]:
    start = row["text"].index(WORDS[latent])
    own = {name: row[name] for name in ("place", "text_id", "pair_id", "side", "prompt_hash", "prompt", "text")}
    span = {"span_start": start, "span_end": start + len(WORDS[latent])}
    return {"latent": latent, "kind": kind, "rank": rank, "decile": decile, "activation": value, **own, **span}


def _summary(latent: int, values: list[float], total: int) -> dict[str, Any]:
    facts = {
        "latent": latent,
        "place": "rewarded",
        "count": len(values),
        "total": total,
        "density": len(values) / total,
    }
    spread = {"max": max(values), "mean": sum(values) / len(values), "quantiles": [], "histogram": []}
    return {**facts, **spread, "weight": 0.1 * (latent + 1)}


def data_of(user: str) -> list[dict[str, Any]]:
    """The rows between <data> tags of a question."""
    inside = [part.split("</data>")[0] for part in user.split("<data>")[1:]]
    return [json.loads(line) for part in inside for line in part.strip().splitlines()]


def perfect(messages: list[dict[str, str]]) -> str:
    """A judge that knows the planted words: it names the one that the texts share, and looks for the first that it is told."""
    user = messages[1]["content"]
    rows = data_of(user)
    texts = [row["text"].split() for row in rows if "text" in row]
    said = next((row["description"] for row in rows if "description" in row), "")
    word = min((word for word in WORDS if word in said), key=said.index, default=None)
    if '"hypothesis"' in user:
        shared = [word for word in WORDS if all(word in text for text in texts)]
        return json.dumps({"hypothesis": f"mentions the {shared[0]}", "polysemantic": False, "alternative": None})
    if '"intruder"' in user:
        lacking = [[i for i, text in enumerate(texts, 1) if word not in text] for word in WORDS]
        return json.dumps({"intruder": next(one[0] for one in lacking if len(one) == 1)})
    if '"text_1"' in user:
        counts = {f"text_{i}": text.count(word) if word else 0 for i, text in enumerate(texts, 1)}
        levels = "whole number from 0" in user
        return json.dumps({name: 3 * n if levels else n > 0 for name, n in counts.items()})
    return '{"explanation": "one word", "score": 5}'


def guessing(messages: list[dict[str, str]]) -> str:
    """A judge that answers by the hash of the question."""
    user = messages[1]["content"]
    rng = random.Random(hashlib.sha256(user.encode()).hexdigest())
    rows = [row for row in data_of(user) if "text" in row]
    if '"hypothesis"' in user:
        return json.dumps({"hypothesis": f"guess {rng.random()}"})
    if '"intruder"' in user:
        return json.dumps({"intruder": rng.randint(1, len(rows))})
    if '"text_1"' in user:
        levels = "whole number from 0" in user
        return json.dumps(
            {f"text_{i}": rng.randint(0, 10) if levels else rng.random() < 0.5 for i in range(1, len(rows) + 1)}
        )
    return json.dumps({"explanation": "a guess", "score": rng.randint(1, 5)})

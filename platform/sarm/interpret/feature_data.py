"""What a feature page says, as plain values: one `dict` a latent, from contexts/v1, the SAE's decoder and, where there are any, scores and explanations.

S d_sae, D d_in. In rewards: contribution of a latent = w * its mean activation over chosen and rejected answers;
margin contribution = w (mean over chosen - mean over rejected), which over all latents sum to the mean margin.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float
from numpy.typing import NDArray

from sarm.contracts.folders import EXPLANATIONS_FOLDER
from sarm.contracts.manifest import read_manifest
from sarm.data.sources.shown_text import clean_text
from sarm.interpret.attribution import pair_contributions
from sarm.interpret.context_store import ContextStore
from sarm.interpret.labels import EXTRACTIVE, label, labels
from sarm.settings.checks import UserError
from sarm.settings.contexts import PagesSettings

SCORES = ("detection", "simulation", "intruder", "monosemanticity", "safety")
_NEAREST = 5
_SHOWN_CHARS, _BEFORE_SPAN = 700, 200
# What a page shows of them, strongest first, then over the range.
GROUPS = (("rewarded", "top"), ("rewarded", "decile"), ("sentence", "top"), ("sentence", "decile"))


def features(
    store: ContextStore,
    W_dec_SD: Float[np.ndarray, "d_sae d_in"],
    weight_S: Float[np.ndarray, " d_sae"],
    settings: PagesSettings,
) -> list[dict[str, Any]]:
    """The latents that add most to rewards, by size; texts, labels and neighbours among all latents that fire."""
    summaries: dict[int, dict[str, Any]] = {}
    for row in store.latents.to_pylist():
        summaries.setdefault(row["latent"], {})[row["place"]] = row
    rank = np.empty(len(weight_S), np.int64)
    rank[np.argsort(-np.abs(weight_S), kind="stable")] = np.arange(1, len(weight_S) + 1)
    found = [
        _figures(latent, places, float(weight_S[latent]), int(rank[latent])) for latent, places in summaries.items()
    ]
    found.sort(key=lambda one: (-abs(one["contribution"]), -abs(one["weight"]), one["latent"]))
    shown = found[: settings.features]
    texts = _texts(store.contexts, [one["latent"] for one in shown])
    terms = labels({latent: [_driving(row) for row in rows] for latent, rows in texts.items()})
    near = nearest(W_dec_SD, [one["latent"] for one in shown], sorted(summaries))
    for place, one in enumerate(shown):
        latent = one["latent"]
        one |= {
            "page": place // settings.per_page + 1,
            "terms": [term._asdict() for term in terms.get(latent, [])],
            "nearest": near[latent],
            "contexts": {
                f"{where}_{kind}": [
                    _shown(row) for row in texts.get(latent, []) if (row["place"], row["kind"]) == (where, kind)
                ][: settings.contexts]
                for where, kind in GROUPS
            },
            "explanations": [],
            "pairs": [],
        }
    return shown


def nearest(
    W_dec_SD: Float[np.ndarray, "d_sae d_in"], latents: Sequence[int], among: Sequence[int]
) -> dict[int, list[dict[str, float]]]:
    """The latents of `among` whose decoder rows point most like each latent's: `{latent, cosine}`."""
    unit = W_dec_SD / np.maximum(np.linalg.norm(W_dec_SD, axis=1, keepdims=True), 1e-12)
    others = np.array(among)
    found = {}
    for latent in latents:
        cosine = unit[others] @ unit[latent]
        cosine[others == latent] = -np.inf
        best = np.lexsort((others, -cosine))[: min(_NEAREST, len(others) - 1)]
        found[latent] = [{"latent": int(others[i]), "cosine": float(cosine[i])} for i in best]
    return found


def add_pairs(
    shown: Sequence[dict[str, Any]],
    scores: pa.Table,
    pairs: pa.Table,
    weight_S: Float[NDArray[np.floating], " d_sae"],
    num: int,
) -> None:
    """Give each feature the pairs whose margins it moves most, from PAIR_SCORES and the pairs/v1 they are of."""
    places = {pair_id: row for row, pair_id in enumerate(pairs["pair_id"].to_pylist())}
    wanted = {one["latent"]: one for one in shown}
    row_A, latent_A, contribution_A = pair_contributions(scores, weight_S)
    order = np.lexsort((row_A, -np.abs(contribution_A), latent_A))
    row_A, latent_A, contribution_A = row_A[order], latent_A[order], contribution_A[order]
    for latent, one in wanted.items():
        own = slice(*np.searchsorted(latent_A, [latent, latent + 1]))
        seen: set[tuple[str, str]] = set()
        for row, contribution in zip(row_A[own].tolist(), contribution_A[own].tolist(), strict=True):
            place = places.get(scores["pair_id"][row].as_py())
            if place is None or contribution == 0:
                continue
            pair = pairs.slice(place, 1).to_pylist()[0]
            # Pairs of one prompt often share an answer.
            if {(pair["prompt_id"], pair[side]) for side in ("chosen", "rejected")} & seen:
                continue
            seen |= {(pair["prompt_id"], pair[side]) for side in ("chosen", "rejected")}
            sides = {side: _clipped(pair[side], -1, -1) for side in ("chosen", "rejected")}
            margin = scores["chosen_reward"][row].as_py() - scores["rejected_reward"][row].as_py()
            prompt = _clipped(pair["prompt"][-1]["content"], -1, -1)
            one["pairs"].append({"prompt": prompt, "contribution": contribution, "margin": margin, **sides})
            if len(one["pairs"]) == num:
                break


def add_explanations(shown: Sequence[dict[str, Any]], folder: Path) -> None:
    """Give each feature its explanations, the best first.

    Raises UserError if the folder is unfinished, of another kind or unreadable.
    """
    found = read_explanations(folder, [one["latent"] for one in shown])
    for one in shown:
        one["explanations"] = found.get(one["latent"], [])


def read_explanations(folder: Path, latents: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """Explanations of latents, except extractive ones: those that came out, then of rewarded tokens, then by detection score first.

    Raises UserError if the folder is unfinished, of another kind or unreadable.
    """
    read_manifest(folder, EXPLANATIONS_FOLDER)
    found: dict[int, list[dict[str, Any]]] = {}
    wanted = set(latents)
    try:
        for path in sorted(folder.glob("*.parquet")):
            table = pq.read_table(path)
            if {"latent", "place", "explainer", "explanation", "status"} <= set(table.schema.names):
                for row in table.to_pylist():
                    if row["latent"] in wanted and row["explainer"] != EXTRACTIVE:
                        text = clean_text(row["explanation"] or "", 400)
                        reason = clean_text(row.get("reason") or "", 200)
                        found.setdefault(row["latent"], []).append({**row, "explanation": text, "reason": reason})
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{folder} is damaged: {error}. Delete it and explain again.") from error
    for rows in found.values():
        rows.sort(key=lambda row: (row["status"] != "ok", row["place"] != "rewarded", -(row.get("detection") or 0), row["explainer"]))  # fmt: skip
    return found


def feature_names(store: ContextStore | None, latents: Sequence[int], explanations: Path | None) -> dict[int, str]:
    """One line for each latent: its explanation, else the terms of its texts; none for a latent without either."""
    texts = _texts(store.contexts, latents) if store else {}
    own = {latent: [_driving(row) for row in rows] for latent, rows in texts.items()}
    everything = (_driving(row) for row in store.contexts.to_pylist()) if store else ()
    names = {latent: f"terms: {label(terms)}" for latent, terms in labels(own, everything).items()}
    if explanations is not None:
        for latent, rows in read_explanations(explanations, latents).items():
            if rows[0]["status"] == "ok":
                names[latent] = rows[0]["explanation"]
    return names


def _figures(latent: int, places: Mapping[str, dict[str, Any]], weight: float, rank: int) -> dict[str, Any]:
    rewarded = places.get("rewarded")
    main = rewarded or places["sentence"]
    chosen, rejected = (rewarded[f"{side}_mean"] if rewarded else None for side in ("chosen", "rejected"))
    contribution, margin = 0.0, None
    if chosen is not None and rejected is not None:
        contribution, margin = weight * (chosen + rejected) / 2, weight * (chosen - rejected)
    return {
        "latent": latent,
        "weight": weight,
        "weight_rank": rank,
        "contribution": contribution,
        "margin": margin,
        "chosen_mean": chosen,
        "rejected_mean": rejected,
        "density": rewarded["density"] if rewarded else 0.0,
        "sentence_density": places["sentence"]["density"] if "sentence" in places else 0.0,
        "count": main["count"],
        "max": main["max"],
        "mean": main["mean"],
        "quantiles": main["quantiles"],
        "histogram": {name: main[f"{name}_histogram"] for name in ("chosen", "rejected")} if rewarded else {"text": main["histogram"]},
    }  # fmt: skip


def _texts(contexts: pa.Table, latents: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in contexts.filter(pc.is_in(contexts["latent"], pa.array(latents, pa.int32()))).to_pylist():
        found.setdefault(row["latent"], []).append(row)
    return found


def _driving(row: Mapping[str, Any]) -> str:
    """The part of a text that drives the latent, the whole where it is not known."""
    text: str = row["text"]
    return text[row["span_start"] : row["span_end"]] if row["span_start"] >= 0 else text


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = _clipped(row["text"], row["span_start"], row["span_end"])
    prompt = clean_text(row["prompt"])
    return {
        **{name: row[name] for name in ("activation", "decile", "side", "text_id")},
        "prompt": prompt[:240] + ("…" if len(prompt) > 240 else ""),
        "parts": parts,
    }


def _clipped(text: str, start: int, end: int) -> tuple[str, str, str]:
    """The text before, in and after the span, cleaned, cut to what a page shows: around the span, else the end."""
    if start < 0:
        start = end = len(text)
    first = max(0, min(start - _BEFORE_SPAN, len(text) - _SHOWN_CHARS))
    last = min(len(text), first + _SHOWN_CHARS)
    start, end = min(max(start, first), last), min(max(end, first), last)
    before, span, after = (clean_text(text[a:b]) for a, b in ((first, start), (start, end), (end, last)))
    return ("…" if first else "") + before, span, after + ("…" if last < len(text) else "")

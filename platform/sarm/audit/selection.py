"""From contrast, off-target firing and ratings to the features that an audit works with.

A latent is a candidate if its contrast survives false-discovery control, its off-target firing is small enough, and its head weight is
not zero. Where there are ratings, a candidate also needs a valid median rating; a failed rating is no rating.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from sarm.audit.contrast import Contrast
from sarm.settings.checks import UserError

_SCALE = (1.0, 5.0)
_FIELDS = {"latent", "rating"}


@dataclass(frozen=True)
class Selection:
    """Selected latents, strongest first, and on which side each stands."""

    latent: Int64[NDArray[np.int64], " latents"]
    sign: Int64[NDArray[np.int64], " latents"]
    """1 where the latent speaks for chosen responses (safe), -1 where for rejected ones (unsafe)."""


@dataclass(frozen=True)
class Sensitivity:
    """What another threshold would select: how many latents, and their Jaccard overlap with the selection in use."""

    threshold: str
    features: int
    jaccard: float


def select(
    found: Contrast,
    off_target_S: Float[np.ndarray, " d_sae"],
    weight_S: Float[np.ndarray, " d_sae"],
    fdr: float,
    max_off_target: float,
    max_features: int,
    rank: str,
    ratings: Mapping[int, float] | None = None,
    min_rating: float = 5.0,
) -> Selection:
    """At most `max_features` candidates, by the size of their `effect` (w a) or of their paired `score`; equal ones in order of latents.

    A score says how purely a latent tells the sides apart, and the purest fire rarely; the effect says how much of the margin that is.
    """
    latent = found.latent
    is_candidate = (found.q <= fdr) & (off_target_S[latent] <= max_off_target) & (weight_S[latent] != 0)
    if ratings is not None:
        is_candidate &= np.array([ratings.get(int(i), 0.0) >= min_rating for i in latent])
    size = np.abs(found.difference * weight_S[latent] if rank == "effect" else found.paired)
    order = np.lexsort((latent, -size))
    order = order[is_candidate[order]][:max_features]
    return Selection(latent[order], np.sign(found.paired[order]).astype(np.int64))


def read_ratings(path: Path) -> dict[int, float]:
    """Median rating of each latent over its raters, from a CSV with `latent` and `rating` and, where there is one, `status`.

    Rows that are not `ok`, or have no rating, are left out: a judge that failed has said nothing.
    Raises UserError for a file that cannot be read, lacks a column or holds a rating outside 1 to 5, or gives no rating at all.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            sample = file.read(4096)
            file.seek(0)
            # Excel writes semicolons where the comma is the decimal mark.
            reader = csv.DictReader(file, delimiter=";" if sample.count(";") > sample.count(",") else ",")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read ratings from {path}: {error}. Pass --ratings a CSV file.") from error
    if missing := _FIELDS - set(rows[0] if rows else ()):
        raise UserError(f"{path} has no column {', '.join(sorted(missing))}. Pass --ratings a CSV with latent and rating.")  # fmt: skip
    by_latent: dict[int, list[float]] = {}
    for number, row in enumerate(rows, start=2):
        if (row.get("status") or "ok") != "ok" or not (row["rating"] or "").strip():
            continue
        try:
            latent, rating = int(row["latent"]), float(row["rating"])
        except ValueError as error:
            raise UserError(f"{path} line {number} is no rating: {error}. Mend the file.") from error
        if not _SCALE[0] <= rating <= _SCALE[1]:
            raise UserError(f"{path} line {number} rates latent {latent} {rating:g}, expected 1 to 5. Mend the file.")
        by_latent.setdefault(latent, []).append(rating)
    if not by_latent:
        raise UserError(f"{path} holds no valid rating. Rate the latents first, or leave out --ratings.")
    return {latent: float(np.median(ratings)) for latent, ratings in by_latent.items()}


def sensitivity(base: Selection, others: Mapping[str, Selection]) -> list[Sensitivity]:
    """How the selection changes under other thresholds."""
    chosen = set(base.latent.tolist())
    rows = []
    for name, other in others.items():
        own = set(other.latent.tolist())
        union = chosen | own
        rows.append(Sensitivity(name, len(own), len(chosen & own) / len(union) if union else 1.0))
    return rows


def matched_sets(
    selected: Sequence[int] | Int64[NDArray[np.int64], " edited"],
    density_S: Float[np.ndarray, " d_sae"],
    weight_S: Float[np.ndarray, " d_sae"],
    count: int,
    seed: int,
    neighbours: int = 8,
) -> Int64[NDArray[np.int64], "sets edited"]:
    """`count` random sets as large as `selected`: each latent is replaced by one of its nearest in log density and log |weight|.

    A set draws without repetition, nearest free neighbours first. [count, len(selected)].
    Raises UserError if fewer latents are alive beside the selected ones than are selected.
    """
    chosen = np.asarray(selected, dtype=np.int64)
    alive = (density_S > 0) & (weight_S != 0)
    alive[chosen] = False
    pool = np.flatnonzero(alive)
    if len(pool) < len(chosen):
        raise UserError(f"{len(chosen)} features are selected, but only {len(pool)} other latents fire to compare them with. Select fewer.")  # fmt: skip
    key_S2 = np.stack([np.log(np.maximum(density_S, 1e-12)), np.log(np.maximum(np.abs(weight_S), 1e-12))], axis=1)
    spread = key_S2[pool].std(axis=0)
    key_S2 = key_S2 / np.where(spread > 0, spread, 1.0)
    near_FP = np.argsort(((key_S2[chosen][:, None] - key_S2[pool][None]) ** 2).sum(-1), axis=1, kind="stable")
    rng = np.random.default_rng(seed)
    sets = np.empty((count, len(chosen)), dtype=np.int64)
    for row in range(count):
        free = np.ones(len(pool), dtype=bool)
        # In random order, so that no selected latent always has the first choice.
        for f in rng.permutation(len(chosen)):
            candidates = near_FP[f][free[near_FP[f]]][:neighbours]
            pick = rng.choice(candidates)
            free[pick] = False
            sets[row, f] = pool[pick]
    return sets

"""Which training pairs to flip or drop, by features and by controls at the same budget. N pairs.

SAFER: g(y) = mean over sentence ends of sum_{safe} z - sum_{unsafe} z; a pair scores g(chosen) - g(rejected).
poison   flip the pairs that score highest        denoise   drop the pairs that score lowest
A flip changes the label and nothing else: the two responses change places, and the annotated margin stays, so that Bradley-Terry asks for
r(rejected) - r(chosen) >= margin where it asked for the opposite. Two flips are none.
Every method is one ranking, `suspicion`, low where the label looks right: poison takes its beginning, denoise its end. So sets of
growing budgets are nested, and int(N p) pairs large.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int64, Shaped
from numpy.typing import NDArray

from sarm.audit.codes import AuditCodes
from sarm.audit.selection import Selection
from sarm.settings.audit import SITES
from sarm.settings.checks import UserError

FEATURES = ("features", "features, sentence ends")
CHANGES = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("action", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
    ]
)


def pair_scores(codes: AuditCodes, selection: Selection, site: str) -> Float[np.ndarray, " pairs"]:
    """Safe minus unsafe features of the chosen response minus the same of the rejected one."""
    g_R = codes.per_end(site)[:, selection.latent] @ selection.sign.astype(np.float64)
    score_N: Float[np.ndarray, " pairs"] = g_R[codes.chosen] - g_R[codes.rejected]
    return score_N


def feature_scores(codes: AuditCodes, picked: Selection) -> dict[str, Float[np.ndarray, " pairs"]]:
    """`pair_scores` at every site, by the method's name; all 0 where no feature was picked."""
    return {name: pair_scores(codes, picked, site) for name, site in zip(FEATURES, SITES, strict=True)}


def flipped(codes: AuditCodes, is_flipped_N: Bool[np.ndarray, " pairs"]) -> AuditCodes:
    """The pairs with some labels the other way round, margins kept."""
    chosen = np.where(is_flipped_N, codes.rejected, codes.chosen)
    return replace(codes, chosen=chosen, rejected=np.where(is_flipped_N, codes.chosen, codes.rejected))


def rankings(
    scores: Mapping[str, Float[np.ndarray, " pairs"]],
    margins_N: Float[np.ndarray, " pairs"],
    probe_N: Float[np.ndarray, " pairs"],
    log_length_N: Float[np.ndarray, " pairs"],
    rng: np.random.Generator,
) -> dict[str, Float[np.ndarray, " pairs"]]:
    """Suspicion of every pair's label by each method: what poison flips first has the lowest, what denoise drops first the highest.

    `scores` are those of features, by name. margin is the size of the reward model's margin (poison flips what it is surest of, denoise drops what it is least sure of), loss its
    Bradley-Terry loss, probe that of a linear probe on activations, length takes the shorter answer to be the better one.
    """
    # NaN where a pair takes no part.
    with np.errstate(invalid="ignore"):
        loss_N, by_probe_N = np.logaddexp(0.0, -margins_N), np.logaddexp(0.0, -probe_N)
    return {
        **{name: -scores_N for name, scores_N in scores.items()},
        "random": rng.permutation(len(margins_N)).astype(np.float64),
        "margin": -np.abs(margins_N),
        "loss": loss_N,
        "length": log_length_N,
        "probe": by_probe_N,
    }


def changed_pairs(
    suspicion_N: Float[np.ndarray, " pairs"], share: float, action: str, pair_ids: Shaped[NDArray[Any], " pairs"]
) -> Int64[NDArray[np.int64], " changed"]:
    """The int(N share) pairs that `flip` or `drop` takes, first to go first; equal suspicions in order of ids.

    Raises UserError if a pair has no score, or the share is less than one pair.
    """
    if not np.isfinite(suspicion_N).all():
        missing = int((~np.isfinite(suspicion_N)).sum())
        raise UserError(f"{missing} of {len(suspicion_N)} pairs have no score, and none is made up for them. Score all pairs first.")  # fmt: skip
    count = int(len(suspicion_N) * share)
    if count == 0:
        raise UserError(f"{share:.1%} of {len(suspicion_N)} pairs is none. Pass larger shares, or more pairs.")
    key_N = suspicion_N if action == "flip" else -suspicion_N
    return np.lexsort((pair_ids, key_N))[:count]


def changes_table(
    changed: Int64[NDArray[np.int64], " changed"],
    action: str,
    suspicion_N: Float[np.ndarray, " pairs"],
    pair_ids: Shaped[NDArray[Any], " pairs"],
) -> pa.Table:
    """The manifest of what was changed, in order: enough to do it again and to take it back."""
    rows = [
        {"pair_id": str(pair_ids[i]), "action": action, "rank": rank, "score": float(suspicion_N[i])}
        for rank, i in enumerate(changed)
    ]
    return pa.Table.from_pylist(rows, schema=CHANGES)


def apply_changes(pairs: pa.Table, changes: pa.Table) -> pa.Table:
    """pairs/v1 rows with the flips and drops of a manifest; ids stay, so that flipping again takes it back.

    Raises UserError if the manifest names pairs that are not there.
    """
    action = dict(zip(changes["pair_id"].to_pylist(), changes["action"].to_pylist(), strict=True))
    rows = pairs.to_pylist()
    if unknown := action.keys() - {row["pair_id"] for row in rows}:
        raise UserError(f"{len(unknown)} changed pairs are not among these, first {min(unknown)}. Pass the pairs that the changes were made for.")  # fmt: skip
    kept = []
    for row in rows:
        what = action.get(row["pair_id"])
        if what == "flip":
            row = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        if what != "drop":
            kept.append(row)
    return pa.Table.from_pylist(kept, schema=pairs.schema)


class Detection(NamedTuple):
    """How well dropped pairs are those that are noisy."""

    precision: float
    """Share of the dropped pairs that is noisy."""
    recall: float
    """Share of the noisy pairs that is dropped."""


def precision_recall(
    dropped: Int64[NDArray[np.int64], " dropped"], is_noisy_N: Bool[np.ndarray, " pairs"]
) -> Detection:
    """Of dropped pairs, by number."""
    hits = int(is_noisy_N[dropped].sum())
    return Detection(hits / max(1, len(dropped)), hits / max(1, int(is_noisy_N.sum())))

"""codes/v2: what a SARM makes of every response of an audit, at the rewarded token and at sentence ends; and its reader.

R responses, N pairs, S d_sae, D d_in. `responses.parquet` has each distinct response once, `pairs.parquet` names them by id, so the
model runs once and everything else is arithmetic on sparse matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int64, Shaped
from numpy.typing import NDArray
from scipy import sparse

from sarm.audit.pairs import chooses
from sarm.contracts.manifest import read_manifest, verify_files
from sarm.settings.checks import UserError

CODES = "codes/v2"
COMPLETENESS = 1e-4

RESPONSES = pa.schema(
    [
        pa.field("response_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        # Tokens of the answer alone, as far as they were not cut off.
        pa.field("answer_tokens", pa.int32(), nullable=False),
        pa.field("reward", pa.float32(), nullable=False),
        pa.field("latents", pa.list_(pa.int32()), nullable=False),
        pa.field("values", pa.list_(pa.float32()), nullable=False),
        # Active latents of all sentence ends behind one another; `sentence_sizes` says how many each end has.
        pa.field("sentence_latents", pa.list_(pa.int32()), nullable=False),
        pa.field("sentence_values", pa.list_(pa.float32()), nullable=False),
        pa.field("sentence_sizes", pa.list_(pa.int32()), nullable=False),
        # The residual at the rewarded token, float32 bytes: for interventions upstream of TopK.
        pa.field("residual", pa.binary(), nullable=False),
    ]
)
CODE_PAIRS = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("pair_id", "prompt_id", "role", "subset", "source")),
        pa.field("chosen_id", pa.string(), nullable=False),
        pa.field("rejected_id", pa.string(), nullable=False),
        # By how much annotators found the chosen response better, as in pairs/v1.
        pa.field("margin", pa.float32()),
    ]
)


@dataclass(frozen=True)
class AuditCodes:
    """The codes of all responses, and pairs as places among them. `keep` makes views of fewer pairs over the same responses."""

    weight: Float[np.ndarray, " d_sae"]
    reward: Float[np.ndarray, " responses"]
    tokens: Float[np.ndarray, " responses"]
    """Tokens of each answer, without prompt and template."""
    z: sparse.csr_array
    """Latents at the rewarded token."""
    sentence: sparse.csr_array
    """Sums of the positive latents over the response's sentence ends (SAFER)."""
    ends: Int64[NDArray[np.int64], " responses"]
    """Number of sentence ends."""
    residual: Float[np.ndarray, "responses d_in"]
    pair_ids: Shaped[NDArray[Any], " pairs"]
    prompts: Shaped[NDArray[Any], " pairs"]
    roles: Shaped[NDArray[Any], " pairs"]
    subsets: Shaped[NDArray[Any], " pairs"]
    chosen: Int64[NDArray[np.int64], " pairs"]
    rejected: Int64[NDArray[np.int64], " pairs"]
    required: Float[np.ndarray, " pairs"]
    """The annotated margin of each pair, which training takes off the difference of rewards; 0 without one."""

    @property
    def num_pairs(self) -> int:
        return len(self.pair_ids)

    @property
    def margins(self) -> Float[np.ndarray, " pairs"]:
        margins_N: Float[np.ndarray, " pairs"] = self.reward[self.chosen] - self.reward[self.rejected]
        return margins_N

    @property
    def log_length(self) -> Float[np.ndarray, " pairs"]:
        """log tokens of the chosen answer minus that of the rejected one: whole conversations would hide it behind a long prompt."""
        log_R = np.log(np.maximum(self.tokens, 1.0))
        difference_N: Float[np.ndarray, " pairs"] = log_R[self.chosen] - log_R[self.rejected]
        return difference_N

    def at(self, site: str) -> sparse.csr_array:
        """Positive latents of each response: at the rewarded token, or their sums over sentence ends."""
        return self.z.maximum(0).tocsr() if site == "reward" else self.sentence

    def per_end(self, site: str) -> sparse.csr_array:
        """`at`, sums over sentence ends divided by their number: longer responses then do not have more."""
        if site == "reward":
            return self.at(site)
        return (sparse.diags_array(1 / np.maximum(self.ends, 1)) @ self.sentence).tocsr()

    @cached_property
    def difference(self) -> sparse.csr_array:
        """Latents at the rewarded token, chosen minus rejected."""
        return (self.z[self.chosen] - self.z[self.rejected]).tocsr()

    @cached_property
    def responses(self) -> Int64[NDArray[np.int64], " used"]:
        """The responses of these pairs."""
        return np.unique(np.concatenate([self.chosen, self.rejected]))

    @cached_property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        """Share of the responses of these pairs whose rewarded token each latent fires at."""
        fires = self.z[self.responses] != 0
        return np.asarray(fires.sum(axis=0)).ravel() / max(1, len(self.responses))

    def keep(self, is_kept_N: Bool[np.ndarray, " pairs"]) -> "AuditCodes":
        """The same codes with some of the pairs."""
        names = ("pair_ids", "prompts", "roles", "subsets", "chosen", "rejected", "required")
        return replace(self, **{name: getattr(self, name)[is_kept_N] for name in names})

    def role(self, role: str) -> "AuditCodes":
        """The pairs of a role: `select`, `target`, `off_select` and `off_target` (the off-target's two halves), `train` (both `select`)."""
        is_off = self.roles == "off_target"
        half_N = np.array([chooses(prompt) for prompt in self.prompts], dtype=bool)
        rules = {
            "select": self.roles == "select",
            "target": self.roles == "target",
            "off_select": is_off & half_N,
            "off_target": is_off & ~half_N,
        }
        rules["train"] = rules["select"] | rules["off_select"]
        kept = self.keep(rules[role])
        if not kept.num_pairs:
            raise UserError(f"there is no {role.replace('_', '-')} pair in these codes. Pass the audit more off-target prompts.")  # fmt: skip
        return kept


def read_codes(folder: Path, weight_S: Float[np.ndarray, " d_sae"], *, sums_up: bool = True) -> AuditCodes:
    """The codes of a finished folder, under a head.

    Raises UserError if it is unfinished or damaged, a pair's response has no codes, or, where they have to (`sums_up`), rewards are not the sum
    of contributions: a SARM's are, and a classifier's are not.
    """
    verify_files(folder, read_manifest(folder, CODES))
    responses, pairs = (pq.read_table(folder / f"{name}.parquet") for name in ("responses", "pairs"))
    return codes_of(responses, pairs, weight_S, sums_up=sums_up)


def codes_of(
    responses: pa.Table, pairs: pa.Table, weight_S: Float[np.ndarray, " d_sae"], *, sums_up: bool = True
) -> AuditCodes:
    """The tables of a codes/v2 folder as matrices. Raises as `read_codes`."""
    place = {response_id: row for row, response_id in enumerate(responses["response_id"].to_pylist())}
    sides = [[place.get(i, -1) for i in pairs[f"{side}_id"].to_pylist()] for side in ("chosen", "rejected")]
    missing = sum(min(both) < 0 for both in zip(*sides, strict=True))
    if missing:
        raise UserError(f"{missing} of {pairs.num_rows} pairs have a response without codes. Delete the codes folder and make it again.")  # fmt: skip
    d_sae = len(weight_S)
    ends_R = np.array([len(sizes) for sizes in responses["sentence_sizes"].to_pylist()], dtype=np.int64)
    residual = np.frombuffer(b"".join(responses["residual"].to_pylist()), dtype=np.float32)
    text = {name: np.array(pairs[name].to_pylist(), dtype=str) for name in ("pair_id", "prompt_id", "role", "subset")}
    codes = AuditCodes(
        weight=weight_S.astype(np.float64),
        reward=responses["reward"].to_numpy().astype(np.float64),
        tokens=responses["answer_tokens"].to_numpy().astype(np.float64),
        z=_matrix(responses, "latents", "values", d_sae),
        sentence=_matrix(responses, "sentence_latents", "sentence_values", d_sae, positive=True),
        ends=ends_R,
        residual=residual.reshape(responses.num_rows, -1),
        pair_ids=text["pair_id"],
        prompts=text["prompt_id"],
        roles=text["role"],
        subsets=text["subset"],
        chosen=np.array(sides[0], dtype=np.int64),
        rejected=np.array(sides[1], dtype=np.int64),
        required=np.array([margin or 0.0 for margin in pairs["margin"].to_pylist()]),
    )
    gap = completeness(codes) if sums_up else 0.0
    if not gap < COMPLETENESS:
        raise UserError(f"rewards differ from the sum of their contributions by up to {gap:.3g}. Pass the SARM that made the codes.")  # fmt: skip
    return codes


def completeness(codes: AuditCodes) -> float:
    """Largest |reward - sum_i w_i z_i| of any response; NaN if a reward is not finite."""
    return float(np.max(np.abs(codes.reward - codes.z @ codes.weight), initial=0.0))


def check_latents(codes: AuditCodes, latents: Sequence[int]) -> Int64[NDArray[np.int64], " latents"]:
    """The latents as an array, in order.

    Raises UserError for none, repeated or unknown ones, and for those that never fire at a rewarded token: editing them does nothing.
    """
    found = np.array(list(latents), dtype=np.int64)
    d_sae = len(codes.weight)
    if not len(found):
        raise UserError("no feature is selected, so there is nothing to edit. Pass --features, or audit with a larger --fdr.")  # fmt: skip
    if len(bad := found[(found < 0) | (found >= d_sae)]):
        raise UserError(f"there is no latent {bad[0]}: the head has latents 0 to {d_sae - 1}. Pass other --features.")
    if len(np.unique(found)) != len(found):
        raise UserError(f"a latent is named twice in {found.tolist()}. Pass each of --features once.")
    fires = np.asarray((codes.z != 0).sum(axis=0)).ravel()
    if len(silent := found[fires[found] == 0]):
        raise UserError(f"latent {silent[0]} never fires at a rewarded token of these responses. Pass other --features.")  # fmt: skip
    return found


def _matrix(table: pa.Table, latents: str, values: str, d_sae: int, *, positive: bool = False) -> sparse.csr_array:
    """A list column as a responses x d_sae matrix; latents of one response that repeat are summed."""
    index, value = (table[name].combine_chunks() for name in (latents, values))
    offsets = index.offsets.to_numpy().astype(np.int64)
    columns = index.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.int64)
    data = value.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.float64)
    if len(columns) != len(data) or (len(columns) and not 0 <= columns.min() <= columns.max() < d_sae):
        raise UserError(f"the codes do not fit a head of {d_sae} latents. Pass the SARM that made them.")
    if positive:
        data = np.maximum(data, 0.0)
    matrix = sparse.csr_array((data, columns, offsets - offsets[0]), shape=(table.num_rows, d_sae))
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix

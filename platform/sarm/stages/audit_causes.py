"""The causal tests of an audit: weights off, latents swapped, directions removed before TopK, sentences cut out; each beside controls."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from sarm.audit import causal
from sarm.audit.codes import CODES, AuditCodes, check_latents, codes_of
from sarm.audit.pairs import AUDIT_PAIRS
from sarm.audit.selection import matched_sets
from sarm.audit.steering import (
    BesideControls,
    Edit,
    Sweep,
    against_controls,
    make_edit,
    ratio_interval,
    steered_rewards,
)
from sarm.contracts.figures import SPREAD, plain_values
from sarm.contracts.ids import response_id_of, stable_id
from sarm.contracts.manifest import StageFolder, finite_or_null, write_atomically
from sarm.data.tokens.sentences import sentence_ends
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.evaluate.intervals import Interval
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.passes.attached_model import model_reader
from sarm.settings.audit import AuditFeatures
from sarm.stages.audit_codes import write_codes
from sarm.stages.audit_folder import FEATURES, Audited, audit_budget, read_audit

CAUSAL = "causal/v1"
_DELETION_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class _Zeroed:
    """The mean change of the target's margin with some head weights at 0, in reward units."""

    change: BesideControls = field(metadata=SPREAD)
    ratio_ci95: Interval
    num_controls: int


def test_causes(session: Session, settings: AuditFeatures, pairs: pa.Table) -> None:
    """The causal tests, in `causal`. Raises UserError if no feature is selected."""
    out = session.run.out
    names = ("controls", "upstream_controls", "deletions")
    asked = {name: getattr(settings, name) for name in names} | {"seed": session.run.seed}
    inputs = {CODES: (out / "codes", CODES), FEATURES: (out / "features", FEATURES)}
    folder = StageFolder(out / "causal", CAUSAL, asked, inputs)

    def body(child: StageRun) -> Mapping[str, Any]:
        found = read_audit(out)
        assert found.model is not None
        codes, target = found.codes, found.codes.role("target")
        latents = check_latents(codes, found.selection.latent.tolist())
        seed = session.run.seed
        sets_GE = matched_sets(
            selected=latents, density_S=codes.density, weight_S=codes.weight, count=settings.controls, seed=seed
        )
        zeroed = _zeroed(target, latents, sets_GE)
        rerun_gap = _rerun_gap(found.model, codes, make_edit("zero", 0.0, latents, codes.weight))
        nearest_G1 = matched_sets(
            selected=latents[:1], density_S=codes.density, weight_S=codes.weight, count=settings.controls, seed=seed
        )
        strongest = _zeroed(target, latents[:1], np.unique(nearest_G1, axis=0))
        upstream = causal.upstream(found.model, target, latents, sets_GE[: settings.upstream_controls])
        order = causal.contribution_order(codes.role("select"))
        rng = np.random.default_rng(seed)
        curves = causal.deletion_curves(
            target, order, [rng.permutation(order) for _ in range(settings.controls)], _DELETION_SIZES
        )
        content = {
            "num_pairs": target.num_pairs,
            "num_prompts": len(np.unique(target.prompts)),
            "num_features": len(latents),
            "num_controls": settings.controls,
            "num_upstream_controls": settings.upstream_controls,
            "zeroed": {**plain_values(zeroed), "rerun_gap": rerun_gap},
            "strongest": {"latent": int(latents[0]), **plain_values(strongest)},
            "swap": causal.swap(target, latents, sets_GE),
            "upstream": upstream,
            "curves": curves,
            "sentences": sentences_cut(
                session=session, settings=settings, found=found, target=target, pairs=pairs, folder=folder.folder
            ),
        }
        write_atomically(
            folder.folder / "causal.json", json.dumps(finite_or_null(plain_values(content)), indent=2, allow_nan=False)
        )
        child.log_artifact(folder.folder / "causal.json")
        figures = {
            "zeroed_ratio": zeroed.change.ratio,
            "strongest_ratio": strongest.change.ratio,
            "rerun_gap": rerun_gap,
            "removed_upstream": upstream.removed.change.value,
            "removed_upstream_ratio": upstream.removed.change.ratio,
            "aopc": curves.aopc.value,
        }
        return {"figures": {name: value for name, value in figures.items() if np.isfinite(value)}}

    session.stage("test causes", folder, body, resume=True)


def _zeroed(target: AuditCodes, latents: NDArray[np.int64], sets_GE: NDArray[np.int64]) -> _Zeroed:
    """Margins of the target with these head weights at 0, beside matched sets."""
    sweep = Sweep(target, "zero", (0.0,), np.vstack([latents[None], sets_GE]))
    change_NG = sweep.margins(0.0) - target.margins[:, None]
    return _Zeroed(
        change=against_controls(float(change_NG[:, 0].mean()), change_NG[:, 1:].mean(axis=0)),
        ratio_ci95=ratio_interval(change_NG, target.prompts),
        num_controls=len(sets_GE),
    )


def _rerun_gap(model: SarmForSequenceClassification, codes: AuditCodes, edit: Edit) -> float:
    """Largest difference between closed-form steering and an edited head that is run on the stored residuals."""
    head = model.score.weight
    kept = head.detach().clone()
    with torch.no_grad():
        head[0] = torch.from_numpy(edit.applied(codes.weight)).float()
        rows_RD = model.sae.rows_of(torch.from_numpy(codes.residual.copy()))
        rerun = model.score(model.sae(rows_RD))
        head.copy_(kept)
    return float(np.abs(rerun.squeeze(-1).double().numpy() - steered_rewards(codes, edit)).max())


def sentences_cut(
    session: Session, settings: AuditFeatures, found: Audited, target: AuditCodes, pairs: pa.Table, folder: Path
) -> causal.SentenceFigures | None:
    """Cut sentences out of some target responses, run the model on what is left, and compare with the placebo."""
    if settings.deletions == 0:
        return None
    importance_S = np.zeros_like(found.codes.weight)
    importance_S[found.selection.latent] = np.abs(found.codes.weight[found.selection.latent])
    table = pq.read_table(session.run.out / "codes" / "responses.parquet")
    stored = {row["response_id"]: row for row in table.select(["response_id", "sentence_latents", "sentence_values", "sentence_sizes"]).to_pylist()}  # fmt: skip
    place = {response_id_of: i for i, response_id_of in enumerate(table["response_id"].to_pylist())}
    texts = {
        response_id_of(row["prompt"], row[side]): (row, row[side])
        for row in pairs.to_pylist()
        if row["role"] == "target"
        for side in ("chosen", "rejected")
        # What cannot be encoded has no codes; their stage has counted it.
        if response_id_of(row["prompt"], row[side]) in stored
    }
    # One response of each prompt at a time, so that few are of the same prompt.
    ids = sorted(texts, key=lambda i: stable_id("deletion", i))
    fired = [_by_sentence(stored[i], importance_S) for i in ids]
    edits = causal.sentence_edits([texts[i][1] for i in ids], fired, sentence_ends, np.random.default_rng(session.run.seed))  # fmt: skip
    usable = [(i, edit) for i, edit in zip(ids, edits, strict=True) if edit is not None][: settings.deletions]
    if not usable:
        return causal.SentenceFigures(num_responses=0)
    edited = [{**texts[i][0], "pair_id": i, "chosen": without[0], "rejected": without[1]} for i, without in usable]
    rows = sorted(edited, key=lambda row: (row["prompt_id"], row["pair_id"]))
    budget = audit_budget(settings)
    reader = model_reader(found.sarm, budget.batch_tokens, budget.dtype)
    write_codes(pa.Table.from_pylist(rows, schema=AUDIT_PAIRS), reader, folder / "edited", session.run_pass)
    responses, renamed = (pq.read_table(folder / "edited" / f"{name}.parquet") for name in ("responses", "pairs"))
    codes = codes_of(responses, renamed, found.codes.weight, sums_up=found.model is not None)
    before_R, after_R = found.codes.at("reward") @ importance_S, codes.at("reward") @ importance_S
    original = np.array([place[i] for i in codes.pair_ids])
    change_D2 = np.stack([after_R[codes.chosen], after_R[codes.rejected]], axis=1) - before_R[original][:, None]
    return causal.deletion_effect(change_D2, codes.prompts.tolist())


def _by_sentence(stored: Mapping[str, Any], importance_S: np.ndarray) -> list[float]:
    values = np.maximum(stored["sentence_values"], 0) * importance_S[np.array(stored["sentence_latents"], dtype=np.int64)]  # fmt: skip
    ends = np.cumsum(stored["sentence_sizes"], dtype=np.int64)
    return [float(part.sum()) for part in np.split(values, ends[:-1])] if len(ends) else []

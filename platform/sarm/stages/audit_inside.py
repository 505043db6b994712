"""The causal tests of an audit of a classifier: its features' codes are edited inside it, beside matched controls and the linear approximation."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sarm.audit.codes import CODES, AuditCodes, check_latents
from sarm.audit.patching import TermFigures, patched_figures, term_figures
from sarm.audit.selection import matched_sets
from sarm.contracts.figures import plain_values
from sarm.contracts.ids import hash_share
from sarm.contracts.manifest import StageFolder, finite_or_null, write_atomically
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.passes.attached_model import AttachedReader, model_reader
from sarm.passes.edited_rewards import CodeEdit, Scope
from sarm.passes.path_attribution import TOLERANCE
from sarm.settings.audit import AuditFeatures
from sarm.settings.checks import UserError
from sarm.stages.audit_causes import CAUSAL, sentences_cut
from sarm.stages.audit_folder import FEATURES, audit_budget, read_audit
from sarm.stages.edited_rewards import effects_of_edits

SCOPES: tuple[Scope, ...] = ("all", "rewarded")
# Each takes a pass forward and back for every place on the path, hundreds where the reward has kinks.
_PAIRS_APART = 32


def test_inside(session: Session, settings: AuditFeatures, pairs: pa.Table) -> None:
    """The causal tests of a classifier, in `causal`. Raises UserError if no feature is selected."""
    out = session.run.out
    asked = {name: getattr(settings, name) for name in ("upstream_controls", "deletions")}
    inputs = {CODES: (out / "codes", CODES), FEATURES: (out / "features", FEATURES)}
    folder = StageFolder(out / "causal", CAUSAL, {**asked, "seed": session.run.seed}, inputs)

    def body(child: StageRun) -> Mapping[str, Any]:
        found = read_audit(out)
        target = found.codes.role("target")
        latents = check_latents(found.codes, found.selection.latent.tolist())
        controls_GE = matched_sets(
            selected=latents,
            density_S=found.codes.density,
            weight_S=found.codes.weight,
            count=settings.upstream_controls,
            seed=session.run.seed,
        )
        sets = [tuple(own.tolist()) for own in (latents, *controls_GE)]
        edits = [CodeEdit(own, scope=scope) for scope in SCOPES for own in sets]
        reader = inside_reader(settings)
        ids = pq.read_table(out / "codes" / "responses.parquet", columns=["response_id"])["response_id"].to_pylist()
        effects = effects_of_edits(
            pairs=pairs.filter(pc.equal(pairs["role"], "target")),
            response_ids=ids,
            reader=reader,
            edits=edits,
            folder=folder.folder / "inside",
            run_pass=session.run_pass,
        )
        target = readable(target, effects.patched)
        removed = {}
        for number, scope in enumerate(SCOPES):
            own = slice(number * len(sets), (number + 1) * len(sets))
            removed[scope] = patched_figures(target, effects.patched[:, own], effects.linear[:, own])
        terms = terms_of(session=session, target=target, latents=latents.tolist(), pairs=pairs, ids=ids, reader=reader, folder=folder.folder / "terms")  # fmt: skip
        content = {
            "num_pairs": target.num_pairs,
            "num_prompts": len(np.unique(target.prompts)),
            "num_features": len(latents),
            "num_controls": settings.upstream_controls,
            "inside": removed,
            "terms": terms,
            "sentences": sentences_cut(
                session=session, settings=settings, found=found, target=target, pairs=pairs, folder=folder.folder
            ),
        }
        write_atomically(
            folder.folder / "causal.json", json.dumps(finite_or_null(plain_values(content)), indent=2, allow_nan=False)
        )
        child.log_artifact(folder.folder / "causal.json")
        figures = {f"removed_{scope}{name}": value for scope, own in removed.items() for name, value in (("", own.change.value), ("_ratio", own.change.ratio), ("_linear", own.linear), ("_error", own.error))}  # fmt: skip
        figures |= {f"removed_{scope}_residual": own.residual for scope, own in terms.items()}
        return {"figures": {name: value for name, value in figures.items() if value is not None and np.isfinite(value)}}

    session.stage("test causes", folder, body, resume=True)


def terms_of(
    session: Session,
    target: AuditCodes,
    latents: Sequence[int],
    pairs: pa.Table,
    ids: Sequence[str],
    reader: AttachedReader,
    folder: Path,
) -> dict[str, TermFigures]:
    """For each scope the effect of suppressing the features, taken apart into terms of each, on a few of the target's pairs."""
    own = pairs.filter(pc.equal(pairs["role"], "target"))
    few = sorted(range(own.num_rows), key=lambda row: hash_share(f"terms {own['pair_id'][row]}"))[:_PAIRS_APART]
    edits = [CodeEdit(tuple(latents), scope=scope, apart=True) for scope in SCOPES]
    found = effects_of_edits(
        pairs=own.take(few), response_ids=ids, reader=reader, edits=edits, folder=folder, run_pass=session.run_pass
    )
    read, num = readable(target, found.patched), len(latents)
    return {
        scope: term_figures(
            target=read,
            latents=latents,
            patched_R=found.patched[:, n],
            terms_RE=found.terms[:, n * num : (n + 1) * num],
            places_R=found.places[:, n],
            tolerance=TOLERANCE,
        )
        for n, scope in enumerate(SCOPES)
    }


def inside_reader(settings: AuditFeatures) -> AttachedReader:
    """The reader of the audited classifier, by the audit's budget."""
    budget = audit_budget(settings)
    reader = model_reader(settings.sarm, budget.batch_tokens, budget.dtype)
    assert isinstance(reader, AttachedReader)
    return reader


def readable(codes: AuditCodes, patched_RG: np.ndarray) -> AuditCodes:
    """The pairs both of whose responses could be read. Raises UserError if there are none."""
    has = np.isfinite(patched_RG).all(axis=1)
    kept = codes.keep(has[codes.chosen] & has[codes.rejected])
    if not kept.num_pairs:
        raise UserError("no pair of the target could be read with its features edited. Look at the rejected rows, and pass other --target pairs.")  # fmt: skip
    return kept

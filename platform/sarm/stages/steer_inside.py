"""`jobs/steer.py` on an audited classifier: its features' codes are scaled inside it, beside matched controls, and the edit saved as a folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sarm.audit.codes import AuditCodes, check_latents
from sarm.audit.patching import patched_figures
from sarm.audit.selection import matched_sets
from sarm.audit.steering import by_subset, measure_edit, specificities
from sarm.contracts.figures import plain_values
from sarm.contracts.folders import FEATURE_EDIT_FOLDER
from sarm.contracts.manifest import StageFolder, finite_or_null, write_atomically
from sarm.data.formats.attached_folder import load_attached
from sarm.data.formats.feature_edit import FeatureEdit, save_edit
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.engine.terminal import say
from sarm.evaluate.statistics import pair_credit
from sarm.nn.splice import LatentEdit, Splice
from sarm.passes.attached_model import AttachedReader, model_reader
from sarm.passes.edited_rewards import CodeEdit
from sarm.passes.models import hash_of_folder
from sarm.report.audit_page import write_audit_page
from sarm.settings.audit import Steer
from sarm.settings.checks import UserError
from sarm.settings.identity import identity
from sarm.stages.audit_folder import TEXTS, Audited
from sarm.stages.audit_inside import readable
from sarm.stages.edited_rewards import effects_of_edits

STEERING = "steering.json"
MAX_CONTROLS = 20
"""Each of them runs the model on all responses again."""
_BATCH_TOKENS = 2048


def steer_inside(session: Session, settings: Steer, audited: Audited) -> Path:
    """Measure one edit by patching, save it as an edit of features of the classifier, and log it; returns its folder.

    Raises UserError for edits of head weights, which a classifier has none of, and as `check_latents` does.
    """
    factor = _factor(settings)
    out = session.run.out
    latents = check_latents(audited.codes, settings.features or audited.selection.latent.tolist())
    asked = {k: v for k, v in identity(settings, seed=session.run.seed).items() if k not in ("run", "undo", "name")}
    about = {"asked": asked, "latents": latents.tolist(), "source": hash_of_folder(audited.sarm)}
    folder = StageFolder(out / "steer" / settings.name, FEATURE_EDIT_FOLDER, about)

    def body(child: StageRun) -> Mapping[str, Any]:
        content = _measured(session, settings, audited, latents.tolist(), factor, folder.folder)
        write_atomically(
            folder.folder / STEERING, json.dumps(finite_or_null(plain_values(content)), indent=2, allow_nan=False)
        )
        attached = load_attached(audited.sarm)
        edits = [LatentEdit(int(latent), "scale", factor) for latent in latents]
        edit = FeatureEdit(
            splices=(Splice(attached.sae, attached.layer, edits),),
            positions="all",
            model=attached.identity,
            origins=(hash_of_folder(audited.sarm),),
        )
        save_edit(edit, folder.folder)
        child.log_artifact(folder.folder / STEERING)
        child.log_table(content["doses"], "doses.json")
        target = content["target"]
        shown = {f"target_{name}": getattr(target, name).value for name in ("margin_shift", "accuracy_change", "flips")}
        return {"figures": {**shown, "off_accuracy_change": content["off_target"].accuracy_change.value, "latents_changed": len(latents)}}  # fmt: skip

    session.stage(f"steer {settings.name}", folder, body, resume=True)
    page = write_audit_page(out)
    session.tracker.parent.log_artifact(page)
    say(f"edit: {folder.folder}   report: {page}")
    return folder.folder


def _factor(settings: Steer) -> float:
    """What the codes of the features are multiplied by."""
    if settings.undo is not None:
        raise UserError("an edit inside a classifier changes none of its files: to take it back, leave the edit out. --undo is for SARMs.")  # fmt: skip
    if settings.edit not in ("scale", "zero"):
        raise UserError(f"--edit {settings.edit} is of head weights, and a classifier's latents have none. Pass --edit scale or --edit zero.")  # fmt: skip
    return 0.0 if settings.edit == "zero" else settings.strength


def _measured(
    session: Session, settings: Steer, audited: Audited, latents: list[int], factor: float, folder: Path
) -> dict[str, Any]:
    codes, num_controls = audited.codes, min(settings.controls, MAX_CONTROLS)
    controls_GE = matched_sets(selected=latents, density_S=codes.density, weight_S=codes.weight, count=num_controls, seed=session.run.seed)  # fmt: skip
    edits = [CodeEdit(tuple(own), factor) for own in (latents, *controls_GE.tolist())]
    doses = [CodeEdit(tuple(latents), strength) for strength in settings.strengths]
    changes_RG, linear_RG = _effects(session, audited, [*edits, *doses], folder)
    target, off = (readable(codes.role(role), changes_RG) for role in ("target", "off_target"))
    after_R = codes.reward + changes_RG[:, 0]
    on_target, on_off = measure_edit(target, after_R), measure_edit(off, after_R)
    target_subsets, off_subsets = by_subset(target, after_R), by_subset(off, after_R)
    subsets = {**target_subsets, **off_subsets}
    sets = slice(0, len(edits))
    return {
        "edit": {
            "kind": settings.edit,
            "strength": factor,
            "inside": True,
            "weights": [{"latent": latent, "before": 1.0, "after": factor} for latent in latents],
        },
        "target": on_target,
        "target_subsets": target_subsets,
        "off_target": on_off,
        "off_subsets": off_subsets,
        "over_refusal": {name: subsets[name] for name in settings.over_refusal if name in subsets},
        "specificity": specificities(on_target, off_subsets),
        "beside_controls": patched_figures(target, changes_RG[:, sets], linear_RG[:, sets]),
        "num_controls": num_controls,
        "sweep": [],
        "doses": [
            _dose(target, off, strength, changes_RG[:, len(edits) + number], linear_RG[:, len(edits) + number])
            for number, strength in enumerate(settings.strengths)
        ],
    }


def _effects(session: Session, audited: Audited, edits: list[CodeEdit], folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Changes of all responses' rewards by every edit, by patching and to first order; NaN for the responses of other roles."""
    codes = session.run.out / "codes"
    texts = pq.read_table(codes / TEXTS)
    ids = pq.read_table(codes / "responses.parquet", columns=["response_id"])["response_id"].to_pylist()
    measured = {pair_id for role in ("target", "off_target") for pair_id in audited.codes.role(role).pair_ids.tolist()}
    wanted = texts.filter(pc.is_in(texts["pair_id"], value_set=pc.cast(sorted(measured), "string")))
    reader = model_reader(audited.sarm, _BATCH_TOKENS)
    assert isinstance(reader, AttachedReader)
    found = effects_of_edits(
        pairs=wanted, response_ids=ids, reader=reader, edits=edits, folder=folder / "inside", run_pass=session.run_pass
    )
    return found.patched, found.linear


def _dose(target: AuditCodes, off: AuditCodes, strength: float, patched_R: np.ndarray, linear_R: np.ndarray) -> dict[str, float]:  # fmt: skip
    def margin(codes: AuditCodes, change_R: np.ndarray) -> float:
        return float((change_R[codes.chosen] - change_R[codes.rejected]).mean())

    def accuracy(codes: AuditCodes) -> float:
        change_N = patched_R[codes.chosen] - patched_R[codes.rejected]
        return float(pair_credit(codes.margins + change_N).mean())

    return {
        "strength": strength,
        "target_margin": margin(target, patched_R),
        "target_linear": margin(target, linear_R),
        "target_accuracy": accuracy(target),
        "off_margin": margin(off, patched_R),
        "off_accuracy": accuracy(off),
    }

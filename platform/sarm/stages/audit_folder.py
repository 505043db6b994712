"""A finished audit, as the stages that follow it read it back."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sarm.audit.codes import CODES, AuditCodes, read_codes
from sarm.audit.selection import Selection
from sarm.contracts.manifest import read_manifest
from sarm.data.formats.reward_classes import is_attached
from sarm.data.formats.sarm_folder import read_latents, read_sarm
from sarm.engine.ray.machine import machine_of
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.passes.models import hash_of_folder, sarm_settings
from sarm.settings.audit import AuditFeatures
from sarm.settings.budget import PassBudget
from sarm.settings.checks import UserError
from sarm.stages.fitting import made_in, reading_budget

FEATURES = "audit_features/v1"
TEXTS = "texts.parquet"
"""In the codes of a classifier: AUDIT_PAIRS."""


class Audited(NamedTuple):
    """A finished audit, read back: the model, its codes, and the selected features."""

    sarm: Path
    model: SarmForSequenceClassification | None
    """None for a classifier with a dictionary: there no head of latents makes the reward."""
    codes: AuditCodes
    selection: Selection


def read_audit(out: Path) -> Audited:
    """What the jobs that follow an audit start from.

    Raises UserError if the audit is unfinished.
    """
    sarm = Path(read_manifest(out / "codes", CODES).config["place"])
    read_manifest(out / "features", FEATURES)
    model = None if is_attached(sarm) else read_sarm(sarm)
    if hash_of_folder(sarm) != read_manifest(out / "codes", CODES).config["sarm"]:
        raise UserError(f"{sarm} is not the model that {out} audited. Audit it again into another --out.")
    (weight_S,) = read_latents(sarm, "score.weight")
    codes = read_codes(out / "codes", weight_S, sums_up=model is not None)
    content = json.loads((out / "features" / "selection.json").read_text())
    latents, signs = ([row[name] for row in content["selected"]] for name in ("latent", "sign"))
    return Audited(sarm, model, codes, Selection(np.array(latents, np.int64), np.array(signs, np.int64)))


def audit_budget(settings: AuditFeatures) -> PassBudget:
    """How the audited SARM is read on the run's device; an audit that has codes goes on in the dtype that they were made in."""
    codes = settings.run.out / "codes"
    made = (made_in(codes, "dtype") or "float32") if made_in(codes, "sarm") else "auto"
    device, own = machine_of(settings.run).device(settings.run.use_gpu), sarm_settings(settings.sarm)
    return reading_budget(device, settings.sarm, own.max_length, settings.batch_tokens, made)

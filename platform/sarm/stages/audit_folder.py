"""A finished audit, as the stages that follow it read it back."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sarm.audit.codes import CODES, AuditCodes, read_codes
from sarm.audit.selection import Selection
from sarm.contracts.manifest import read_manifest
from sarm.data.formats.sarm_folder import read_sarm
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.passes.models import hash_of_folder
from sarm.settings.checks import UserError

FEATURES = "audit_features/v1"


class Audited(NamedTuple):
    """A finished audit, read back: the SARM, its codes, and the selected features."""

    sarm: Path
    model: SarmForSequenceClassification
    codes: AuditCodes
    selection: Selection


def read_audit(out: Path) -> Audited:
    """What the jobs that follow an audit start from.

    Raises UserError if the audit is unfinished.
    """
    sarm = Path(read_manifest(out / "codes", CODES).config["place"])
    read_manifest(out / "features", FEATURES)
    model = read_sarm(sarm)
    if hash_of_folder(sarm) != read_manifest(out / "codes", CODES).config["sarm"]:
        raise UserError(f"{sarm} is not the model that {out} audited. Audit it again into another --out.")
    codes = read_codes(out / "codes", model.score.weight.detach().squeeze(0).numpy())
    content = json.loads((out / "features" / "selection.json").read_text())
    latents, signs = ([row[name] for row in content["selected"]] for name in ("latent", "sign"))
    return Audited(sarm, model, codes, Selection(np.array(latents, np.int64), np.array(signs, np.int64)))

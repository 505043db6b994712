"""A cell whose reward is read off stored activations: SparseRM on directions of the cell's SAE (`sarm.evaluate.sparse_rm`).

No block is trained and no model is loaded, so that it takes seconds, in the trial's own process.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sarm.contracts.figures import plain_values
from sarm.contracts.folders import ACTIVATIONS_FOLDER, EVALUATION_FOLDER, PAIRS_FOLDER, SAE_FOLDER, SPARSE_RM_FOLDER
from sarm.contracts.manifest import Manifest, StageFolder
from sarm.contracts.untrusted import read_json
from sarm.data.formats.sae_folder import load_sae
from sarm.data.store.pairs import load_pairs
from sarm.data.store.parts import part_name
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.stages import plan as plans
from sarm.stages.sweep.plan import SweepPlan
from sarm.stages.sweep.points import Cell

HEAD, HISTORY = "head.json", "history.json"


def do_frozen(session: Session, plan: SweepPlan, cell: Cell) -> Manifest:
    """Fit and evaluate the cell's head, as far as that is not done; returns the evaluation's manifest.

    Raises UserError if no latent of the SAE tells chosen from rejected responses.
    """
    folders = session.folders
    read = {
        PAIRS_FOLDER: (folders.pairs, PAIRS_FOLDER),
        SAE_FOLDER: (folders.sae, SAE_FOLDER),
        "activations/heldout": (folders.heldout_activations, ACTIVATIONS_FOLDER),
    }
    of_training = {**read, "activations/chat": (folders.chat_activations, ACTIVATIONS_FOLDER)}
    head = StageFolder(folders.out / "sparse_rm", SPARSE_RM_FOLDER, {"seed": cell.seed}, of_training)
    session.stage("fit SparseRM", head, functools.partial(_fit, session, cell, head.folder))
    settings = plans.evaluation_settings(plan.settings(cell).evaluation, cell.seed)
    inputs = {**read, SPARSE_RM_FOLDER: (head.folder, SPARSE_RM_FOLDER)}
    evaluation = StageFolder(folders.evaluation, EVALUATION_FOLDER, settings, inputs)
    body = functools.partial(_measure, session, head.folder, evaluation.folder)
    return session.stage("evaluate", evaluation, body)


def _fit(session: Session, cell: Cell, folder: Path, child: StageRun) -> Mapping[str, Any]:
    from sarm.stages.evaluate_frozen import read_frozen, sparse_rm_of

    sae, _ = load_sae(session.folders.sae)
    model = sparse_rm_of(read_frozen(session), sae, cell.seed)
    content = {name: getattr(model, name).tolist() for name in ("latents", "head", "weight")}
    loss = min(model.cv_nll.values())
    (folder / HEAD).write_text(json.dumps({**content, "C": model.C, "cv_nll": model.cv_nll}))
    # What a search reads of every cell: there is one step, and its loss is of the folds' other prompts.
    (folder / HISTORY).write_text(json.dumps({"train": [{"loss": loss}]}))
    child.log_artifact(folder / HEAD)
    return {"figures": {"directions": len(model.latents), "C": model.C, "cv_nll": loss}}


def _measure(session: Session, head: Path, folder: Path, child: StageRun) -> Mapping[str, Any]:
    from sarm.evaluate.pairs import measure_pairs
    from sarm.evaluate.sae_quality import measure
    from sarm.stages.evaluate_frozen import read_frozen, with_direction

    sae, _ = load_sae(session.folders.sae)
    frozen = read_frozen(session)
    weight_D = np.array(read_json(head / HEAD)["weight"], np.float32)
    scores = with_direction(frozen, sae, weight_D, _unscored(session.folders.pairs))
    target = folder / "sparse_rm_scores"
    target.mkdir(exist_ok=True)
    pq.write_table(scores, target / part_name(0), write_page_checksum=True)
    measured, quality = measure_pairs(scores), measure(sae, frozen.heldout)
    figures = {
        "heldout_accuracy": measured.accuracy,
        "heldout_margin": measured.mean_margin,
        "fvu_heldout": quality.fvu,
        "alive_at_reward": quality.counts.alive_share(),
    }
    if measured.accuracy_ci95 is not None:
        figures |= {"ci95_low": measured.accuracy_ci95.low, "ci95_high": measured.accuracy_ci95.high}
    (folder / "metrics.json").write_text(json.dumps(plain_values(measured), indent=2))
    child.log_artifact(folder / "metrics.json")
    return {"figures": figures, "rows": scores.num_rows}


def _unscored(pairs: Path) -> pa.Table:
    """The held-out pairs with rewards of 0: the columns of PAIR_SCORES_TABLE that do not come from reading a text."""
    known = load_pairs(pairs, "heldout").select(["pair_id", "prompt_id", "subset"])
    for name in ("chosen_reward", "rejected_reward"):
        known = known.append_column(pa.field(name, pa.float32()), pa.array(np.zeros(known.num_rows, np.float32)))
    return known

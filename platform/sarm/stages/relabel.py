"""`jobs/relabel.py`: poison and denoise the audit's training pairs by features and by controls, and retrain the head on cached codes.

The backbone and the dictionary stay as they are (and were trained on the clean labels), so a retraining is a logistic regression of
milliseconds; that buys seeds and controls, and says nothing about what full retraining would add.
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sarm.audit.codes import CODES
from sarm.audit.relabelling import (
    apply_changes,
    changed_pairs,
    changes_table,
    feature_scores,
    rankings,
)
from sarm.audit.retraining import cross_fitted
from sarm.contracts.folders import PAIRS_FOLDER
from sarm.contracts.manifest import StageFolder, read_manifest, write_atomically
from sarm.data.sources.prepare import NEAR_DUPLICATES
from sarm.data.store.pairs import load_pairs
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.engine.terminal import say
from sarm.report import audit_figures as figures
from sarm.report.audit_page import write_audit_page
from sarm.report.figures import as_svg
from sarm.settings.audit import Relabel
from sarm.settings.checks import UserError
from sarm.settings.identity import identity
from sarm.stages.audit_folder import FEATURES as FEATURES_SCHEMA
from sarm.stages.audit_folder import Audited, read_audit
from sarm.stages.relabel_experiments import KEPT_PROMPTS, experiments

RELABEL = "relabel/v1"


def relabel(session: Session, settings: Relabel) -> Path:
    """Every action, share, method and seed; returns the stage's folder. A finished one of the same settings is left alone.

    Raises UserError if no feature is selected, or a share is less than one pair.
    """
    out = session.run.out
    audited = read_audit(out)
    if not len(audited.selection.latent):
        raise UserError("no feature is selected, so pairs have no feature score. Audit with a larger --fdr.")
    train = audited.codes.role("train")
    for share in (*settings.poison, *settings.denoise):
        changed_pairs(np.zeros(int(train.num_pairs * KEPT_PROMPTS)), share, "flip", train.pair_ids[: int(train.num_pairs * KEPT_PROMPTS)])  # fmt: skip
    asked = {k: v for k, v in identity(settings, seed=session.run.seed).items() if k not in ("run", "write", "pairs")}
    inputs = {CODES: (out / "codes", CODES), FEATURES_SCHEMA: (out / "features", FEATURES_SCHEMA)}
    folder = StageFolder(out / "relabel", RELABEL, asked, inputs)

    def body(child: StageRun) -> Mapping[str, Any]:
        content = experiments(audited=audited, settings=settings, seed=session.run.seed, folder=folder.folder, out=out)
        write_atomically(folder.folder / "relabel.json", json.dumps(content, indent=2))
        for action in ("poison", "denoise"):
            rows = [row for row in content["rows"] if row["action"] == action]
            base = {name: content["baseline"][name]["mean"] for name in ("target", "off")}
            figure = figures.budget_curves(rows, base)
            (folder.folder / f"{action}.svg").write_text(as_svg(figure))
            child.log_figure(figure, f"{action}.png")
        child.log_table([{k: v for k, v in row.items() if not isinstance(v, list | dict)} for row in content["rows"]], "relabel.json")  # fmt: skip
        child.log_artifact(folder.folder / "changes")
        child.log_artifact(folder.folder / "relabel.json")
        poison, noise = content["verdicts"]["poison"], content["verdicts"]["noise"]
        return {"figures": {"poison_target_change": poison["change"], "poison_best_control": poison["best_control_change"], "noise_precision_over_random": noise["times_random"]}}  # fmt: skip

    session.stage("poison and denoise", folder, body)
    if settings.write is not None:
        _write_pairs(session, audited, settings)
    page = write_audit_page(out)
    session.tracker.parent.log_artifact(page)
    say(f"report: {page}")
    return folder.folder


def relabelled(out: Path, write: str) -> Path:
    """Where an audit in `out` leaves the pairs of `--write` and the manifest of what was changed in them."""
    return out / "relabelled" / write.replace(":", "-").replace(", ", "-").replace(" ", "-")


def _write_pairs(session: Session, audited: Audited, settings: Relabel) -> None:
    """The pairs/v1 folder with the selecting pairs flipped or dropped, and the manifest that takes it back."""
    assert settings.write is not None
    assert settings.pairs is not None
    source = settings.pairs
    action, method, text = settings.write.split(":")
    codes, verb, seed = audited.codes.role("select"), {"poison": "flip", "denoise": "drop"}[action], session.run.seed
    probe_N = cross_fitted(codes.residual[codes.chosen] - codes.residual[codes.rejected], codes.prompts, np.ones(codes.num_pairs), seed)  # fmt: skip
    ranked = rankings(scores=feature_scores(codes, audited.selection), margins_N=codes.margins, probe_N=probe_N, log_length_N=codes.log_length, rng=np.random.default_rng(seed))  # fmt: skip
    if method not in ranked:
        raise UserError(f"unknown method {method}, known are {', '.join(ranked)}. Pass --write ACTION:METHOD:SHARE.")
    changed = changed_pairs(ranked[method], float(text), verb, codes.pair_ids)
    changes = changes_table(changed, verb, ranked[method], codes.pair_ids)
    manifest = read_manifest(settings.pairs, PAIRS_FOLDER)
    changed_table = apply_changes(load_pairs(settings.pairs), changes)
    place = relabelled(session.run.out, settings.write) / "pairs"
    folder = StageFolder(place, PAIRS_FOLDER, {**manifest.config, "relabelled": settings.write}, {PAIRS_FOLDER: (settings.pairs, PAIRS_FOLDER)})  # fmt: skip

    def body(child: StageRun) -> Mapping[str, Any]:
        pq.write_table(changed_table, place / "part-00000.parquet", write_page_checksum=True)
        if (source / NEAR_DUPLICATES).exists():
            # These are about prompts, which no change of labels affects.
            shutil.copy(source / NEAR_DUPLICATES, place)
        # Beside the folder: readers take every Parquet file in it for pairs.
        pq.write_table(changes, place.parent / "changes.parquet", write_page_checksum=True)
        child.log_artifact(place.parent / "changes.parquet")
        splits = Counter(changed_table["split"].to_pylist())
        figures_of = {"rows": changed_table.num_rows, "changed": changes.num_rows}
        return {**manifest.counts, "rows": changed_table.num_rows, "splits": dict(splits), "figures": figures_of}

    session.stage(f"write {settings.write}", folder, body)
    say(f"pairs: {place}")

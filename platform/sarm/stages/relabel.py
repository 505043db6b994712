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
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sarm.audit.codes import CODES, AuditCodes
from sarm.audit.relabelling import (
    FEATURES,
    apply_changes,
    changed_pairs,
    changes_table,
    feature_scores,
    rankings,
)
from sarm.audit.retraining import CachedHead, Repetition, cross_fitted
from sarm.contracts.folders import PAIRS_FOLDER, SARM_FOLDER
from sarm.contracts.manifest import MANIFEST, StageFolder, read_manifest, write_atomically
from sarm.data.sources.prepare import NEAR_DUPLICATES
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.engine.terminal import say
from sarm.evaluate.intervals import difference_interval
from sarm.report import audit_figures as figures
from sarm.report.audit_page import write_audit_page
from sarm.report.figures import as_svg
from sarm.settings.audit import Relabel
from sarm.settings.checks import UserError
from sarm.settings.identity import identity
from sarm.settings.reward import RewardSettings
from sarm.stages.audit_folder import FEATURES as FEATURES_SCHEMA
from sarm.stages.audit_folder import Audited, read_audit
from sarm.stages.label_noise import label_noise

RELABEL = "relabel/v1"
_KEPT_PROMPTS = 0.9


def relabel(session: Session, settings: Relabel) -> Path:
    """Every action, share, method and seed; returns the stage's folder. A finished one of the same settings is left alone.

    Raises UserError if no feature is selected, or a share is less than one pair.
    """
    out = session.run.out
    found = read_audit(out)
    if not len(found.selection.latent):
        raise UserError("no feature is selected, so pairs have no feature score. Audit with a larger --fdr.")
    train = found.codes.role("train")
    for share in (*settings.poison, *settings.denoise):
        changed_pairs(np.zeros(int(train.num_pairs * _KEPT_PROMPTS)), share, "flip", train.pair_ids[: int(train.num_pairs * _KEPT_PROMPTS)])  # fmt: skip
    asked = {k: v for k, v in identity(settings, seed=session.run.seed).items() if k not in ("run", "write", "pairs")}
    inputs = {CODES: (out / "codes", CODES), FEATURES_SCHEMA: (out / "features", FEATURES_SCHEMA)}
    folder = StageFolder(out / "relabel", RELABEL, asked, inputs)

    def body(child: StageRun) -> Mapping[str, Any]:
        content = _experiments(found=found, settings=settings, seed=session.run.seed, folder=folder.folder, out=out)
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
        _write_pairs(session, found, settings)
    page = write_audit_page(out)
    session.tracker.parent.log_artifact(page)
    say(f"report: {page}")
    return folder.folder


def relabelled(out: Path, write: str) -> Path:
    """Where an audit in `out` leaves the pairs of `--write` and the manifest of what was changed in them."""
    return out / "relabelled" / write.replace(":", "-").replace(", ", "-").replace(" ", "-")


def _write_pairs(session: Session, found: Audited, settings: Relabel) -> None:
    """The pairs/v1 folder with the selecting pairs flipped or dropped, and the manifest that takes it back."""
    assert settings.write is not None
    assert settings.pairs is not None
    source = settings.pairs
    action, method, text = settings.write.split(":")
    codes, verb, seed = found.codes.role("select"), {"poison": "flip", "denoise": "drop"}[action], session.run.seed
    probe_N = cross_fitted(codes.residual[codes.chosen] - codes.residual[codes.rejected], codes.prompts, np.ones(codes.num_pairs), seed)  # fmt: skip
    ranked = rankings(scores=feature_scores(codes, found.selection), margins_N=codes.margins, probe_N=probe_N, log_length_N=codes.log_length, rng=np.random.default_rng(seed))  # fmt: skip
    if method not in ranked:
        raise UserError(f"unknown method {method}, known are {', '.join(ranked)}. Pass --write ACTION:METHOD:SHARE.")
    changed = changed_pairs(ranked[method], float(text), verb, codes.pair_ids)
    changes = changes_table(changed, verb, ranked[method], codes.pair_ids)
    manifest = read_manifest(settings.pairs, PAIRS_FOLDER)
    table = ds.dataset([str(path) for path in sorted(settings.pairs.glob("*.parquet"))]).to_table()
    changed_table = apply_changes(table, changes)
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


def _experiments(found: Audited, settings: Relabel, seed: int, folder: Path, out: Path) -> dict[str, Any]:
    train = found.codes.role("train")
    heldout = {"target": found.codes.role("target"), "off": found.codes.role("off_target")}
    # A model that was not trained here is assumed to have had the default objective.
    trained = identity(RewardSettings()) | (
        read_manifest(found.sarm, SARM_FOLDER).config if (found.sarm / MANIFEST).exists() else {}
    )
    head = CachedHead(
        found.codes, heldout, seed, use_margin=trained["use_margin"], label_smoothing=trained["label_smoothing"]
    )
    residual_ND = train.residual[train.chosen] - train.residual[train.rejected]
    scores = feature_scores(train, found.selection)
    probe_N = cross_fitted(residual_ND, train.prompts, np.ones(train.num_pairs), seed)
    ranked = rankings(
        scores=scores,
        margins_N=train.margins,
        probe_N=probe_N,
        log_length_N=train.log_length,
        rng=np.random.default_rng(seed),
    )
    seeds = []
    for s in range(settings.seeds):
        names = np.unique(train.prompts)
        kept = np.random.default_rng((seed, s)).permutation(names)[: max(1, int(len(names) * _KEPT_PROMPTS))]
        used = np.flatnonzero(np.isin(train.prompts, kept))
        seeds.append(Repetition(used, head.credits(head.fit(used, np.ones(train.num_pairs)))))
    rows: list[dict[str, Any]] = []
    (folder / "changes").mkdir()
    for action, verb, shares in (("poison", "flip", settings.poison), ("denoise", "drop", settings.denoise)):
        for share in shares:
            for method, suspicion_N in ranked.items():
                whole = changed_pairs(suspicion_N, share, verb, train.pair_ids)
                place = folder / "changes" / f"{action}-{method.replace(', ', '-').replace(' ', '-')}-{share:g}.parquet"
                pq.write_table(changes_table(whole, verb, suspicion_N, train.pair_ids), place)
                rows.append(
                    _row(
                        action=action,
                        verb=verb,
                        share=share,
                        method=method,
                        suspicion_N=suspicion_N,
                        head=head,
                        train=train,
                        heldout=heldout,
                        seeds=seeds,
                        settings=settings,
                        seed=seed,
                    )
                )
    noise_rows = label_noise(
        found=found, head=head, residual_ND=residual_ND, seeds=seeds, settings=settings, seed=seed, out=out
    )
    baseline = {name: {"mean": float(np.mean([one.credits[name] for one in seeds]))} for name in heldout}
    verdicts = _verdicts(rows=rows, noise_rows=noise_rows, heldout=heldout, settings=settings, seed=seed)
    for row in rows:
        row.pop("_credits")
    return {
        "num_pairs": train.num_pairs,
        "num_prompts": len(np.unique(train.prompts)),
        "num_seeds": settings.seeds,
        "retraining": f"the head alone is retrained, by logistic regression on {len(head.alive)} cached latents (penalty C = {head.penalty:g}), with the SARM's own objective: {_objective(head, trained)}. Backbone and dictionary stay, and have seen the clean labels.",
        "noise": settings.noise,
        "baseline": baseline,
        "rows": rows,
        "noise_rows": noise_rows,
        "verdicts": verdicts,
    }


def _objective(head: CachedHead, trained: Mapping[str, Any]) -> str:
    said = (
        f"margins of {np.count_nonzero(head.margins):,} pairs are taken off, label smoothing {head.label_smoothing:g}"
    )
    return said + ("; its centring of rewards is left out" if trained["centre_weight"] else "")


def _row(
    action: str, verb: str, share: float, method: str, suspicion_N: NDArray[np.float64], head: CachedHead, train: AuditCodes,
    heldout: Mapping[str, AuditCodes], seeds: list[Repetition], settings: Relabel, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Held-out accuracy after one intervention, averaged over seeds, and its change against the same seeds' unchanged labels."""
    after: dict[str, list[NDArray[np.float64]]] = {name: [] for name in heldout}
    for s, one in enumerate(seeds):
        ranking_N = np.random.default_rng((seed, s)).permutation(len(suspicion_N)).astype(float) if method == "random" else suspicion_N  # fmt: skip
        changed = one.rows[changed_pairs(ranking_N[one.rows], share, verb, train.pair_ids[one.rows])]
        sign_N = np.ones(train.num_pairs)
        kept = one.rows
        if verb == "flip":
            sign_N[changed] = -1.0
        else:
            kept = np.setdiff1d(one.rows, changed)
        for name, credit_N in head.credits(head.fit(kept, sign_N)).items():
            after[name].append(credit_N)
    row: dict[str, Any] = {"action": action, "share": share, "method": method, "_credits": {}}
    for name, codes in heldout.items():
        change_N = np.mean(after[name], axis=0) - np.mean([one.credits[name] for one in seeds], axis=0)
        ends = difference_interval(change_N, codes.prompts)
        row |= {name: float(np.mean(after[name])), f"{name}_change": float(change_N.mean()), f"{name}_ci95": list(ends)}  # fmt: skip
        row[f"{name}_subsets"] = {
            subset: float(change_N[codes.subsets == subset].mean()) for subset in sorted(set(codes.subsets.tolist()))
        }
        row["_credits"][name] = change_N
    row["target_seed_std"] = float(np.std([one.mean() for one in after["target"]]))
    return row


def _verdicts(
    rows: list[dict[str, Any]],
    noise_rows: list[dict[str, Any]],
    heldout: Mapping[str, AuditCodes],
    settings: Relabel,
    seed: int,
) -> dict[str, Any]:
    """Goals and results: the strongest poison beside its best control, and the share of noise that was found."""
    share = max(settings.poison)
    strongest = {row["method"]: row for row in rows if row["action"] == "poison" and row["share"] == share}
    own = {name: strongest[name] for name in FEATURES}
    best_own = min(own, key=lambda name: own[name]["target_change"])
    controls = {name: row for name, row in strongest.items() if name not in FEATURES}
    best = min(controls, key=lambda name: controls[name]["target_change"])
    gap_N = own[best_own]["_credits"]["target"] - controls[best]["_credits"]["target"]
    ends = difference_interval(gap_N, heldout["target"].prompts)
    off = heldout["off"]
    subsets = {}
    for subset in sorted(set(off.subsets.tolist())):
        is_in = off.subsets == subset
        change_N = own[best_own]["_credits"]["off"][is_in]
        own_ends = difference_interval(change_N, off.prompts[is_in])
        subsets[subset] = {"change": float(change_N.mean()), "ci95": list(own_ends)}
    nearest = min(settings.denoise, key=lambda s: abs(s - settings.noise))
    noise = {row["method"]: row for row in noise_rows if row["share"] == nearest}
    best_noise = max(FEATURES, key=lambda name: noise[name]["precision"])
    return {
        "poison": {
            "share": share,
            "method": best_own,
            "change": own[best_own]["target_change"],
            "ci95": own[best_own]["target_ci95"],
            "best_control": best,
            "best_control_change": controls[best]["target_change"],
            "minus_best_control": float(gap_N.mean()),
            "minus_best_control_ci95": list(ends),
            "lowers_more_than_every_control": own[best_own]["target_change"] < controls[best]["target_change"],
            "off_subsets": subsets,
        },
        "noise": {
            "share": nearest,
            "method": best_noise,
            "precision": noise[best_noise]["precision"],
            "times_random": noise[best_noise]["precision"] / settings.noise,
            "controls": {name: row["precision"] for name, row in noise.items() if name not in FEATURES},
        },
    }

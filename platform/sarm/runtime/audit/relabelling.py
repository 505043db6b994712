"""`jobs/relabel.py`: poison and denoise the audit's training pairs by features and by controls, and retrain the head on cached codes.

The backbone and the dictionary stay as they are (and were trained on the clean labels), so a retraining is a logistic regression of
milliseconds; that buys seeds and controls, and says nothing about what full retraining would add.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sarm.audit import figures
from sarm.audit.codes import CODES, AuditCodes
from sarm.audit.contrast import contrast, off_target_firing
from sarm.audit.relabelling import (
    FEATURES,
    apply_changes,
    changed_pairs,
    changes_table,
    pair_scores,
    precision_recall,
    rankings,
)
from sarm.audit.selection import Selection, select
from sarm.audit.settings import SITES, Relabel
from sarm.config import UserError, identity
from sarm.data.intervals import difference_interval
from sarm.folder_schemas import PAIRS
from sarm.interpret.figures import as_svg
from sarm.manifest import StageFolder, read_manifest, write_atomically
from sarm.runtime.audit.audit_folder import FEATURES as FEATURES_SCHEMA
from sarm.runtime.audit.audit_folder import Audited, read_audit
from sarm.runtime.audit.audit_page import write_audit_page
from sarm.runtime.audit.retraining import CachedHead, cross_fitted
from sarm.runtime.session import Session, say
from sarm.runtime.tracking import StageRun

RELABEL = "relabel/v1"
_KEPT_PROMPTS = 0.9
_PERMUTATIONS = 1000


class _Seed(NamedTuple):
    """One repetition: the training pairs it uses, and the credits of its head on their unchanged labels."""

    rows: NDArray[np.int64]
    credits: dict[str, NDArray[np.float64]]


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
        content = _experiments(found, settings, session.run.seed, folder.folder, out)
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
    action, method, text = settings.write.split(":")
    codes, verb, seed = found.codes.role("select"), {"poison": "flip", "denoise": "drop"}[action], session.run.seed
    probe_N = cross_fitted(codes.residual[codes.chosen] - codes.residual[codes.rejected], codes.prompts, np.ones(codes.num_pairs), seed)  # fmt: skip
    ranked = rankings(_scores(codes, found.selection, codes.chosen), codes.margins, probe_N, codes.log_length, np.random.default_rng(seed))  # fmt: skip
    if method not in ranked:
        raise UserError(f"unknown method {method}, known are {', '.join(ranked)}. Pass --write ACTION:METHOD:SHARE.")
    changed = changed_pairs(ranked[method], float(text), verb, codes.pair_ids)
    changes = changes_table(changed, verb, ranked[method], codes.pair_ids)
    manifest = read_manifest(settings.pairs, PAIRS)
    table = ds.dataset([str(path) for path in sorted(settings.pairs.glob("*.parquet"))]).to_table()
    changed_table = apply_changes(table, changes)
    place = relabelled(session.run.out, settings.write) / "pairs"
    folder = StageFolder(place, PAIRS, {**manifest.config, "relabelled": settings.write}, {PAIRS: (settings.pairs, PAIRS)})  # fmt: skip

    def body(child: StageRun) -> Mapping[str, Any]:
        pq.write_table(changed_table, place / "part-00000.parquet", write_page_checksum=True)
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
    head = CachedHead(found.codes, heldout, seed)
    residual_ND = train.residual[train.chosen] - train.residual[train.rejected]
    scores = {name: pair_scores(train, found.selection, site) for name, site in zip(FEATURES, SITES, strict=True)}
    probe_N = cross_fitted(residual_ND, train.prompts, np.ones(train.num_pairs), seed)
    ranked = rankings(scores, train.margins, probe_N, train.log_length, np.random.default_rng(seed))
    seeds = []
    for s in range(settings.seeds):
        names = np.unique(train.prompts)
        kept = np.random.default_rng((seed, s)).permutation(names)[: max(1, int(len(names) * _KEPT_PROMPTS))]
        used = np.flatnonzero(np.isin(train.prompts, kept))
        seeds.append(_Seed(used, head.credits(head.fit(used, np.ones(train.num_pairs)))))
    rows: list[dict[str, Any]] = []
    (folder / "changes").mkdir()
    for action, verb, shares in (("poison", "flip", settings.poison), ("denoise", "drop", settings.denoise)):
        for share in shares:
            for method, suspicion_N in ranked.items():
                whole = changed_pairs(suspicion_N, share, verb, train.pair_ids)
                place = folder / "changes" / f"{action}-{method.replace(', ', '-').replace(' ', '-')}-{share:g}.parquet"
                pq.write_table(changes_table(whole, verb, suspicion_N, train.pair_ids), place)
                rows.append(_row(action, verb, share, method, suspicion_N, head, train, heldout, seeds, settings, seed))
    noise_rows = _noise(found, head, train, residual_ND, seeds, settings, seed, out)
    baseline = {name: {"mean": float(np.mean([one.credits[name] for one in seeds]))} for name in heldout}
    verdicts = _verdicts(rows, noise_rows, heldout, settings, seed)
    for row in rows:
        row.pop("_credits")
    return {
        "num_pairs": train.num_pairs,
        "num_prompts": len(np.unique(train.prompts)),
        "num_seeds": settings.seeds,
        "retraining": f"the head alone is retrained, by logistic regression on {len(head.alive)} cached latents (penalty C = {head.penalty:g}); backbone and dictionary stay, and have seen the clean labels.",
        "noise": settings.noise,
        "baseline": baseline,
        "rows": rows,
        "noise_rows": noise_rows,
        "verdicts": verdicts,
    }


def _row(
    action: str, verb: str, share: float, method: str, suspicion_N: NDArray[np.float64], head: CachedHead, train: AuditCodes,
    heldout: Mapping[str, AuditCodes], seeds: list[_Seed], settings: Relabel, seed: int,
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


def _noise(
    found: Audited, head: CachedHead, train: AuditCodes, residual_ND: NDArray[np.float32], seeds: list[_Seed], settings: Relabel, seed: int, out: Path
) -> list[dict[str, Any]]:  # fmt: skip
    """Flip labels at random, choose features and fit controls on the noisy labels alone, and drop what they suspect."""
    asked = read_manifest(out / "features", FEATURES_SCHEMA).config
    off_S = off_target_firing(found.codes)
    sums: dict[tuple[float, str], list[dict[str, float]]] = {}
    for s, one in enumerate(seeds):
        rng = np.random.default_rng((seed, s, 1))
        noisy_N = np.zeros(train.num_pairs, dtype=bool)
        noisy_N[rng.choice(one.rows, int(len(one.rows) * settings.noise), replace=False)] = True
        sign_N = np.where(noisy_N, -1.0, 1.0)
        swapped = _swapped(train, noisy_N)
        margin_N = cross_fitted(head.x, train.prompts, sign_N, seed, head.penalty)
        weight_S = np.zeros_like(found.codes.weight)
        weight_S[head.alive] = head.fit(one.rows, sign_N) / head.scale
        is_used = np.zeros(train.num_pairs, dtype=bool)
        is_used[one.rows] = train.roles[one.rows] == "select"
        contrasted = contrast(swapped.keep(is_used), asked["site"], _PERMUTATIONS, seed)
        picked = select(contrasted, off_S, weight_S, asked["fdr"], asked["max_off_target"], asked["max_features"], asked["rank"])  # fmt: skip
        ranked = rankings(
            _scores(swapped, picked, one.rows),
            margin_N,
            cross_fitted(residual_ND, train.prompts, sign_N, seed),
            swapped.log_length,
            rng,
        )
        for share in settings.denoise:
            for method, suspicion_N in ranked.items():
                dropped = one.rows[changed_pairs(suspicion_N[one.rows], share, "drop", train.pair_ids[one.rows])]
                credit = head.credits(head.fit(np.setdiff1d(one.rows, dropped), sign_N))
                figures_of = precision_recall(dropped, noisy_N) | {"target": float(credit["target"].mean())}
                sums.setdefault((share, method), []).append(figures_of)
    return [
        {"share": share, "method": method, **{name: float(np.mean([f[name] for f in found_])) for name in found_[0]},
         "precision_min": float(min(f["precision"] for f in found_)), "precision_max": float(max(f["precision"] for f in found_))}
        for (share, method), found_ in sums.items()
    ]  # fmt: skip


def _scores(codes: AuditCodes, picked: Selection, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    if not len(picked.latent):
        raise UserError(f"under the injected noise no feature of {len(rows)} pairs is significant. Pass a smaller --noise, or audit more pairs.")  # fmt: skip
    return {name: pair_scores(codes, picked, site) for name, site in zip(FEATURES, SITES, strict=True)}


def _swapped(codes: AuditCodes, is_swapped_N: NDArray[np.bool_]) -> AuditCodes:
    """The pairs with some labels the other way round."""
    chosen = np.where(is_swapped_N, codes.rejected, codes.chosen)
    return replace(codes, chosen=chosen, rejected=np.where(is_swapped_N, codes.chosen, codes.rejected))


def _verdicts(
    rows: list[dict[str, Any]],
    noise_rows: list[dict[str, Any]],
    heldout: Mapping[str, AuditCodes],
    settings: Relabel,
    seed: int,
) -> dict[str, Any]:
    """What was hoped for, against what came out: the strongest poison beside its best control, and noise found again."""
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

"""`jobs/audit_features.py`: codes -> contrast and selection -> causal tests -> audit.html, each a stage of one run."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sarm.audit import causal
from sarm.audit.codes import CODES, AuditCodes, check_latents, completeness, read_codes
from sarm.audit.contrast import Contrast, contrast, off_target_firing
from sarm.audit.selection import Selection, matched_sets, read_ratings, select, sensitivity
from sarm.audit.settings import SITES, AuditFeatures
from sarm.audit.steering import Edit, Sweep, against_controls, make_edit, ratio_interval
from sarm.config import UserError, identity
from sarm.data.artifacts import load_sarm
from sarm.data.audit_pairs import ROLES, audit_pairs
from sarm.data.sentences import sentence_ends
from sarm.manifest import StageFolder, read_manifest, write_atomically
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.runtime.audit_page import write_audit_page
from sarm.runtime.models import hash_of_folder
from sarm.runtime.session import Session, say
from sarm.runtime.tracking import StageRun

FEATURES, CAUSAL = "audit_features/v1", "causal/v1"
_DELETION_SIZES = (1, 2, 4, 8, 16, 32)


class Audited(NamedTuple):
    """A finished audit, read back: the SARM, its codes, and the selected features."""

    sarm: Path
    model: SarmForSequenceClassification
    codes: AuditCodes
    selection: Selection


def audit(session: Session, settings: AuditFeatures) -> Path:
    """Every stage; returns the page. Finished stages of the same settings are left alone.

    Raises UserError for unusable models, sources or ratings, before a cluster starts and before anything is written.
    """
    from sarm.runtime.audit_codes import sarm_settings

    sarm_settings(settings.sarm)
    ratings = None if settings.ratings is None else read_ratings(settings.ratings)
    limits = {"select": settings.limit, "target": settings.limit, "off_target": settings.limit_off_target}
    pairs = audit_pairs({role: getattr(settings, role) for role in ROLES}, limits)
    cache_codes(session, settings, pairs)
    choose_features(session, settings, ratings)
    test_causes(session, settings, pairs)
    page = write_audit_page(session.run.out)
    session.tracker.parent.log_artifact(page)
    say(f"report: {page}")
    return page


def read_audit(out: Path) -> Audited:
    """What the jobs that follow an audit start from.

    Raises UserError if the audit is unfinished.
    """
    sarm = Path(read_manifest(out / "codes", CODES).config["place"])
    read_manifest(out / "features", FEATURES)
    model = load_sarm(sarm)
    if hash_of_folder(sarm) != read_manifest(out / "codes", CODES).config["sarm"]:
        raise UserError(f"{sarm} is not the model that {out} audited. Audit it again into another --out.")
    codes = read_codes(out / "codes", model.score.weight.detach().squeeze(0).numpy())
    found = json.loads((out / "features" / "selection.json").read_text())
    latents, signs = ([row[name] for row in found["selected"]] for name in ("latent", "sign"))
    return Audited(sarm, model, codes, Selection(np.array(latents, np.int64), np.array(signs, np.int64)))


def cache_codes(session: Session, settings: AuditFeatures, pairs: pa.Table) -> None:
    """The codes of all responses of the audit, in `codes` of the run's folder."""
    from sarm.runtime.audit_codes import write_codes

    digest = hashlib.sha256()
    for name in ("role", "pair_id"):
        digest.update("\x1f".join(pairs[name].to_pylist()).encode())
    asked = {"sarm": hash_of_folder(settings.sarm), "place": str(settings.sarm), "pairs": digest.hexdigest()[:16]}
    folder = StageFolder(session.run.out / "codes", CODES, asked)

    def body(_: StageRun) -> Mapping[str, Any]:
        counts = write_codes(pairs, settings.sarm, settings.batch_tokens, folder.folder, session.run, session.cluster)
        return {**counts, "figures": counts}

    session.stage("cache codes", folder, body)


def choose_features(session: Session, settings: AuditFeatures, ratings: Mapping[int, float] | None) -> None:
    """Contrast scores of every latent at both sites, and the selection, in `features`."""
    out = session.run.out
    names = ("max_features", "rank", "fdr", "max_off_target", "site", "min_rating", "permutations", "resamples")
    asked = {
        name: value for name, value in identity(settings, seed=session.run.seed).items() if name in (*names, "seed")
    }
    rated = None if ratings is None else {str(latent): rating for latent, rating in sorted(ratings.items())}
    folder = StageFolder(out / "features", FEATURES, {**asked, "ratings": rated}, {CODES: (out / "codes", CODES)})

    def body(child: StageRun) -> Mapping[str, Any]:
        weight_S = load_sarm(settings.sarm).score.weight.detach().squeeze(0).numpy()
        codes = read_codes(out / "codes", weight_S)
        chosen_on = codes.role("select")
        off_S = off_target_firing(codes)
        found = {
            site: contrast(chosen_on, site, settings.permutations, settings.resamples, session.run.seed)
            for site in SITES
        }
        picked = _select(found[settings.site], off_S, weight_S, settings, ratings)
        tables = [_table(site, one, off_S, weight_S, chosen_on, picked) for site, one in found.items()]
        pq.write_table(pa.concat_tables(tables), folder.folder / "latents.parquet", write_page_checksum=True)
        gap = completeness(codes)
        content: dict[str, Any] = {
            "site": settings.site,
            "selected": [{"latent": int(i), "sign": int(s)} for i, s in zip(picked.latent, picked.sign, strict=True)],
            "thresholds": _thresholds(found, off_S, weight_S, settings, ratings, picked),
            "sites": {site: _site_summary(one, settings.fdr) for site, one in found.items()},
            "num_select_pairs": chosen_on.num_pairs,
            "num_off_pairs": codes.role("off_select").num_pairs,
            "completeness": gap,
            "rated": len(ratings) if ratings is not None else None,
        }
        write_atomically(folder.folder / "selection.json", json.dumps(content, indent=2))
        child.log_artifact(folder.folder / "selection.json")
        rows = tables[SITES.index(settings.site)].to_pylist()
        child.log_table([row for row in rows if row["sign"]][:200] or rows[:20], "features.json")
        survive = content["sites"][settings.site]["num_significant"]
        return {"figures": {"selected": len(picked.latent), "significant": survive, "completeness": gap}}

    session.stage("choose features", folder, body)


def test_causes(session: Session, settings: AuditFeatures, pairs: pa.Table) -> None:
    """The causal tests, in `causal`. Raises UserError if no feature is selected."""
    out = session.run.out
    names = ("resamples", "controls", "upstream_controls", "deletions")
    asked = {name: getattr(settings, name) for name in names} | {"seed": session.run.seed}
    inputs = {CODES: (out / "codes", CODES), FEATURES: (out / "features", FEATURES)}
    folder = StageFolder(out / "causal", CAUSAL, asked, inputs)

    def body(child: StageRun) -> Mapping[str, Any]:
        found = read_audit(out)
        codes, target = found.codes, found.codes.role("target")
        latents = check_latents(codes, found.selection.latent.tolist())
        seed, resamples = session.run.seed, settings.resamples
        sets_GE = matched_sets(latents, codes.density, codes.weight, settings.controls, seed)
        zeroed = Sweep(target, "zero", (0.0,), np.vstack([latents[None], sets_GE]))
        change_NG = zeroed.margins(0.0) - target.margins[:, None]
        steering = {
            **against_controls(float(change_NG[:, 0].mean()), change_NG[:, 1:].mean(axis=0)),
            "ratio_ci95": ratio_interval(change_NG, target.prompts, resamples, seed),
            "rerun_gap": _rerun_gap(found, make_edit("zero", 0.0, latents, codes.weight)),
        }
        order = causal.contribution_order(codes.role("select"))
        rng = np.random.default_rng(seed)
        content: dict[str, Any] = {
            "num_pairs": target.num_pairs,
            "num_prompts": len(np.unique(target.prompts)),
            "num_features": len(latents),
            "num_controls": settings.controls,
            "num_upstream_controls": settings.upstream_controls,
            "zeroed": steering,
            "swap": causal.swap(target, latents, sets_GE, resamples, seed),
            "upstream": causal.upstream(
                found.model, target, latents, sets_GE[: settings.upstream_controls], resamples, seed
            ),
            "curves": causal.deletion_curves(
                target, order, [rng.permutation(order) for _ in range(settings.controls)], _DELETION_SIZES
            ),
            "sentences": _sentences(session, settings, found, target, pairs, folder.folder),
        }
        write_atomically(folder.folder / "causal.json", json.dumps(content, indent=2))
        child.log_artifact(folder.folder / "causal.json")
        figures = {
            "zeroed_ratio": steering["ratio"],
            "rerun_gap": steering["rerun_gap"],
            "removed_upstream": content["upstream"]["removed"]["value"],
            "removed_upstream_ratio": content["upstream"]["removed"]["ratio"],
            "aopc": content["curves"]["aopc"]["value"],
        }
        return {"figures": {name: value for name, value in figures.items() if np.isfinite(value)}}

    session.stage("test causes", folder, body)


def _rerun_gap(found: Audited, edit: Edit) -> float:
    """Largest difference between closed-form steering and an edited head that is run on the stored residuals."""
    import torch

    from sarm.audit.steering import steered_rewards
    from sarm.nn.sae import standardise

    head = found.model.score.weight
    kept = head.detach().clone()
    with torch.no_grad():
        head[0] = torch.from_numpy(edit.applied(found.codes.weight)).float()
        rerun = found.model.score(found.model.sae(standardise(torch.from_numpy(found.codes.residual.copy()))))
        head.copy_(kept)
    return float(np.abs(rerun.squeeze(-1).double().numpy() - steered_rewards(found.codes, edit)).max())


def _sentences(
    session: Session, settings: AuditFeatures, found: Audited, target: AuditCodes, pairs: pa.Table, folder: Path
) -> dict[str, Any] | None:
    """Cut sentences out of some target responses, run the model on what is left, and compare with the placebo."""
    from sarm.audit.codes import codes_of
    from sarm.data.audit_pairs import AUDIT_PAIRS
    from sarm.runtime.audit_codes import write_codes
    from sarm.schema import stable_id

    if settings.deletions == 0:
        return None
    importance_S = np.zeros_like(found.codes.weight)
    importance_S[found.selection.latent] = np.abs(found.codes.weight[found.selection.latent])
    table = pq.read_table(session.run.out / "codes" / "responses.parquet")
    stored = {row["response_id"]: row for row in table.select(["response_id", "sentence_latents", "sentence_values", "sentence_sizes"]).to_pylist()}  # fmt: skip
    place = {response_id: i for i, response_id in enumerate(table["response_id"].to_pylist())}
    texts = {
        stable_id(row["prompt_id"], row[side]): (row, row[side])
        for row in pairs.to_pylist()
        if row["role"] == "target"
        for side in ("chosen", "rejected")
    }
    # One response of each prompt at a time, so that few are of the same prompt.
    ids = sorted(texts, key=lambda i: stable_id("deletion", i))
    fired = [_by_sentence(stored[i], importance_S) for i in ids]
    edits = causal.sentence_edits([texts[i][1] for i in ids], fired, sentence_ends, np.random.default_rng(session.run.seed))  # fmt: skip
    usable = [(i, edit) for i, edit in zip(ids, edits, strict=True) if edit is not None][: settings.deletions]
    if not usable:
        return {"num_responses": 0}
    edited = [{**texts[i][0], "pair_id": i, "chosen": without[0], "rejected": without[1]} for i, without in usable]
    rows = sorted(edited, key=lambda row: (row["prompt_id"], row["pair_id"]))
    write_codes(pa.Table.from_pylist(rows, schema=AUDIT_PAIRS), found.sarm, settings.batch_tokens, folder / "edited", session.run, session.cluster)  # fmt: skip
    responses, renamed = (pq.read_table(folder / "edited" / f"{name}.parquet") for name in ("responses", "pairs"))
    codes = codes_of(responses, renamed, found.codes.weight)
    before_R, after_R = found.codes.at("reward") @ importance_S, codes.at("reward") @ importance_S
    original = np.array([place[i] for i in codes.pair_ids])
    change_D2 = np.stack([after_R[codes.chosen], after_R[codes.rejected]], axis=1) - before_R[original][:, None]
    return causal.deletion_effect(change_D2, codes.prompts.tolist(), settings.resamples, session.run.seed)


def _by_sentence(stored: Mapping[str, Any], importance_S: np.ndarray) -> list[float]:
    values = np.maximum(stored["sentence_values"], 0) * importance_S[np.array(stored["sentence_latents"], dtype=np.int64)]  # fmt: skip
    ends = np.cumsum(stored["sentence_sizes"], dtype=np.int64)
    return [float(part.sum()) for part in np.split(values, ends[:-1])] if len(ends) else []


def _select(
    found: Contrast, off_S: np.ndarray, weight_S: np.ndarray, settings: AuditFeatures, ratings: Mapping[int, float] | None, **other: Any
) -> Selection:  # fmt: skip
    asked = {
        name: getattr(settings, name) for name in ("fdr", "max_off_target", "max_features", "rank", "min_rating")
    } | other
    return select(found, off_S, weight_S, ratings=ratings, **asked)


def _thresholds(
    found: Mapping[str, Contrast], off_S: np.ndarray, weight_S: np.ndarray, settings: AuditFeatures, ratings: Mapping[int, float] | None, picked: Selection
) -> list[dict[str, Any]]:  # fmt: skip
    variants: dict[str, dict[str, Any]] = {
        **{f"false discoveries {share:g}": {"fdr": share} for share in (0.01, 0.05, 0.2)},
        **{f"off-target firing up to {share:g}": {"max_off_target": share} for share in (0.1, 0.25, 0.5, 1.0)},
        **({f"rating of {least} or more": {"min_rating": float(least)} for least in (3, 4, 5)} if ratings else {}),
    }
    others = {
        name: _select(found[settings.site], off_S, weight_S, settings, ratings, **change)
        for name, change in variants.items()
    }
    others |= {f"site {site}": _select(one, off_S, weight_S, settings, ratings) for site, one in found.items()}
    return sensitivity(picked, others)


def _site_summary(found: Contrast, fdr: float) -> dict[str, Any]:
    return {
        "num_latents": len(found.latent),
        "num_significant": int((found.q <= fdr).sum()),
        "num_significant_pairs": int((found.p_pairs <= fdr).sum()),
        "num_prompts": found.num_prompts,
        "is_exact": found.is_exact,
    }


def _table(site: str, found: Contrast, off_S: np.ndarray, weight_S: np.ndarray, codes: AuditCodes, picked: Selection) -> pa.Table:  # fmt: skip
    sign = dict(zip(picked.latent.tolist(), picked.sign.tolist(), strict=True))
    columns = {
        **asdict(found),
        "weight": weight_S[found.latent].astype(np.float64),
        "effect": weight_S[found.latent] * found.difference,
        "off_target": off_S[found.latent],
        "density": codes.density[found.latent],
    }
    arrays = {name: value for name, value in columns.items() if isinstance(value, np.ndarray)}
    signs = np.array([sign.get(int(i), 0) for i in found.latent], dtype=np.int64)
    order = np.lexsort((found.latent, -np.abs(arrays["effect"])))
    return pa.table({"site": [site] * len(order), **{name: value[order] for name, value in arrays.items()}, "sign": signs[order]})  # fmt: skip

"""`jobs/audit_features.py`: codes -> contrast and selection -> causal tests -> audit.html, each a stage of one run.

What needs torch or Ray is imported inside, so that who is refused need not wait for it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sarm.audit.codes import CODES, AuditCodes, completeness, read_codes
from sarm.audit.contrast import Contrast, contrast, off_target_firing
from sarm.audit.pairs import ROLES, audit_pairs
from sarm.audit.patching import explained_share
from sarm.audit.selection import Selection, Sensitivity, select, sensitivity
from sarm.contracts.figures import plain_values
from sarm.contracts.manifest import StageFolder, difference_of, record_of, write_atomically
from sarm.data.formats.reward_classes import is_attached
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import RUN_FILE, Session
from sarm.engine.terminal import say
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.passes.models import hash_of_folder, sarm_settings
from sarm.report.audit_page import write_audit_page
from sarm.settings.audit import SITES, AuditFeatures
from sarm.settings.checks import UserError
from sarm.settings.identity import identity
from sarm.stages.audit_folder import FEATURES, TEXTS, audit_budget
from sarm.stages.chain_state import move, was_moved
from sarm.stages.safety_ratings import SafetyRatings, safety_ratings


def audit(session: Session, settings: AuditFeatures) -> Path:
    """Every stage; returns the page. Finished stages of the same settings are left alone.

    Raises UserError for unusable models, sources or ratings, before a cluster starts and before anything is written.
    """
    sarm_settings(settings.sarm)
    ratings = None if settings.ratings is None else safety_ratings(settings.ratings, settings.sarm)
    limits = {"select": settings.limit, "target": settings.limit, "off_target": settings.limit_off_target}
    pairs = audit_pairs({role: getattr(settings, role) for role in ROLES}, limits)
    if settings.redo and not was_moved(session.run.out):
        _move_aside(session, settings, pairs)
    cache_codes(session, settings, pairs)
    choose_features(session, settings, ratings)
    if not json.loads((session.run.out / "features" / "selection.json").read_text())["selected"]:
        page = write_audit_page(session.run.out)
        raise UserError(
            f"no feature passes: see {page}. Pass --redo with more --select pairs, or a larger --fdr or --max-off-target."
        )
    if is_attached(settings.sarm):
        from sarm.stages.audit_inside import test_inside

        test_inside(session, settings, pairs)
    else:
        from sarm.stages.audit_causes import test_causes

        test_causes(session, settings, pairs)
    page = write_audit_page(session.run.out)
    session.tracker.parent.log_artifact(page)
    say(f"report: {page}")
    return page


def cache_codes(session: Session, settings: AuditFeatures, pairs: pa.Table) -> None:
    """The codes of all responses of the audit, in `codes` of the run's folder."""
    folder = StageFolder(session.run.out / "codes", CODES, _codes_settings(settings, pairs))

    def body(_: StageRun) -> Mapping[str, Any]:
        from sarm.passes.attached_model import model_reader
        from sarm.stages.audit_codes import write_codes

        budget = audit_budget(settings)
        say(f"budget: passes of {budget.batch_tokens:,} tokens in {budget.dtype}")
        reader = model_reader(settings.sarm, budget.batch_tokens, budget.dtype)
        counts = write_codes(pairs, reader, folder.folder, session.run_pass)
        if is_attached(settings.sarm):
            # Its edits are no arithmetic on codes: steering runs the model on these texts again.
            pq.write_table(pairs, folder.folder / TEXTS, write_page_checksum=True)
        figures = {**counts, "rejected": sum(counts["rejected"].values())}
        figures.pop("notes")
        return {**counts, "figures": figures}

    session.stage("cache codes", folder, body, resume=True)


def _codes_settings(settings: AuditFeatures, pairs: pa.Table) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name in ("role", "pair_id"):
        digest.update("\x1f".join(pairs[name].to_pylist()).encode())
    dtype = audit_budget(settings).dtype
    return {
        "sarm": hash_of_folder(settings.sarm),
        "place": str(settings.sarm),
        "pairs": digest.hexdigest()[:16],
        "protocol_version": PROTOCOL_VERSION,
        **({} if dtype == "float32" else {"dtype": dtype}),
    }


def _move_aside(session: Session, settings: AuditFeatures, pairs: pa.Table) -> None:
    """Make room for other features; the codes, which cost a pass over all pairs, stay where they are the same."""
    out = session.run.out
    codes = record_of(out / "codes", CODES)
    kept = {"codes"} if codes is not None and not difference_of(codes, _codes_settings(settings, pairs)) else set()
    outdated = sorted(path for path in out.glob("[!.]*") if path.name not in kept and path.name != RUN_FILE)
    if (aside := move(outdated, out)) is not None:
        say(f"moved aside what the audit before had made: {aside}")


def choose_features(session: Session, settings: AuditFeatures, given: SafetyRatings | None) -> None:
    """Contrast scores of every latent at both sites, and the selection, in `features`."""
    out = session.run.out
    names = ("max_features", "rank", "fdr", "max_off_target", "site", "min_rating", "permutations")
    asked = {
        name: value for name, value in identity(settings, seed=session.run.seed).items() if name in (*names, "seed")
    }
    ratings = given and given.median
    rated = None if ratings is None else {str(latent): rating for latent, rating in sorted(ratings.items())}
    folder = StageFolder(out / "features", FEATURES, {**asked, "ratings": rated}, {CODES: (out / "codes", CODES)})

    def body(child: StageRun) -> Mapping[str, Any]:
        from sarm.data.formats.sarm_folder import read_latents

        (weight_S,) = read_latents(settings.sarm, "score.weight")
        sums_up = not is_attached(settings.sarm)
        codes = read_codes(out / "codes", weight_S, sums_up=sums_up)
        chosen_on = codes.role("select")
        off_S = off_target_firing(codes)
        contrasts = {site: contrast(chosen_on, site, settings.permutations, session.run.seed) for site in SITES}
        picked = _select(
            contrasted=contrasts[settings.site], off_S=off_S, weight_S=weight_S, settings=settings, ratings=ratings
        )
        tables = [
            _table(site=site, contrasted=contrasted, off_S=off_S, weight_S=weight_S, codes=chosen_on, picked=picked)
            for site, contrasted in contrasts.items()
        ]
        pq.write_table(pa.concat_tables(tables), folder.folder / "latents.parquet", write_page_checksum=True)
        gap = completeness(codes) if sums_up else None
        explained = None if sums_up else explained_share(codes)
        content: dict[str, Any] = {
            "site": settings.site,
            "selected": [{"latent": int(i), "sign": int(s)} for i, s in zip(picked.latent, picked.sign, strict=True)],
            "thresholds": _thresholds(
                contrasts=contrasts, off_S=off_S, weight_S=weight_S, settings=settings, ratings=ratings, picked=picked
            ),
            "sites": {site: _site_summary(contrasted, settings.fdr) for site, contrasted in contrasts.items()},
            "num_select_pairs": chosen_on.num_pairs,
            "num_off_pairs": codes.role("off_select").num_pairs,
            "completeness": gap,
            "linear_head_explains": explained,
            "rated": len(ratings) if ratings is not None else None,
            "agreement": given and given.agreement,
        }
        write_atomically(folder.folder / "selection.json", json.dumps(plain_values(content), indent=2))
        child.log_artifact(folder.folder / "selection.json")
        rows = tables[SITES.index(settings.site)].to_pylist()
        child.log_table([row for row in rows if row["sign"]][:200] or rows[:20], "features.json")
        survive = content["sites"][settings.site]["num_significant"]
        measured = {"completeness": gap, "linear_head_explains": explained}
        figures = {"selected": len(picked.latent), "significant": survive}
        return {"figures": figures | {name: value for name, value in measured.items() if value is not None}}

    session.stage("choose features", folder, body)


def _select(
    contrasted: Contrast, off_S: np.ndarray, weight_S: np.ndarray, settings: AuditFeatures, ratings: Mapping[int, float] | None, **other: Any
) -> Selection:  # fmt: skip
    asked = {
        name: getattr(settings, name) for name in ("fdr", "max_off_target", "max_features", "rank", "min_rating")
    } | other
    return select(contrasted, off_S, weight_S, ratings=ratings, **asked)


def _thresholds(
    contrasts: Mapping[str, Contrast], off_S: np.ndarray, weight_S: np.ndarray, settings: AuditFeatures, ratings: Mapping[int, float] | None, picked: Selection
) -> list[Sensitivity]:  # fmt: skip
    variants: dict[str, dict[str, Any]] = {
        **{f"false discoveries {share:g}": {"fdr": share} for share in (0.01, 0.05, 0.2)},
        **{f"off-target firing up to {share:g}": {"max_off_target": share} for share in (0.1, 0.25, 0.5, 1.0)},
        **({f"rating of {least} or more": {"min_rating": float(least)} for least in (3, 4, 5)} if ratings else {}),
    }
    others = {
        name: _select(contrasts[settings.site], off_S, weight_S, settings, ratings, **change)
        for name, change in variants.items()
    }
    others |= {
        f"site {site}": _select(
            contrasted=contrasted, off_S=off_S, weight_S=weight_S, settings=settings, ratings=ratings
        )
        for site, contrasted in contrasts.items()
    }
    return sensitivity(picked, others)


def _site_summary(contrasted: Contrast, fdr: float) -> dict[str, Any]:
    return {
        "num_latents": len(contrasted.latent),
        "num_significant": int((contrasted.q <= fdr).sum()),
        "num_significant_pairs": int((contrasted.p_pairs <= fdr).sum()),
        "num_prompts": contrasted.num_prompts,
        "is_exact": contrasted.is_exact,
    }


def _table(site: str, contrasted: Contrast, off_S: np.ndarray, weight_S: np.ndarray, codes: AuditCodes, picked: Selection) -> pa.Table:  # fmt: skip
    sign = dict(zip(picked.latent.tolist(), picked.sign.tolist(), strict=True))
    columns = {
        **asdict(contrasted),
        "weight": weight_S[contrasted.latent].astype(np.float64),
        "effect": weight_S[contrasted.latent] * contrasted.difference,
        "off_target": off_S[contrasted.latent],
        "density": codes.density[contrasted.latent],
    }
    arrays = {name: value for name, value in columns.items() if isinstance(value, np.ndarray)}
    signs = np.array([sign.get(int(i), 0) for i in contrasted.latent], dtype=np.int64)
    order = np.lexsort((contrasted.latent, -np.abs(arrays["effect"])))
    return pa.table({"site": [site] * len(order), **{name: value[order] for name, value in arrays.items()}, "sign": signs[order]})  # fmt: skip

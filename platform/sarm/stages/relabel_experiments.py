"""Poison and denoise, by features and by controls: what every intervention does to held-out accuracy, and the verdicts.

N training pairs. The head alone is retrained, on cached codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sarm.audit.codes import AuditCodes
from sarm.audit.relabelling import FEATURES, changed_pairs, changes_table, feature_scores, rankings
from sarm.audit.retraining import CachedHead, Repetition, cross_fitted
from sarm.contracts.folders import SARM_FOLDER
from sarm.contracts.manifest import MANIFEST, read_manifest
from sarm.evaluate.intervals import difference_interval
from sarm.settings.audit import Relabel
from sarm.settings.identity import identity
from sarm.settings.reward import RewardSettings
from sarm.stages.audit_folder import Audited
from sarm.stages.label_noise import label_noise

KEPT_PROMPTS = 0.9
"""Share of the prompts that each repetition trains on."""


@dataclass(frozen=True)
class _Bench:
    """What every intervention is tried with: N training pairs, held-out pairs by name, and the head that is retrained on cached codes."""

    settings: Relabel
    seed: int
    train: AuditCodes
    heldout: Mapping[str, AuditCodes]
    head: CachedHead
    repetitions: list[Repetition]


def experiments(audited: Audited, settings: Relabel, seed: int, folder: Path, out: Path) -> dict[str, Any]:
    """Every intervention and injected noise, as relabel.json has them; what was changed goes to `folder`."""
    trained = _objective_settings(audited.sarm)
    bench = _bench(audited, settings, seed, trained)
    train, heldout, head = bench.train, bench.heldout, bench.head
    residual_ND = train.residual[train.chosen] - train.residual[train.rejected]
    ranked = rankings(
        scores=feature_scores(train, audited.selection),
        margins_N=train.margins,
        probe_N=cross_fitted(residual_ND, train.prompts, np.ones(train.num_pairs), seed),
        log_length_N=train.log_length,
        rng=np.random.default_rng(seed),
    )
    rows = _interventions(bench, ranked, folder / "changes")
    noise_rows = label_noise(
        audited=audited,
        head=head,
        residual_ND=residual_ND,
        repetitions=bench.repetitions,
        settings=settings,
        seed=seed,
        out=out,
    )
    baseline = {
        name: {"mean": float(np.mean([repetition.credits[name] for repetition in bench.repetitions]))}
        for name in heldout
    }
    verdicts = _verdicts(rows=rows, noise_rows=noise_rows, heldout=heldout, settings=settings)
    for row in rows:
        row.pop("_credits")
    return {
        "num_pairs": train.num_pairs,
        "num_prompts": len(np.unique(train.prompts)),
        "num_seeds": settings.seeds,
        "retraining": (
            ""
            if audited.model is not None
            else "The model is a classifier, whose own head reads no codes: a linear head on the dictionary's codes stands in for it. "
        )
        + f"the head alone is retrained, by logistic regression on {len(head.alive)} cached latents (penalty C = {head.penalty:g}), with the SARM's own objective: {_objective(head, trained)}. Backbone and dictionary stay, and have seen the clean labels.",
        "noise": settings.noise,
        "baseline": baseline,
        "rows": rows,
        "noise_rows": noise_rows,
        "verdicts": verdicts,
    }


def _objective_settings(sarm: Path) -> dict[str, Any]:
    """The settings of a SARM's training. One that was not trained here is assumed to have had the default objective."""
    known = read_manifest(sarm, SARM_FOLDER).config if (sarm / MANIFEST).exists() else {}
    return identity(RewardSettings()) | known


def _bench(audited: Audited, settings: Relabel, seed: int, trained: Mapping[str, Any]) -> _Bench:
    """The head fitted to unchanged labels once a repetition, each on another nine tenths of the prompts."""
    train = audited.codes.role("train")
    heldout = {"target": audited.codes.role("target"), "off": audited.codes.role("off_target")}
    head = CachedHead(
        audited.codes, heldout, seed, use_margin=trained["use_margin"], label_smoothing=trained["label_smoothing"]
    )
    prompts, repetitions = np.unique(train.prompts), []
    for number in range(settings.seeds):
        order = np.random.default_rng((seed, number)).permutation(prompts)
        used = np.flatnonzero(np.isin(train.prompts, order[: max(1, int(len(prompts) * KEPT_PROMPTS))]))
        repetitions.append(Repetition(used, head.credits(head.fit(used, np.ones(train.num_pairs)))))
    return _Bench(settings=settings, seed=seed, train=train, heldout=heldout, head=head, repetitions=repetitions)


def _interventions(bench: _Bench, ranked: Mapping[str, NDArray[np.float64]], changes: Path) -> list[dict[str, Any]]:
    """A row for every action, share and method; the pairs that each would change go to a file of their own in `changes`."""
    settings, pair_ids = bench.settings, bench.train.pair_ids
    rows: list[dict[str, Any]] = []
    changes.mkdir()
    for action, verb, shares in (("poison", "flip", settings.poison), ("denoise", "drop", settings.denoise)):
        for share in shares:
            for method, suspicion_N in ranked.items():
                whole = changed_pairs(suspicion_N, share, verb, pair_ids)
                name = f"{action}-{method.replace(', ', '-').replace(' ', '-')}-{share:g}.parquet"
                pq.write_table(changes_table(whole, verb, suspicion_N, pair_ids), changes / name)
                about = {"action": action, "share": share, "method": method}
                rows.append(
                    about | _accuracies(bench=bench, verb=verb, share=share, method=method, suspicion_N=suspicion_N)
                )
    return rows


def _objective(head: CachedHead, trained: Mapping[str, Any]) -> str:
    said = (
        f"margins of {np.count_nonzero(head.margins):,} pairs are taken off, label smoothing {head.label_smoothing:g}"
    )
    return said + ("; its centring of rewards is left out" if trained["centre_weight"] else "")


def _accuracies(
    bench: _Bench, verb: str, share: float, method: str, suspicion_N: NDArray[np.float64]
) -> dict[str, Any]:
    """Held-out accuracy after one intervention, averaged over repetitions, and its change against their unchanged labels."""
    train, heldout, repetitions = bench.train, bench.heldout, bench.repetitions
    after: dict[str, list[NDArray[np.float64]]] = {name: [] for name in heldout}
    for number, repetition in enumerate(repetitions):
        ranking_N = suspicion_N
        if method == "random":
            ranking_N = np.random.default_rng((bench.seed, number)).permutation(len(suspicion_N)).astype(float)
        kept = repetition.rows
        changed = kept[changed_pairs(ranking_N[kept], share, verb, train.pair_ids[kept])]
        sign_N = np.ones(train.num_pairs)
        if verb == "flip":
            sign_N[changed] = -1.0
        else:
            kept = np.setdiff1d(kept, changed)
        for name, credit_N in bench.head.credits(bench.head.fit(kept, sign_N)).items():
            after[name].append(credit_N)
    row: dict[str, Any] = {"_credits": {}}
    for name, codes in heldout.items():
        before_N = np.mean([repetition.credits[name] for repetition in repetitions], axis=0)
        change_N = np.mean(after[name], axis=0) - before_N
        ends = difference_interval(change_N, codes.prompts)
        row |= {name: float(np.mean(after[name])), f"{name}_change": float(change_N.mean()), f"{name}_ci95": list(ends)}  # fmt: skip
        row[f"{name}_subsets"] = {
            subset: float(change_N[codes.subsets == subset].mean()) for subset in sorted(set(codes.subsets.tolist()))
        }
        row["_credits"][name] = change_N
    row["target_seed_std"] = float(np.std([credit_N.mean() for credit_N in after["target"]]))
    return row


def _verdicts(
    rows: list[dict[str, Any]],
    noise_rows: list[dict[str, Any]],
    heldout: Mapping[str, AuditCodes],
    settings: Relabel,
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

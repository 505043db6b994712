"""Label noise that is put in at random and found again, by features and by controls that know the noisy labels alone."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sarm.audit.contrast import contrast, off_target_firing
from sarm.audit.relabelling import changed_pairs, feature_scores, flipped, precision_recall, rankings
from sarm.audit.retraining import CachedHead, Repetition, cross_fitted
from sarm.audit.selection import select
from sarm.contracts.manifest import read_manifest
from sarm.engine.terminal import say
from sarm.settings.audit import Relabel
from sarm.stages.audit_folder import FEATURES as FEATURES_SCHEMA
from sarm.stages.audit_folder import Audited

_PERMUTATIONS = 1000


def label_noise(
    audited: Audited, head: CachedHead, residual_ND: NDArray[np.float32], repetitions: list[Repetition], settings: Relabel, seed: int, out: Path
) -> list[dict[str, Any]]:  # fmt: skip
    """Flip labels at random, choose features, penalty and controls on the noisy labels alone, and drop what they suspect."""
    train = audited.codes.role("train")
    asked = read_manifest(out / "features", FEATURES_SCHEMA).config
    off_S = off_target_firing(audited.codes)
    sums: dict[tuple[float, str], list[dict[str, float]]] = {}
    without = 0
    for s, repetition in enumerate(repetitions):
        rng, used = np.random.default_rng((seed, s, 1)), repetition.rows
        noisy_N = np.zeros(train.num_pairs, dtype=bool)
        noisy_N[rng.choice(used, int(len(used) * settings.noise), replace=False)] = True
        sign_N = np.where(noisy_N, -1.0, 1.0)
        noisy = flipped(train, noisy_N)
        penalty = head.penalty_for(used, sign_N)
        # The pairs that this seed leaves out have clean labels: nothing may be fitted on them.
        margin_N, probe_N = np.full(train.num_pairs, np.nan), np.full(train.num_pairs, np.nan)
        margin_N[used] = head.cross_fitted(used, sign_N, penalty)
        probe_N[used] = cross_fitted(residual_ND[used], train.prompts[used], sign_N[used], seed)
        weight_S = np.zeros_like(audited.codes.weight)
        weight_S[head.alive] = head.fit(used, sign_N, penalty) / head.scale
        is_used = np.zeros(train.num_pairs, dtype=bool)
        is_used[used] = train.roles[used] == "select"
        contrasted = contrast(noisy.keep(is_used), asked["site"], _PERMUTATIONS, seed)
        picked = select(found=contrasted, off_target_S=off_S, weight_S=weight_S, fdr=asked["fdr"], max_off_target=asked["max_off_target"], max_features=asked["max_features"], rank=asked["rank"])  # fmt: skip
        scores = feature_scores(noisy, picked)
        if not len(picked.latent):
            # Without a feature these methods know nothing of any pair.
            without += 1
            scores = {name: rng.random(train.num_pairs) for name in scores}
        ranked = rankings(
            scores=scores,
            margins_N=margin_N,
            probe_N=probe_N,
            log_length_N=noisy.log_length,
            rng=rng,
        )
        for share in settings.denoise:
            for method, suspicion_N in ranked.items():
                dropped = used[changed_pairs(suspicion_N[used], share, "drop", train.pair_ids[used])]
                credit = head.credits(head.fit(np.setdiff1d(used, dropped), sign_N, penalty))
                figures_of = precision_recall(dropped, noisy_N)._asdict() | {"target": float(credit["target"].mean())}
                sums.setdefault((share, method), []).append(figures_of)
    if without:
        say(f"under the injected noise no feature is significant in {without} of {len(repetitions)} repetitions, in which features drop pairs at random. Pass a smaller --noise, or audit more pairs.")  # fmt: skip
    return [
        {"share": share, "method": method, **{name: float(np.mean([f[name] for f in own])) for name in own[0]},
         "precision_min": float(min(f["precision"] for f in own)), "precision_max": float(max(f["precision"] for f in own))}
        for (share, method), own in sums.items()
    ]  # fmt: skip

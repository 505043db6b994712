"""Features in the JSON that SAEDashboard writes for a batch, so that what reads it can read these.

`activations[].tokens` are words with the space before them: contexts are kept as text. Only the qualifying token's activation is
known (the end of a sentence, or of the answer), so the others' `values` are 0. `neg_*` and `pos_*` (logits) are of a vocabulary,
which a reward model lacks: they are empty, and `reward_weight` stands for them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sarm.interpret.labels import Term, label
from sarm.schema import ACTIVATION_EDGES


def dashboard(
    shown: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], counts: Mapping[str, Any]
) -> dict[str, Any]:
    """One batch of `feature_data.features`."""
    return {
        "model_id": str(facts["model"]),
        "layer": facts["layer"],
        "sae_set": "sarm",
        "sae_id_suffix": str(counts.get("model", ""))[:12],
        "features": [_feature(one) for one in shown],
    }


def _feature(one: Mapping[str, Any]) -> dict[str, Any]:
    sides = [values for values in one["histogram"].values() if values]
    heights = [sum(column) for column in zip(*sides, strict=True)]
    return {
        "feature_index": one["latent"],
        "frac_nonzero": one["density"] or one["sentence_density"],
        "freq_hist_data_bar_values": list(ACTIVATION_EDGES[:-1]),
        "freq_hist_data_bar_heights": heights,
        "pos_str": [],
        "pos_values": [],
        "neg_str": [],
        "neg_values": [],
        "correlated_features_indices": [other["latent"] for other in one["nearest"]],
        "correlated_features_pearson": [other["cosine"] for other in one["nearest"]],
        "correlated_features_l1": [],
        "decoder_weights_dist": [],
        "reward_weight": one["weight"],
        "label": label([Term(**term) for term in one["terms"]]),
        "activations": [_activation(row, one["max"], group) for group, rows in one["contexts"].items() for row in rows],
    }


def _activation(row: Mapping[str, Any], largest: float, group: str) -> dict[str, Any]:
    before, span, after = row["parts"]
    # A sentence's own end qualifies, a whole answer's last word stands for its end.
    read = before + span if group.startswith("sentence") and span else before + span + after
    tokens = re.findall(r"\s*\S+", read) or [read]
    tenth = row["decile"]
    return {
        "bin_min": largest * (tenth - 1) / 10 if tenth > 0 else 0.0,
        "bin_max": largest * tenth / 10 if tenth > 0 else largest,
        "bin_contains": 0.1 if tenth > 0 else 0.0,
        "tokens": tokens,
        "values": [0.0] * (len(tokens) - 1) + [row["activation"]],
        "qualifying_token_index": len(tokens) - 1,
    }

"""Features in the JSON that SAEDashboard (0.8) writes for a batch, so that what reads it can read these.

`activations[].tokens` are words with the space before them: contexts are kept as text. Only the qualifying token's activation is
known (the end of a sentence, or of the answer), so the others' `values` are 0. `pos_*` and `neg_*` are what a feature writes to the
model's outputs: a reward model has one, `reward`, which gets the head's weight. SAEDashboard keeps cosines in `correlated_features_l1`.
Its reader takes no other names than its own.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sarm.contracts.tables import ACTIVATION_EDGES

_OUTPUT = "reward"


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
    weight = one["weight"]
    return {
        "feature_index": one["latent"],
        "frac_nonzero": one["density"] or one["sentence_density"],
        "freq_hist_data_bar_values": list(ACTIVATION_EDGES[:-1]),
        "freq_hist_data_bar_heights": heights,
        "pos_str": [_OUTPUT] if weight > 0 else [],
        "pos_values": [weight] if weight > 0 else [],
        "neg_str": [_OUTPUT] if weight < 0 else [],
        "neg_values": [weight] if weight < 0 else [],
        "correlated_features_indices": [other["latent"] for other in one["nearest"]],
        "correlated_features_pearson": [],
        "correlated_features_l1": [other["cosine"] for other in one["nearest"]],
        "decoder_weights_dist": [],
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

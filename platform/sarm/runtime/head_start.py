"""Starting a reward head at a logistic fit to frozen features instead of at zero.

The blocks then begin to learn from a reward that already ranks, instead of from a head that is still growing. N responses, A alive features.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from sarm.config import UserError
from sarm.data.activations import ActivationStore
from sarm.evaluate.probe import fit_probe
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.nn.sae import standardise
from sarm.schema import hash_share, stable_int

# Enough for a linear head; keeps the dense features of a large data set in memory.
_MAX_PAIRS = 20_000


def start_head_(model: SarmForSequenceClassification, activations: Path, pairs: pa.Table, seed: int) -> None:
    """Set the head to the logistic fit on the stored activations of these pairs; latents that never fire there keep weight 0.

    Raises UserError if the activations are not those of the pairs.
    """
    pairs = pairs.select(["pair_id", "prompt_id"])
    rows = sorted(pairs.to_pylist(), key=lambda row: hash_share(row["pair_id"]))[:_MAX_PAIRS]
    place, h_ND = ActivationStore(activations).read_sides()
    sides = [
        tuple(place.get((stable_int(row["pair_id"]), side), -1) for side in ("chosen", "rejected")) for row in rows
    ]
    usable = [i for i, both in enumerate(sides) if min(both) >= 0]
    if not usable:
        raise UserError(
            f"{activations} holds no activation of these pairs. Extract them again, or pass --reward.head-init zero."
        )
    features_NA, alive_A = _features(model, h_ND)
    chosen, rejected = ([sides[i][side] for i in usable] for side in (0, 1))
    prompts = np.array([rows[i]["prompt_id"] for i in usable])
    probe = fit_probe(features_NA[chosen], features_NA[rejected], prompts, seed)
    with torch.no_grad():
        model.score.weight.zero_()
        model.score.weight[0, alive_A] = torch.from_numpy(probe.weight)


def _features(model: SarmForSequenceClassification, h_ND: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """What the head multiplies, for the A features that are ever non-zero: N x A values, and which features they are."""
    with torch.no_grad():
        x_ND = standardise(h_ND)
        if model.config.head == "scalar":
            return x_ND.numpy(), torch.arange(x_ND.shape[1])
        # As many active latents a row as its part of the rows needs, where the SAE has thresholds.
        parts = [model.sae(x) for x in x_ND.split(1024)]
    alive_A = torch.cat([codes.indices[codes.values != 0] for codes in parts]).unique()
    features_NA = torch.zeros(len(x_ND), len(alive_A))
    for codes, rows in zip(parts, features_NA.split(1024), strict=True):
        # Latents of value 0 may be missing from alive_A: wherever searchsorted puts their 0, it adds nothing.
        columns = torch.searchsorted(alive_A, codes.indices).clamp_max(len(alive_A) - 1)
        rows.scatter_add_(1, columns, codes.values)
    return features_NA.numpy(), alive_A

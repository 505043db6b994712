"""Starting a reward head at what a linear probe reads from the frozen activations, instead of at zero.

The blocks then begin to learn from a reward that already ranks, instead of from a head that is still growing. N responses, D d_in.
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

# Enough for a linear head; keeps the activations of a large data set in memory.
_MAX_PAIRS = 20_000


def start_head_(model: SarmForSequenceClassification, activations: Path, pairs: pa.Table, seed: int) -> None:
    """Set the head to the logistic probe w_D on the stored activations of these pairs.

    A latent starts at W_dec w_D, what its direction adds to the probe's reward, so that the first reward is the probe's reading of
    x_hat. (A fit on the codes themselves has a coefficient for every latent, often more than there are prompts.)

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
    chosen_ND, rejected_ND = (standardise(h_ND[[sides[i][side] for i in usable]]).numpy() for side in (0, 1))
    prompts = np.array([rows[i]["prompt_id"] for i in usable])
    w_D = torch.from_numpy(fit_probe(chosen_ND, rejected_ND, prompts, seed).weight)
    with torch.no_grad():
        model.score.weight[0] = w_D if model.config.head == "scalar" else model.sae.W_dec @ w_D

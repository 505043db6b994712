"""What the evaluation takes from the frozen activations: the probe that a reward is compared with, and how good the dictionary is on unseen prompts.

N pairs, M responses, D d_in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sarm.contracts.ids import stable_int
from sarm.data.store.activations import ActivationStore
from sarm.data.store.pairs import load_pairs
from sarm.engine.session import Session
from sarm.evaluate.probe import Probe, fit_probe
from sarm.evaluate.sae_quality import measure, pca_fvu
from sarm.nn.losses import reward_fidelity
from sarm.nn.sae import Sae, standardise

_ROWS_AT_ONCE = 1024


class Frozen(NamedTuple):
    """Activations of the backbone at the rewarded tokens, as they are stored, and the probe of the training pairs."""

    train: Tensor
    """[rows, d_in] of training responses, one for each side of each pair."""
    heldout: Tensor
    """[rows, d_in] of held-out responses, likewise."""
    place: Mapping[tuple[int, str], int]
    """Rows of `heldout` by (number of the pair, side)."""
    probe: Probe


@dataclass(frozen=True, kw_only=True)
class DictionaryFigures:
    """An SAE at the rewarded tokens of prompts that neither it nor the head has seen. None where there is nothing to measure on."""

    fvu: float | None
    """Share of the variance that is not reconstructed."""
    alive_share: float
    l0: float
    fvu_pca: float | None
    """The same for the k first principal components of the training responses: a dictionary that is worse has learnt something else."""
    reward_fidelity: float | None
    """Share of the variance of the probe's reward that is kept when rows are replaced by their reconstructions."""


def read_frozen(session: Session) -> Frozen:
    """The activations of a run's pairs, and the logistic probe of the training pairs."""
    place_of_train, train_ND = ActivationStore(session.folders.chat_activations).read_sides()
    place, heldout_MD = ActivationStore(session.folders.heldout_activations).read_sides()
    pairs = load_pairs(session.folders.pairs, "train").select(["pair_id", "prompt_id"]).to_pylist()
    keys = [stable_int(pair["pair_id"]) for pair in pairs]
    usable = [
        i for i, key in enumerate(keys) if (key, "chosen") in place_of_train and (key, "rejected") in place_of_train
    ]
    x_ND = standardise(train_ND).numpy()
    chosen, rejected = (x_ND[[place_of_train[keys[i], side] for i in usable]] for side in ("chosen", "rejected"))
    probe = fit_probe(chosen, rejected, np.array([pairs[i]["prompt_id"] for i in usable]), session.run.seed)
    return Frozen(train_ND, heldout_MD, place, probe)


def probe_scores(frozen: Frozen, like: pa.Table) -> pa.Table:
    """The held-out pairs of `like` with the rewards of the probe."""
    rewards = np.append(frozen.probe.rewards(standardise(frozen.heldout).numpy()), np.nan)
    for side in ("chosen", "rejected"):
        # A response without a stored activation takes the NaN at the end, which the measures count.
        places = [frozen.place.get((stable_int(pair_id), side), -1) for pair_id in like.column("pair_id").to_pylist()]
        index = like.schema.get_field_index(f"{side}_reward")
        like = like.set_column(index, like.schema.field(index), pa.array(rewards[places], pa.float32()))
    return like


def dictionary_figures(sae: Sae, frozen: Frozen) -> DictionaryFigures:
    """The dictionary on the held-out responses."""
    quality = measure(sae, frozen.heldout)
    x_MD = standardise(frozen.heldout)
    with torch.no_grad():
        parts = [sae.decode(sae(x_BD)) for x_BD in x_MD.split(_ROWS_AT_ONCE)]
    weight_D = torch.from_numpy(frozen.probe.weight)
    return DictionaryFigures(
        fvu=quality.fvu,
        alive_share=quality.counts.alive_share(),
        l0=quality.counts.l0(),
        fvu_pca=pca_fvu(standardise(frozen.train), x_MD, sae.k),
        reward_fidelity=reward_fidelity(x_MD, torch.cat(parts), weight_D) if parts else None,
    )

"""What the evaluation takes from the frozen activations: the probe that a reward is compared with, and how good the dictionary is on unseen prompts.

N pairs, M responses, D d_in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from sarm.contracts.ids import hash_share, stable_int
from sarm.data.store.activations import ActivationStore
from sarm.data.store.looked_groups import is_heldout
from sarm.data.store.pairs import load_pairs
from sarm.engine.session import Session
from sarm.evaluate.probe import Probe, fit_probe
from sarm.evaluate.sae_quality import measure, pca_fvu
from sarm.evaluate.sparse_head import SparseHead, fit_sparse_head
from sarm.evaluate.sparse_rm import SparseRm, fit_sparse_rm
from sarm.nn.losses import reward_fidelity
from sarm.nn.sae import Sae, standardise

FEW_LATENTS = 20
"""What a person can read of a reward."""
_ROWS_AT_ONCE = 1024
# Enough for a head of a few latents; more pairs take minutes.
_MAX_PAIRS = 20_000


@dataclass(frozen=True)
class Frozen:
    """Activations of the backbone at the rewarded tokens, as they are stored, and the probe of the training pairs."""

    train: Tensor
    """[rows, d_in] of training responses, one for each side of each pair."""
    heldout: Tensor
    """[rows, d_in] of held-out responses, likewise."""
    place: Mapping[tuple[int, str], int]
    """Rows of `heldout` by (number of the pair, side)."""
    pairs: NDArray[np.int64]
    """[N, 2]: rows of `train` of the chosen and the rejected response of training pairs."""
    prompts: NDArray[np.str_]
    """[N]: their prompts."""
    seed: int

    @cached_property
    def probe(self) -> Probe:
        """Fitted when it is first asked for, which takes its time."""
        x_ND = standardise(self.train).numpy()
        return fit_probe(x_ND[self.pairs[:, 0]], x_ND[self.pairs[:, 1]], self.prompts, self.seed)


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
    """The activations of a run's pairs."""
    place_of_train, train_ND = ActivationStore(session.folders.chat_activations).read_sides()
    place, heldout_MD = ActivationStore(session.folders.heldout_activations).read_sides()
    pairs = load_pairs(session.folders.pairs, "train").select(["pair_id", "prompt_id"]).to_pylist()
    keys = [stable_int(pair["pair_id"]) for pair in pairs]
    sides = [tuple(place_of_train.get((key, side), -1) for side in ("chosen", "rejected")) for key in keys]
    usable = [i for i, rows in enumerate(sides) if min(rows) >= 0]
    pairs_N2 = np.array([sides[i] for i in usable], dtype=np.int64).reshape(-1, 2)
    prompts_N = np.array([pairs[i]["prompt_id"] for i in usable])
    return Frozen(
        train=train_ND, heldout=heldout_MD, place=place, pairs=pairs_N2, prompts=prompts_N, seed=session.run.seed
    )


def probe_scores(frozen: Frozen, like: pa.Table) -> pa.Table:
    """The held-out pairs of `like` with the rewards of the probe."""
    return _with_rewards(frozen, frozen.probe.rewards(standardise(frozen.heldout).numpy()), like)


def sparse_head_scores(frozen: Frozen, sae: Sae, heldout_share: float, like: pa.Table) -> tuple[SparseHead, pa.Table]:
    """A head of at most 20 latents on the frozen codes of training pairs, and the held-out pairs of `like` with its rewards.

    Its penalty is chosen on training prompts that the SAE kept out of its training, a `heldout_share` of them. Raises UserError if there
    are none, or if no such head fits.
    """
    order = sorted(range(len(frozen.pairs)), key=lambda i: hash_share(f"sparse head {i}"))[:_MAX_PAIRS]
    codes_NS, pairs_N2, prompts_N = _codes(sae, frozen.train), frozen.pairs[order], frozen.prompts[order]
    differences_NS = sparse.csr_array(codes_NS[pairs_N2[:, 0]] - codes_NS[pairs_N2[:, 1]])
    choosing_N = np.array([is_heldout(prompt, heldout_share) for prompt in prompts_N.tolist()], dtype=bool)
    head = fit_sparse_head(differences_NS, prompts_N, choosing_N, max_latents=FEW_LATENTS)
    return head, _with_rewards(frozen, (_codes(sae, frozen.heldout) @ head.weight).astype(np.float32), like)


def sparse_rm_scores(frozen: Frozen, sae: Sae, seed: int, like: pa.Table) -> tuple[SparseRm, pa.Table]:
    """SparseRM on the frozen activations of the training pairs, and the held-out pairs of `like` with its rewards. Raises UserError as it does."""
    model = sparse_rm_of(frozen, sae, seed)
    return model, with_direction(frozen, sae, model.weight, like)


def sparse_rm_of(frozen: Frozen, sae: Sae, seed: int) -> SparseRm:
    """SparseRM on the frozen activations of the training pairs. Raises UserError as it does."""
    order = sorted(range(len(frozen.pairs)), key=lambda i: hash_share(f"sparse head {i}"))[:_MAX_PAIRS]
    codes_NS, pairs_N2 = _codes(sae, frozen.train), frozen.pairs[order]
    x_ND = sae.rows_of(frozen.train).numpy()
    return fit_sparse_rm(
        chosen_ND=x_ND[pairs_N2[:, 0]],
        rejected_ND=x_ND[pairs_N2[:, 1]],
        difference_NS=sparse.csr_array(codes_NS[pairs_N2[:, 0]] - codes_NS[pairs_N2[:, 1]]),
        W_dec_SD=sae.W_dec.detach().numpy(),
        prompt_ids_N=frozen.prompts[order],
        seed=seed,
    )


def with_direction(frozen: Frozen, sae: Sae, weight_D: NDArray[np.float32], like: pa.Table) -> pa.Table:
    """The held-out pairs of `like` with the rewards x . w of the rows that the SAE takes."""
    return _with_rewards(frozen, sae.rows_of(frozen.heldout).numpy() @ weight_D, like)


def _codes(sae: Sae, h_MD: Tensor) -> sparse.csr_array:
    """Codes [M, d_sae] of stored rows."""
    with torch.no_grad():
        parts = [sae(sae.rows_of(part)) for part in h_MD.split(_ROWS_AT_ONCE)]
    rows = np.repeat(np.arange(len(h_MD)), [part.values.shape[1] for part in parts for _ in range(len(part.values))])
    values, latents = (
        np.concatenate([getattr(part, name).flatten().numpy() for part in parts]) for name in ("values", "indices")
    )
    codes = sparse.csr_array((values.astype(np.float64), (rows, latents)), shape=(len(h_MD), sae.d_sae))
    codes.eliminate_zeros()
    return codes


def _with_rewards(frozen: Frozen, rewards_M: NDArray[np.float32], like: pa.Table) -> pa.Table:
    """The held-out pairs of `like` with these rewards of the held-out responses."""
    rewards = np.append(rewards_M, np.float32(np.nan))
    for side in ("chosen", "rejected"):
        # A response without a stored activation takes the NaN at the end, which the measures count.
        places = [frozen.place.get((stable_int(pair_id), side), -1) for pair_id in like.column("pair_id").to_pylist()]
        index = like.schema.get_field_index(f"{side}_reward")
        like = like.set_column(index, like.schema.field(index), pa.array(rewards[places], pa.float32()))
    return like


def dictionary_figures(sae: Sae, frozen: Frozen) -> DictionaryFigures:
    """The dictionary on the held-out responses."""
    quality = measure(sae, frozen.heldout)
    x_MD, weight_D = sae.rows_of(frozen.heldout), torch.from_numpy(frozen.probe.weight)
    with torch.no_grad():
        parts = [sae.decode(sae(x_BD)) for x_BD in x_MD.split(_ROWS_AT_ONCE)]
    seen_MD, again_MD = x_MD, torch.cat(parts) if parts else x_MD
    if not sae.standardises:
        # The probe reads standardised activations, whichever the SAE reconstructs.
        seen_MD, again_MD = standardise(seen_MD), standardise(again_MD)
    return DictionaryFigures(
        fvu=quality.fvu,
        alive_share=quality.counts.alive_share(),
        l0=quality.counts.l0(),
        fvu_pca=pca_fvu(sae.rows_of(frozen.train), x_MD, sae.k),
        reward_fidelity=reward_fidelity(seen_MD, again_MD, weight_D) if parts else None,
    )

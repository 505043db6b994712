"""Random encoders beside a pretrained SAE: what pretraining the dictionary is worth. N pairs, D d_in, S d_sae.

`random`           the directions of the encoder are drawn anew, and nothing else is done.
`random_matched`   besides, it gets what pretraining gives the other one apart from learnt directions: the shift from sentence ends to
                   chat ends is absorbed, thresholds let K latents through, and its head starts at a reading of its own codes.

Drawing directions anew undoes an absorbed shift: the few latents that lie along it then win TopK at every chat end. And a head that
starts at W_dec w reads the probe through a decoder; that of random directions reconstructs nothing.
"""

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64, Shaped
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from sarm.data.store.activations import ActivationStore
from sarm.nn.sae import Sae
from sarm.training.phase_shift import absorb_phase_shift_

# Rows that the shift is measured on, as in SAE training; pairs that the head's start is fitted on.
_SAMPLE_ROWS, _MAX_PAIRS = 16 * 1024, 8 * 1024
_ROWS_AT_ONCE, _FOLDS = 1024, 5
# Ridge penalties, in units of a latent's mean sum of squares; strongest first, so that ties go to the head that is fitted least.
_PENALTIES = (np.inf, 100.0, 10.0, 1.0, 0.1, 0.01)


@torch.no_grad()
def draw_directions_(sae: Sae, generator: torch.Generator) -> None:
    """Uniform directions for every latent, which keeps its length and bias; the decoder is their transpose of unit rows."""
    directions_SD = nn.functional.normalize(torch.randn(sae.d_sae, sae.d_in, generator=generator), dim=1)
    if not sae.is_tied:
        sae.W_enc.copy_((directions_SD * sae.W_enc.norm(dim=0)[:, None]).T)
    sae.W_dec.copy_(directions_SD)


@torch.no_grad()
def match_(sae: Sae, chat_ends: ActivationStore, *, absorb: bool) -> None:
    """Treat a drawn encoder as SAE training treats its own on the way to chat ends; `absorb` where that training had two phases."""
    rows_ND = sae.rows_of(_sample(chat_ends))
    if absorb:
        absorb_phase_shift_(sae, rows_ND, rows_ND)
    sae.calibrate_(rows_ND)


def read_through_codes(
    sae: Sae,
    chosen_ND: Float[np.ndarray, "pairs d_in"],
    rejected_ND: Float[np.ndarray, "pairs d_in"],
    w_D: Float[Tensor, " d_in"],
    prompts_N: Shaped[NDArray[np.str_], " pairs"],
    seed: int,
) -> Float[Tensor, " d_sae"]:
    """A probe w read through a decoder that is fitted to an encoder that stays as it is: what training would give W_dec w, in closed form.

        W = argmin |Z W - X|^2 + penalty |W - a W_dec|^2,   returned is W w,   a the scale at which W_dec w comes closest

    over the pairs' differences Z of codes and X of rows. So the decoder is shrunk towards where SAE training starts it; folds of prompts
    choose the penalty, that of no fit among them. Computed as ridge regression of X w - a Z W_dec w on Z.
    """
    # A second of imports, which only this control needs.
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GroupKFold

    chosen_ND, rejected_ND, prompts_N = chosen_ND[:_MAX_PAIRS], rejected_ND[:_MAX_PAIRS], prompts_N[:_MAX_PAIRS]
    z_NS = (_codes(sae, chosen_ND) - _codes(sae, rejected_ND)).tocsr()
    y_N = (chosen_ND - rejected_ND).astype(np.float64) @ w_D.double().numpy()
    unit = float(z_NS.power(2).sum()) / max(1, len(np.unique(z_NS.indices)))
    plain_S = (sae.W_dec.detach() @ w_D).double().numpy()

    def fitted(penalty: float, rows: Int64[NDArray[np.int64], " rows"]) -> Float64[NDArray[np.float64], " d_sae"]:
        read_R = z_NS[rows] @ plain_S
        start_S: NDArray[np.float64] = plain_S * (read_R @ y_N[rows]) / max(read_R @ read_R, 1e-12)
        if not np.isfinite(penalty):
            return start_S
        model = Ridge(alpha=max(penalty * unit, 1e-12), fit_intercept=False, solver="lsqr", tol=1e-6)
        fitted_S: NDArray[np.float64] = start_S + model.fit(z_NS[rows], y_N[rows] - z_NS[rows] @ start_S).coef_
        return fitted_S

    num_folds = min(_FOLDS, len(np.unique(prompts_N)))
    folds = list(GroupKFold(num_folds, shuffle=True, random_state=seed).split(y_N, groups=prompts_N))
    error = {
        penalty: sum(float(np.square(z_NS[test] @ fitted(penalty, fit) - y_N[test]).sum()) for fit, test in folds)
        for penalty in _PENALTIES
    }
    best = min(_PENALTIES, key=lambda penalty: error[penalty])
    return torch.from_numpy(fitted(best, np.arange(len(y_N)))).float()


def _sample(store: ActivationStore) -> Float[Tensor, "rows d_in"]:
    """The first rows of a store, which holds them in the order of their prompts' hashes."""
    parts: list[Tensor] = []
    for rows_ND in store.usable_vectors():
        parts.append(rows_ND)
        if sum(map(len, parts)) >= _SAMPLE_ROWS:
            break
    return torch.cat(parts)[:_SAMPLE_ROWS]


@torch.no_grad()
def _codes(sae: Sae, x_ND: Float32[NDArray[np.float32], "pairs d_in"]) -> sparse.csr_array:
    rows, columns, values = [], [], []
    for start in range(0, len(x_ND), _ROWS_AT_ONCE):
        found = sae(torch.from_numpy(x_ND[start : start + _ROWS_AT_ONCE]))
        row, place = found.values.nonzero(as_tuple=True)
        rows.append(row.numpy() + start)
        columns.append(found.indices[row, place].numpy())
        values.append(found.values[row, place].double().numpy())
    entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    return sparse.coo_array(entries, shape=(len(x_ND), sae.d_sae)).tocsr()

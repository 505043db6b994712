"""Which features carry a property: by how much more they fire with it, and in how many prompts they do (after SteerRM, 2603.12795); or by effect.

T pairs of texts (the same answer without and with the property), U prompts, S latents over all dictionaries, m_i(text) the mean code of
latent i over the answer's tokens, w_i its decoder row.
d_u = mean over the prompt's pairs of m(with) - m(without);  strength_i = |w_i| mean_u d_ui;  stability_i = share of prompts with d_ui > 0
A latent is a candidate if its strength is above 0 and its stability reaches a bound; candidates come by falling strength.
By effect, the same with m_i(text) = what latent i adds to the text's reward to first order (the sum of its terms, `reward_gradients`) and |w_i| = 1:
d_u is then the part of the reward's change with the property that the latent carries, and suppressing it takes that away.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64, Shaped
from numpy.typing import NDArray
from scipy import sparse

from sarm.audit.selection import matched_sets
from sarm.settings.checks import UserError


@dataclass(frozen=True)
class StyleFeatures:
    """Latents by falling strength, and what is known of all latents."""

    latent: Int64[NDArray[np.int64], " candidates"]
    strength: Float[np.ndarray, " candidates"]
    """What the property adds along the latent's decoder row, in the unit of the SAE's rows."""
    stability: Float[np.ndarray, " candidates"]
    density: Float[np.ndarray, " latents"]
    """Mean share of an answer's tokens at which each latent fires."""
    size: Float[np.ndarray, " latents"]
    """Its mean value where it fires, times the length of its decoder row."""
    num_prompts: int


def style_features(
    plain_TS: sparse.csr_array,
    styled_TS: sparse.csr_array,
    shares_TS: sparse.csr_array,
    prompts_T: Shaped[np.ndarray, " pairs"],
    norm_S: Float[np.ndarray, " latents"],
    min_stability: float,
) -> StyleFeatures:
    """The candidates of one property.

    `plain_TS` and `styled_TS` are mean codes of the two versions of each answer, `shares_TS` the shares of tokens at which latents fire, those
    of the plain versions before those of the styled ones [2 T, S].
    """
    names, prompt_T = np.unique(prompts_T, return_inverse=True)
    counts_U = np.bincount(prompt_T)
    over_UT = sparse.csr_array((1.0 / counts_U[prompt_T], (prompt_T, np.arange(len(prompt_T)))), shape=(len(names), len(prompt_T)))  # fmt: skip
    difference_US = over_UT @ (styled_TS - plain_TS)
    strength_S = np.asarray(difference_US.mean(axis=0)).ravel() * norm_S
    stability_S = np.asarray((difference_US > 0).sum(axis=0)).ravel() / len(names)
    latent = np.flatnonzero((strength_S > 0) & (stability_S >= min_stability))
    latent = latent[np.lexsort((latent, -strength_S[latent]))]
    density_S = np.asarray(shares_TS.mean(axis=0)).ravel()
    mean_S = np.asarray((plain_TS.sum(axis=0) + styled_TS.sum(axis=0)) / shares_TS.shape[0]).ravel()
    size_S = np.divide(mean_S, density_S, out=np.zeros_like(mean_S), where=density_S > 0) * norm_S
    return StyleFeatures(
        latent=latent.astype(np.int64),
        strength=strength_S[latent],
        stability=stability_S[latent],
        density=density_S,
        size=np.abs(size_S),
        num_prompts=len(names),
    )


def control_pool(
    density_S: Float[np.ndarray, " latents"], candidates: Int64[NDArray[np.int64], " candidates"]
) -> Int64[NDArray[np.int64], " pool"]:
    """The latents that controls are drawn from: those that fire and are no candidates."""
    alive_S = density_S > 0
    alive_S[candidates] = False
    return np.flatnonzero(alive_S)


def most_with_controls(pool: Int64[NDArray[np.int64], " pool"]) -> int:
    """How many features there may be at most, so that sets of as many others differ from each other."""
    return len(pool) // 2


def control_sets(
    density_S: Float[np.ndarray, " latents"],
    size_S: Float[np.ndarray, " latents"],
    candidates: Int64[NDArray[np.int64], " candidates"],
    chosen: Int64[NDArray[np.int64], " chosen"],
    count: int,
    seed: int,
) -> dict[str, Int64[NDArray[np.int64], "sets chosen"]]:
    """`random`: sets of latents that fire, drawn evenly; `matched`: of the same frequency and size. Neither has a candidate.

    Candidates that are not suppressed carry the property too, and would be no control. Raises UserError if too few latents fire to draw sets from.
    """
    pool = control_pool(density_S, candidates)
    alive_S = np.isin(np.arange(len(density_S)), pool)
    if len(chosen) > most_with_controls(pool):
        raise UserError(f"{len(chosen)} features are suppressed, but only {len(pool)} others fire to compare them with. Pass fewer to --debias.features, or a larger SAE.")  # fmt: skip
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(pool, len(chosen), replace=False) for _ in range(count)])
    known_S = np.where(alive_S, density_S, 0.0)
    known_S[chosen] = density_S[chosen]
    matched = matched_sets(selected=chosen, density_S=known_S, weight_S=size_S, count=count, seed=seed)
    return {"random": drawn, "matched": matched}

"""Which latents tell chosen from rejected responses. N pairs, F latents that fire, U prompts.

reference   s = (c - r) / (c + r + C)   c, r: sums of positive latents over chosen and over rejected responses, C the mean of c + r over
            all d_sae latents (SAFER activationdiff at sentence ends; SARM at the rewarded token)
paired      d = a + b x + e over pairs, d = z(chosen) - z(rejected) of a response's mean, x = log answer tokens of chosen minus rejected:
            a is the difference at equal length; score = a / (mean(c + r) + C / N), on the scale of s
null        a latent that depends on length alone: d = b x + e, and e is as likely to have the other sign (Freedman and Lane 1983). b is fitted without a,
            the signs of what is left are turned, all pairs of a prompt together, since they share responses, and a is fitted again to
            b x + the turned rest. x stays as it is. a is linear in d and 0 for d = x, so that b x falls out: a is a sum over prompts
interval    leaving out one prompt at a time (jackknife), with Student's t of the effective number of prompts
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int, Int64
from numpy.typing import NDArray
from scipy import stats

from sarm.audit.codes import AuditCodes
from sarm.evaluate.intervals import student
from sarm.evaluate.statistics import EXACT_CLUSTERS, cluster_sums, sign_flip_p_values
from sarm.settings.checks import UserError

# Log lengths whose sum of squares about the mean is below this are equal: there is no slope to take out.
_NO_SPREAD = 1e-9


@dataclass(frozen=True)
class Contrast:
    """Scores of the latents that fire at one site, all arrays [F]."""

    latent: Int64[NDArray[np.int64], " latents"]
    score: Float[np.ndarray, " latents"]
    """The reference's s."""
    paired: Float[np.ndarray, " latents"]
    """The difference within pairs at equal length, on the scale of s."""
    difference: Float[np.ndarray, " latents"]
    """The same in the latent's own unit: times the head weight it is what the latent adds to a margin at equal length."""
    low: Float[np.ndarray, " latents"]
    high: Float[np.ndarray, " latents"]
    """95 % interval of `paired` over prompts; NaN where there is one prompt."""
    p: Float[np.ndarray, " latents"]
    q: Float[np.ndarray, " latents"]
    """p-value of its null, and that adjusted for false discoveries among the latents (Benjamini and Hochberg)."""
    p_pairs: Float[np.ndarray, " latents"]
    """p-value where every pair's sign is turned by itself: too small where pairs share responses, and given for comparison."""
    num_prompts: int
    is_exact: bool


def reference_scores(codes: AuditCodes, site: str) -> Float[np.ndarray, " d_sae"]:
    """s of every latent; 0 for one that never fires."""
    z_RS = codes.at(site)
    chosen_S, rejected_S = (_sums(z_RS, rows) for rows in (codes.chosen, codes.rejected))
    total_S = chosen_S + rejected_S
    damping = total_S.mean()
    contrast_S: Float[np.ndarray, " d_sae"] = np.divide(
        chosen_S - rejected_S, total_S + damping, out=np.zeros_like(total_S), where=total_S > 0
    )
    return contrast_S


def contrast(codes: AuditCodes, site: str, permutations: int, seed: int) -> Contrast:
    """Scores, intervals and p-values of the latents that fire on these pairs.

    Raises UserError if none does.
    """
    z_RS = codes.per_end(site)
    total_S = _sums(z_RS, codes.chosen) + _sums(z_RS, codes.rejected)
    latent = np.flatnonzero(total_S > 0)
    if not len(latent):
        raise UserError(f"no latent fires at the {site} site of {codes.num_pairs} pairs. Pass other --select pairs.")
    z_RF = z_RS[:, latent].toarray()
    d_NF = z_RF[codes.chosen] - z_RF[codes.rejected]
    x_N = codes.log_length
    _, prompt_N = np.unique(codes.prompts, return_inverse=True)
    terms_NF = _null_terms(d_NF, x_N)
    by_prompt_UF = cluster_sums(terms_NF, prompt_N)
    observed_F = terms_NF.sum(axis=0)
    scale_F = (total_S[latent] + total_S.mean()) / codes.num_pairs
    half_F = _half_width(d_NF, x_N, prompt_N)
    p_F = sign_flip_p_values(by_prompt_UF, permutations, seed)
    return Contrast(
        latent=latent,
        score=reference_scores(codes, site)[latent],
        paired=observed_F / scale_F,
        difference=observed_F,
        low=(observed_F - half_F) / scale_F,
        high=(observed_F + half_F) / scale_F,
        p=p_F,
        q=stats.false_discovery_control(p_F, method="bh"),
        p_pairs=sign_flip_p_values(terms_NF, permutations, seed),
        num_prompts=len(by_prompt_UF),
        is_exact=len(by_prompt_UF) <= EXACT_CLUSTERS,
    )


def _has_slope(x_N: Float64[NDArray[np.float64], " pairs"]) -> bool:
    return float(np.square(x_N - x_N.mean()).sum()) > _NO_SPREAD


def _intercept_weights(x_N: Float64[NDArray[np.float64], " pairs"]) -> Float64[NDArray[np.float64], " pairs"]:
    """What the intercept of a regression on x takes of each pair; the mean's where all ratios are equal."""
    centred_N = x_N - x_N.mean()
    slope_N = centred_N / float(np.square(centred_N).sum()) if _has_slope(x_N) else np.zeros_like(x_N)
    return np.asarray(1 / len(x_N) - x_N.mean() * slope_N)


def _null_terms(
    d_NF: Float64[NDArray[np.float64], "pairs latents"], x_N: Float64[NDArray[np.float64], " pairs"]
) -> Float64[NDArray[np.float64], "pairs latents"]:
    """What each pair adds to a, after length alone has explained what it can: their sum is a, whatever that was."""
    # Where all ratios are equal a slope and an intercept cannot be told apart: nothing is taken out.
    slope_F = (x_N @ d_NF) / (x_N @ x_N) if _has_slope(x_N) else np.zeros(d_NF.shape[1])
    return np.asarray(_intercept_weights(x_N)[:, None] * (d_NF - x_N[:, None] * slope_F))


def _half_width(
    d_NF: Float64[NDArray[np.float64], "pairs latents"],
    x_N: Float64[NDArray[np.float64], " pairs"],
    prompt_N: Int[NDArray[np.intp], " pairs"],
) -> Float64[NDArray[np.float64], " latents"]:
    """Half of the 95 % interval of a: its variance from leaving out each prompt, in the latents' unit."""
    columns = np.stack([np.ones_like(x_N), x_N, x_N**2, np.square(_intercept_weights(x_N))], axis=1)
    n_U, x_U, xx_U, weight_U = cluster_sums(columns, prompt_N).T
    if (num := len(n_U)) == 1:
        return np.full(d_NF.shape[1], np.nan)
    d_UF, xd_UF = cluster_sums(d_NF, prompt_N), cluster_sums(d_NF * x_N[:, None], prompt_N)
    n, x, xx = n_U.sum() - n_U, x_U.sum() - x_U, xx_U.sum() - xx_U
    d, xd = d_UF.sum(axis=0) - d_UF, xd_UF.sum(axis=0) - xd_UF
    spread = xx - x**2 / n
    slope = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > _NO_SPREAD)[:, None] * (xd - (x / n)[:, None] * d)  # fmt: skip
    without_UF = (d - slope * x[:, None]) / n[:, None]
    variance_F = (num - 1) / num * np.square(without_UF - without_UF.mean(axis=0)).sum(axis=0)
    half_F: NDArray[np.float64] = student(float(weight_U.sum() ** 2 / np.square(weight_U).sum())) * np.sqrt(variance_F)
    return half_F


def off_target_firing(codes: AuditCodes) -> Float[np.ndarray, " d_sae"]:
    """t: share of the off-target responses (the half that chooses) whose rewarded token each latent fires at."""
    return codes.role("off_select").density


def _sums(z_RS: object, rows: Int64[NDArray[np.int64], " rows"]) -> Float64[NDArray[np.float64], " d_sae"]:
    return np.asarray(z_RS[rows].sum(axis=0)).ravel()  # type: ignore[index]

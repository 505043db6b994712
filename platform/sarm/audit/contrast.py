"""Which latents tell chosen from rejected responses. N pairs, F latents that fire, U prompts, P sign changes.

reference   s = (c - r) / (c + r + C)   c, r: sums of positive latents over chosen and over rejected responses, C the mean of c + r over
            all d_sae latents (SAFER activationdiff at sentence ends; SARM at the rewarded token)
paired      d = a + b x + e over pairs, d = z(chosen) - z(rejected) of a response's mean, x = log length of chosen minus rejected:
            a is the difference at equal length; score = a / (mean(c + r) + C / N), on the scale of s
null        swapping chosen and rejected turns the signs of d and x; all pairs of a prompt are swapped together, since they share
            responses. All sign changes are tried where there are few prompts, else P random ones (Phipson and Smyth: (b + 1) / (P + 1))
"""

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

from sarm.audit.codes import AuditCodes
from sarm.config import UserError
from sarm.data.statistics import cluster_counts, cluster_sums

# 2 ** 12 sign changes are fewer than the least number that is sampled by default.
_EXACT_PROMPTS = 12
_AT_ONCE = 500


@dataclass(frozen=True)
class Contrast:
    """Scores of the latents that fire at one site, all arrays [F]."""

    latent: NDArray[np.int64]
    score: Float[np.ndarray, " latents"]
    """The reference's s."""
    paired: Float[np.ndarray, " latents"]
    """The difference within pairs at equal length, on the scale of s."""
    difference: Float[np.ndarray, " latents"]
    """The same in the latent's own unit: times the head weight it is what the latent adds to a margin at equal length."""
    low: Float[np.ndarray, " latents"]
    high: Float[np.ndarray, " latents"]
    """95 % interval of `paired` over prompts."""
    p: Float[np.ndarray, " latents"]
    q: Float[np.ndarray, " latents"]
    """p-value of its null, and that adjusted for false discoveries among the latents (Benjamini and Hochberg)."""
    p_pairs: Float[np.ndarray, " latents"]
    """p-value where every pair is swapped by itself: too small where pairs share responses, and given for comparison."""
    num_prompts: int
    is_exact: bool


def reference_scores(codes: AuditCodes, site: str) -> Float[np.ndarray, " d_sae"]:
    """s of every latent; 0 for one that never fires."""
    z_RS = codes.at(site)
    chosen_S, rejected_S = (_sums(z_RS, rows) for rows in (codes.chosen, codes.rejected))
    total_S = chosen_S + rejected_S
    damping = total_S.mean()
    return np.divide(chosen_S - rejected_S, total_S + damping, out=np.zeros_like(total_S), where=total_S > 0)


def contrast(codes: AuditCodes, site: str, permutations: int, resamples: int, seed: int) -> Contrast:
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
    scale_F = (total_S[latent] + total_S.mean()) / codes.num_pairs
    counts_RU, unit_N = cluster_counts(codes.prompts, resamples, seed)
    num_prompts = counts_RU.shape[1]
    sums = _Moments.of(d_NF, x_N, unit_N)
    observed_F = sums.intercepts(np.ones((1, num_prompts)))[0]
    boot_RF = np.concatenate([sums.intercepts(part) for part in _parts(counts_RU)]) / scale_F
    low_F, high_F = np.quantile(boot_RF, [0.025, 0.975], axis=0)
    p_F = sums.p_values(observed_F, permutations, seed)
    single = _Moments.of(d_NF, x_N, np.arange(codes.num_pairs))
    return Contrast(
        latent=latent,
        score=reference_scores(codes, site)[latent],
        paired=observed_F / scale_F,
        difference=observed_F,
        low=low_F,
        high=high_F,
        p=p_F,
        q=stats.false_discovery_control(p_F, method="bh"),
        p_pairs=single.p_values(observed_F, permutations, seed),
        num_prompts=num_prompts,
        is_exact=num_prompts <= _EXACT_PROMPTS,
    )


@dataclass(frozen=True)
class _Moments:
    """Sums by unit (a prompt, or a pair) from which intercepts follow: of d, x, x d, x x and of 1."""

    d: NDArray[np.float64]
    x: NDArray[np.float64]
    xd: NDArray[np.float64]
    xx: NDArray[np.float64]
    n: NDArray[np.float64]

    @staticmethod
    def of(d_NF: NDArray[np.float64], x_N: NDArray[np.float64], unit_N: NDArray[np.intp]) -> "_Moments":
        columns = np.stack([x_N, x_N**2, np.ones_like(x_N)], axis=1)
        x_U, xx_U, n_U = cluster_sums(columns, unit_N).T
        return _Moments(cluster_sums(d_NF, unit_N), x_U, cluster_sums(d_NF * x_N[:, None], unit_N), xx_U, n_U)

    def intercepts(
        self, weight_PU: NDArray[np.float64], sign_PU: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """a of the units counted `weight` times, with d and x of each turned by `sign`; [P, F]."""
        turned_PU = weight_PU if sign_PU is None else weight_PU * sign_PU
        d_PF, x_P = turned_PU @ self.d, turned_PU @ self.x
        xd_PF, xx_P, n_P = weight_PU @ self.xd, weight_PU @ self.xx, weight_PU @ self.n
        spread_P = xx_P - x_P**2 / n_P
        # Equal lengths everywhere leave no slope to take out.
        with np.errstate(invalid="ignore", divide="ignore"):
            slope_PF = np.where(spread_P[:, None] > 1e-9, (xd_PF - x_P[:, None] * d_PF / n_P[:, None]) / spread_P[:, None], 0.0)  # fmt: skip
        return (d_PF - slope_PF * x_P[:, None]) / n_P[:, None]

    def p_values(self, observed_F: NDArray[np.float64], permutations: int, seed: int) -> NDArray[np.float64]:
        """Two-sided share of sign changes with an intercept at least as large."""
        num = len(self.n)
        limit_F = np.abs(observed_F) * (1 - 1e-9)
        if num <= _EXACT_PROMPTS:
            signs_PU = np.array(list(itertools.product([-1.0, 1.0], repeat=num)))
            return self._as_large(signs_PU, limit_F) / len(signs_PU)
        rng = np.random.default_rng(seed)
        as_large_F = np.zeros(len(observed_F))
        for start in range(0, permutations, _AT_ONCE):
            signs_PU = rng.choice([-1.0, 1.0], size=(min(_AT_ONCE, permutations - start), num))
            as_large_F += self._as_large(signs_PU, limit_F)
        return (as_large_F + 1) / (permutations + 1)

    def _as_large(self, signs_PU: NDArray[np.float64], limit_F: NDArray[np.float64]) -> NDArray[np.float64]:
        ones = np.ones((1, signs_PU.shape[1]))
        # The sums that signs leave alone are computed once, in a row of their own.
        return (np.abs(self.intercepts(ones, signs_PU)) >= limit_F).sum(axis=0)


def off_target_firing(codes: AuditCodes) -> Float[np.ndarray, " d_sae"]:
    """t: share of the off-target responses (the half that chooses) whose rewarded token each latent fires at."""
    return codes.role("off_select").density


def _sums(z_RS: object, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(z_RS[rows].sum(axis=0)).ravel()  # type: ignore[index]


def _parts(counts_RU: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    return [counts_RU[i : i + _AT_ONCE] for i in range(0, len(counts_RU), _AT_ONCE)]

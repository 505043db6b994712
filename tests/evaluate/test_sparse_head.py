import numpy as np
import pytest
from scipy import optimize, sparse

from sarm.evaluate.sparse_head import C_PATH, _fit, _standard_error, fit_sparse_head
from sarm.settings.checks import UserError

NUM_PAIRS, D_SAE, RELEVANT = 600, 60, (3, 17, 41)


def made(seed: int = 0, num_pairs: int = NUM_PAIRS):
    """Sparse code differences of pairs whose label follows three latents; five pairs a prompt."""
    random = np.random.default_rng(seed)
    difference_NS = random.normal(size=(num_pairs, D_SAE)) * (random.random((num_pairs, D_SAE)) < 0.15)
    margin_N = difference_NS[:, list(RELEVANT)] @ np.array([4.0, -3.0, 3.5])
    preferred_N = random.random(num_pairs) < 1 / (1 + np.exp(-margin_N))
    difference_NS *= np.where(preferred_N, 1, -1)[:, None]
    prompts_N = np.arange(num_pairs) // 5
    return sparse.csr_array(difference_NS), prompts_N, prompts_N % 4 == 0


def objective(w_S, difference_NS, C):
    return C * np.logaddexp(0, -(difference_NS @ w_S)).sum() + np.abs(w_S).sum()


@pytest.mark.parametrize("C", [0.02, 0.2])
def test_a_head_is_the_minimum_that_a_bounded_solver_finds_in_float64(C):
    difference_NS = made()[0]
    # w = p - n with p, n >= 0 makes |w|_1 smooth.
    start, bounds = np.full(2 * D_SAE, 0.01), [(0, None)] * (2 * D_SAE)

    def split(v):
        return objective(v[:D_SAE] - v[D_SAE:], difference_NS, C) + 2 * np.minimum(v[:D_SAE], v[D_SAE:]).sum()

    def smooth(v):
        w_S = v[:D_SAE] - v[D_SAE:]
        slope_S = C * (difference_NS.T @ -(1 / (1 + np.exp(difference_NS @ w_S))))
        return C * np.logaddexp(0, -(difference_NS @ w_S)).sum() + v.sum(), np.concatenate([slope_S + 1, -slope_S + 1])

    best = optimize.minimize(smooth, start, jac=True, bounds=bounds, method="L-BFGS-B", options={"maxiter": 20000, "ftol": 1e-15, "gtol": 1e-10})  # fmt: skip
    assert split(best.x) == pytest.approx(best.fun, rel=1e-9)
    assert objective(_fit(difference_NS, C), difference_NS, C) == pytest.approx(best.fun, rel=1e-4)


def test_the_latents_that_decide_are_found_and_few_others():
    head = fit_sparse_head(*made())
    assert set(np.argsort(-np.abs(head.weight))[:3]) == set(RELEVANT)
    assert 3 <= head.num_latents < D_SAE / 2
    assert np.sign(head.weight[list(RELEVANT)]).tolist() == [1, -1, 1]


def test_indices_of_64_bits_make_the_same_head():
    difference_NS, prompts_N, choosing_N = made()
    wide_NS = difference_NS.copy()
    wide_NS.indices, wide_NS.indptr = (part.astype(np.int64) for part in (wide_NS.indices, wide_NS.indptr))
    wanted = fit_sparse_head(difference_NS, prompts_N, choosing_N)
    assert fit_sparse_head(wide_NS, prompts_N, choosing_N).weight.tolist() == wanted.weight.tolist()


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_a_limit_on_the_number_of_latents_holds(limit):
    assert (
        1 <= fit_sparse_head(*made(), max_latents=limit, path=np.geomspace(1e-3, 1, 40).tolist()).num_latents <= limit
    )


def test_the_strength_is_chosen_by_the_marked_pairs_alone():
    difference_NS, prompts_N, choosing_N = made()
    head = fit_sparse_head(difference_NS, prompts_N, choosing_N)
    for C, nll in head.nll.items():
        w_S = _fit(difference_NS[~choosing_N], C)
        assert nll == pytest.approx(float(np.logaddexp(0, -(difference_NS[choosing_N] @ w_S)).mean()), rel=1e-12)
    best = min(head.nll, key=head.nll.__getitem__)
    w_S = _fit(difference_NS[~choosing_N], best)
    losses_N = np.logaddexp(0, -(difference_NS[choosing_N] @ w_S))
    by_prompt = [losses_N[prompts_N[choosing_N] == prompt].mean() for prompt in np.unique(prompts_N[choosing_N])]
    bound = losses_N.mean() + np.std(by_prompt, ddof=1) / len(by_prompt) ** 0.5
    chosen = min(C for C, nll in head.nll.items() if nll <= bound and head.latents_kept[C])
    assert pytest.approx(chosen * (~choosing_N).mean()) == head.C


def test_one_standard_error_is_that_of_a_mean_over_prompts():
    values_N, prompts_N = np.random.default_rng(1).normal(size=400), np.arange(400)
    assert _standard_error(values_N, prompts_N) == pytest.approx(values_N.std(ddof=1) / 20, rel=1e-9)
    doubled, twice = np.repeat(values_N, 2), np.repeat(prompts_N, 2)
    assert _standard_error(doubled, twice) == pytest.approx(values_N.std(ddof=1) / 20, rel=1e-9)


@pytest.mark.parametrize("choosing", [np.zeros(NUM_PAIRS, bool), np.ones(NUM_PAIRS, bool)])
def test_without_pairs_on_both_sides_there_is_nothing_to_choose_by(choosing):
    difference_NS, prompts_N, _ = made()
    with pytest.raises(UserError, match="others to choose its strength by"):
        fit_sparse_head(difference_NS, prompts_N, choosing)


def test_codes_that_say_nothing_leave_no_head():
    _, prompts_N, choosing_N = made()
    with pytest.raises(UserError, match="no head of the path"):
        fit_sparse_head(sparse.csr_array((NUM_PAIRS, D_SAE)), prompts_N, choosing_N)


def test_the_path_goes_from_strong_to_weak():
    assert list(C_PATH) == sorted(C_PATH)

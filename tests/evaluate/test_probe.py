import numpy as np
import pytest
from scipy.optimize import minimize

from sarm.evaluate.probe import C_GRID, fit_head, fit_probe
from sarm.settings.checks import UserError


def activations(num_pairs, d_in, seed, signal=1.0):
    rng = np.random.default_rng(seed)
    direction_D = np.linspace(-1, 1, d_in)
    chosen_ND = rng.normal(size=(num_pairs, d_in)) + signal * direction_D
    return chosen_ND.astype(np.float32), rng.normal(size=(num_pairs, d_in)).astype(np.float32)


def test_probe_finds_a_planted_direction_and_scores_new_pairs():
    chosen_ND, rejected_ND = activations(300, 12, 0)
    probe = fit_probe(chosen_ND, rejected_ND, np.arange(300) // 3, 0)
    new_chosen_ND, new_rejected_ND = activations(500, 12, 1)
    assert (probe.rewards(new_chosen_ND) > probe.rewards(new_rejected_ND)).mean() > 0.9
    assert probe.C in C_GRID


def test_probe_of_noise_prefers_the_strongest_penalty_and_stays_near_chance():
    chosen_ND, rejected_ND = activations(300, 100, 0, signal=0.0)
    probe = fit_probe(chosen_ND, rejected_ND, np.arange(300), 0)
    new_chosen_ND, new_rejected_ND = activations(2000, 100, 1, signal=0.0)
    assert probe.C <= 1e-3
    assert 0.45 < (probe.rewards(new_chosen_ND) > probe.rewards(new_rejected_ND)).mean() < 0.55


def test_fit_minimises_the_pairwise_loss_that_the_docstring_states():
    chosen_ND, rejected_ND = activations(40, 5, 2)
    x_ND = chosen_ND - rejected_ND

    def loss(w_D):
        return 0.1 * np.logaddexp(0, -x_ND @ w_D).sum() + w_D @ w_D / 2

    np.testing.assert_allclose(fit_head(x_ND, 0.1), minimize(loss, np.zeros(5)).x, atol=2e-3)


def test_probe_does_not_depend_on_the_scale_of_a_feature_and_survives_a_constant_one():
    chosen_ND, rejected_ND = activations(90, 6, 3)
    scale_D = np.array([1, 100, 0.01, 1, 1, 0], np.float32)
    plain = fit_probe(chosen_ND * (scale_D > 0), rejected_ND * (scale_D > 0), np.arange(90), 0)
    scaled = fit_probe(chosen_ND * scale_D, rejected_ND * scale_D, np.arange(90), 0)
    np.testing.assert_allclose(scaled.rewards(chosen_ND * scale_D), plain.rewards(chosen_ND * (scale_D > 0)), atol=1e-2)


def test_penalty_is_chosen_on_prompts_that_the_fold_has_not_seen():
    # Every prompt has its own direction, which tells its own pairs apart and no others': only folds that split
    # prompts would find a weak penalty good.
    rng = np.random.default_rng(0)
    own_PD = 4 * rng.normal(size=(30, 200))
    prompts_N = np.repeat(np.arange(30), 8)
    chosen_ND = (rng.normal(size=(240, 200)) + own_PD[prompts_N]).astype(np.float32)
    rejected_ND = rng.normal(size=(240, 200)).astype(np.float32)
    grouped = fit_probe(chosen_ND, rejected_ND, prompts_N, 0)
    leaking = fit_probe(chosen_ND, rejected_ND, np.arange(240), 0)
    assert grouped.C < leaking.C
    assert min(leaking.cv_nll.values()) < 0.3 < min(grouped.cv_nll.values())


def test_probe_repeats_with_its_seed():
    chosen_ND, rejected_ND = activations(60, 4, 4)
    first, second = (fit_probe(chosen_ND, rejected_ND, np.arange(60), 5) for _ in range(2))
    assert (first.weight == second.weight).all()
    assert first.weight.dtype == np.float32


def test_probe_refuses_too_few_prompts_and_broken_activations():
    chosen_ND, rejected_ND = activations(6, 4, 0)
    with pytest.raises(UserError, match="at least 3 prompts, got 2"):
        fit_probe(chosen_ND, rejected_ND, np.arange(6) % 2, 0)
    chosen_ND[0, 0] = np.inf
    with pytest.raises(UserError, match="not finite"):
        fit_probe(chosen_ND, rejected_ND, np.arange(6), 0)

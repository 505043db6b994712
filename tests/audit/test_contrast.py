import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from sarm.audit.codes import AuditCodes
from sarm.audit.contrast import contrast, off_target_firing, reference_scores
from sarm.audit.selection import matched_sets, read_ratings, select, sensitivity
from sarm.settings.checks import UserError


def test_the_reference_score_is_the_papers_formula(codes):
    selecting = codes.role("select")
    for site in ("reward", "sentence"):
        z = codes.at(site).toarray()
        c, r = z[selecting.chosen].sum(0), z[selecting.rejected].sum(0)
        expected = (c - r) / (c + r + (c + r).mean())
        np.testing.assert_allclose(reference_scores(selecting, site), expected)
    assert reference_scores(selecting, "reward")[1] > 0.3 > -0.3 > reference_scores(selecting, "reward")[2]


def test_contrast_finds_the_planted_latents_and_no_others(codes):
    found = contrast(codes.role("select"), "reward", 2000, 0)
    by_latent = {int(latent): i for i, latent in enumerate(found.latent)}
    significant = {latent for latent, i in by_latent.items() if found.q[i] <= 0.05}
    assert significant == {1, 2}
    assert found.low[by_latent[1]] > 0 > found.high[by_latent[2]]
    assert (found.q >= found.p - 1e-12).all()
    assert 5 not in by_latent


def test_the_difference_is_that_at_equal_length(codes):
    selecting = codes.role("select")
    found = contrast(selecting, "reward", 200, 0)
    d = codes.z[selecting.chosen].toarray() - codes.z[selecting.rejected].toarray()
    design = np.stack([np.ones(selecting.num_pairs), selecting.log_length], axis=1)
    expected = np.linalg.lstsq(design, d, rcond=None)[0][0]
    np.testing.assert_allclose(found.difference, expected[found.latent], atol=1e-10)


def test_with_few_prompts_every_sign_is_tried_on_what_length_leaves(codes):
    few = codes.role("select").keep(np.isin(codes.role("select").prompts, [f"p{i}" for i in range(0, 18, 3)]))
    found = contrast(few, "reward", 200, 0)
    assert found.is_exact
    assert found.num_prompts == 6
    d, x = codes.z[few.chosen].toarray() - codes.z[few.rejected].toarray(), few.log_length
    by_length = np.outer(x, (x @ d) / (x @ x))
    names = sorted(set(few.prompts.tolist()))
    as_large = np.zeros(len(found.latent))
    for signs in itertools.product([-1, 1], repeat=6):
        sign = np.array([signs[names.index(p)] for p in few.prompts])
        design = np.stack([np.ones(few.num_pairs), x], axis=1)
        a = np.linalg.lstsq(design, by_length + sign[:, None] * (d - by_length), rcond=None)[0][0][found.latent]
        as_large += np.abs(a) >= np.abs(found.difference) * (1 - 1e-9)
    np.testing.assert_allclose(found.p, as_large / 64)


def of_length_alone(seed: int, num_prompts: int, mean_of_sd: float, num_latents: int = 300) -> AuditCodes:
    """Latents that depend on the answer's length and on chance; the chosen answer is shorter by so many standard deviations."""
    rng = np.random.default_rng(seed)
    tokens = np.exp(rng.normal(5, 0.5, num_prompts))
    tokens = np.concatenate([tokens * np.exp(rng.normal(0.5 * mean_of_sd, 0.5, num_prompts)), tokens])
    z = sparse.csr_array(20 + np.log(tokens)[:, None] + 0.7 * rng.normal(size=(2 * num_prompts, num_latents)))
    names = np.array([f"p{i}" for i in range(num_prompts)])
    return AuditCodes(
        weight=np.ones(num_latents), reward=np.zeros(2 * num_prompts), tokens=tokens, z=z, sentence=z,
        ends=np.ones(2 * num_prompts, dtype=int), residual=np.zeros((2 * num_prompts, 1), dtype=np.float32),
        pair_ids=names, prompts=names, roles=np.full(num_prompts, "select"), subsets=np.full(num_prompts, ""),
        chosen=np.arange(num_prompts), rejected=np.arange(num_prompts, 2 * num_prompts), required=np.zeros(num_prompts),
    )  # fmt: skip


@pytest.mark.parametrize("mean_of_sd", [0, -1, -3])
def test_a_latent_of_length_alone_is_called_significant_as_often_as_said(mean_of_sd):
    found = [contrast(of_length_alone(seed, 200, mean_of_sd), "reward", 1000, seed) for seed in range(3)]
    p = np.concatenate([one.p for one in found])
    assert np.mean(p <= 0.05) <= 0.065
    assert np.mean(p <= 0.01) <= 0.018
    assert sum((one.q <= 0.05).sum() for one in found) <= 3, "discoveries among 900 latents of which none is one"


def test_the_interval_of_the_difference_at_equal_length_holds_zero_19_times_in_20_over_19_prompts():
    found = [contrast(of_length_alone(seed, 19, -1), "reward", 100, seed) for seed in range(10)]
    held = np.concatenate([(one.low <= 0) & (one.high >= 0) for one in found])
    assert 0.93 <= held.mean() <= 0.97


def test_answers_of_equal_length_leave_the_plain_difference():
    codes = replace(of_length_alone(0, 30, -1, 5), tokens=np.full(60, 100.0))
    found = contrast(codes, "reward", 100, 0)
    np.testing.assert_allclose(found.difference, codes.difference.mean(axis=0))


def test_a_long_prompt_hides_no_length():
    """Tokens are those of answers: `codes` has none of the prompt's."""
    codes = of_length_alone(0, 30, -1)
    assert codes.log_length == pytest.approx(np.log(codes.tokens[:30] / codes.tokens[30:]))


def test_pairs_taken_as_independent_look_surer_than_prompts(codes):
    found = contrast(codes.role("select"), "reward", 2000, 0)
    noise = [i for i, latent in enumerate(found.latent) if latent in (1, 2)]
    assert (found.p_pairs[noise] <= found.p[noise]).all()


def test_false_discoveries_are_rare_where_labels_mean_nothing(codes):
    rng = np.random.default_rng(0)
    selecting = codes.role("select")
    hits = 0
    for _ in range(20):
        turned = {p: rng.random() < 0.5 for p in set(selecting.prompts.tolist())}
        is_turned = np.array([turned[p] for p in selecting.prompts])
        null = replace(
            selecting,
            chosen=np.where(is_turned, selecting.rejected, selecting.chosen),
            rejected=np.where(is_turned, selecting.chosen, selecting.rejected),
        )
        hits += bool((contrast(null, "reward", 500, 0).q <= 0.05).any())
    assert hits <= 4


def pick(codes, **changes):
    settings = {"fdr": 0.05, "max_off_target": 0.5, "max_features": 8, "rank": "effect"} | changes
    found = contrast(codes.role("select"), "reward", 1000, 0)
    return select(found, off_target_firing(codes), codes.weight, **settings)


def test_selection_needs_significance_silence_off_target_and_a_weight(codes):
    chosen = pick(codes)
    assert chosen.latent.tolist() == [2, 1]
    assert chosen.sign.tolist() == [-1, 1]
    assert pick(codes, max_features=1).latent.tolist() == [2]
    assert pick(codes, rank="score", max_features=1).latent.tolist() in ([1], [2])
    everywhere = np.ones_like(codes.weight)
    found = contrast(codes.role("select"), "reward", 1000, 0)
    assert not len(select(found, everywhere, codes.weight, 0.05, 0.5, 8, "effect").latent)
    assert not len(select(found, 0 * everywhere, 0 * codes.weight, 0.05, 0.5, 8, "effect").latent)


def test_a_failed_rating_is_never_a_safety_feature(codes, tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("\ufefflatent;rating;rater;status\n1;5;a;ok\n1;4;b;ok\n1;5;c;ok\n2;;a;invalid\n2;5;b;api_error\n")
    ratings = read_ratings(path)
    assert ratings == {1: 5.0}
    assert pick(codes, ratings=ratings).latent.tolist() == [1]
    assert not len(pick(codes, ratings={1: 4.0}).latent)
    rows = sensitivity(pick(codes), {"rated": pick(codes, ratings=ratings), "none": pick(codes, ratings={7: 5.0})})
    assert [(row.features, row.jaccard) for row in rows] == [(1, 0.5), (0, 0.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latent,score\n1,5\n", "no column rating"),
        ("", "no column latent, rating"),
        ("latent,rating\n1,6\n", "line 2 rates latent 1 6, expected 1 to 5"),
        ("latent,rating\none,5\n", "line 2 is no rating"),
        ("latent,rating,status\n1,5,refused\n", "no valid rating"),
    ],
)
def test_ratings_that_cannot_be_used_are_refused(tmp_path, text, message):
    path = tmp_path / "ratings.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_ratings(path)


def test_matched_sets_are_like_the_selected_ones_and_hold_none_of_them():
    rng = np.random.default_rng(0)
    density, weight = rng.uniform(0, 1, 400) ** 3, rng.normal(size=400) ** 3
    density[:50] = 0
    selected = np.array([60, 61, 62, 63])
    sets = matched_sets(selected, density, weight, 50, 0)
    assert sets.shape == (50, 4)
    assert not np.isin(sets, selected).any()
    assert (density[sets] > 0).all()
    assert all(len(set(row)) == 4 for row in sets.tolist())
    for key in (np.log(density[selected]), np.log(np.abs(weight[selected]))):
        assert np.isfinite(key).all()
    gap = np.abs(np.log(np.abs(weight[sets])) - np.log(np.abs(weight[selected])))
    random_gap = np.abs(np.log(np.abs(weight[rng.integers(64, 400, (50, 4))])) - np.log(np.abs(weight[selected])))
    assert gap.mean() < 0.4 * random_gap.mean()
    with pytest.raises(UserError, match="only 2 other latents"):
        matched_sets(selected, np.where(np.arange(400) < 66, np.where(np.arange(400) > 59, 1.0, 0), 0), weight, 5, 0)

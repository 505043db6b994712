import dataclasses

import numpy as np
import pytest
from scipy import sparse

from sarm.evaluate.readability import (
    Answered,
    firing_share,
    latents_carrying,
    named_latents,
    over_prompts,
    readability,
)


def csr(rows) -> sparse.csr_array:
    return sparse.csr_array(np.array(rows, dtype=np.float64))


def test_shares_by_hand():
    # Latent 0 fires always, 1 on three of four, 2 on half, 3 once.
    contributions_RS = csr([[1, -2, 0, 0], [1, 2, 4, 0], [1, 2, 4, 8], [1, 0, 0, 0]])
    fires_RS = contributions_RS != 0
    assert firing_share(contributions_RS, fires_RS, 0.95) == pytest.approx(4 / 26)
    assert firing_share(contributions_RS, fires_RS, np.nextafter(0.5, 1)) == pytest.approx(10 / 26)
    assert firing_share(contributions_RS, fires_RS, 0.5) == pytest.approx(18 / 26)
    assert firing_share(csr(np.zeros((3, 2))), csr(np.zeros((3, 2))) != 0, 0.5) == 0


@pytest.mark.parametrize(("part", "wanted"), [(0.5, 1), (0.75, 2), (0.76, 3), (0.9, 3), (1.0, 4)])
def test_latents_of_a_margin_by_hand(part, wanted):
    # Mean sizes 8, 4, 3, 1 of 16.
    assert latents_carrying(csr([[8, -4, 3, -2], [-8, 4, 3, 0]]), part) == wanted


def test_a_margin_of_nothing_is_carried_by_no_latent():
    assert latents_carrying(csr(np.zeros((2, 3))), 0.5) == 0


def made(num_prompts: int = 40, seed: int = 0) -> tuple[Answered, np.ndarray]:
    """Two answers a prompt; latent 0 always fires, 1 where `apples` are, 2 by chance."""
    random = np.random.default_rng(seed)
    texts, values, prompts, pairs = [], [], [], []
    for prompt in range(num_prompts):
        for _side in range(2):
            has_apples = bool(random.random() < 0.5)
            words = [f"word{random.integers(30)}" for _ in range(8)] + (["green", "apples"] if has_apples else ["dull"])
            texts.append(" ".join(random.permutation(words)))
            values.append([5.0, 2.0 * has_apples, 1.0 * (random.random() < 0.5), 0.0])
            prompts.append(prompt)
        pairs.append((2 * prompt, 2 * prompt + 1))
    return Answered(csr(values), np.array(prompts), texts, np.array(pairs)), np.array([1.0, -1.0, 0.5, 3.0])


def test_a_name_has_words_that_say_something():
    texts = [
        "they and the guards are here",
        "the guards and they are there",
        "they cannot and will not",
        "nobody is there",
    ] * 6
    fires = np.array([True, True, False, False] * 6)
    values = csr([[float(fire)] for fire in fires])
    answered = Answered(values, np.arange(24), texts, np.array([(0, 2)]))
    (named,) = named_latents(answered, np.array([1.0]))
    assert "guards" in named.terms
    assert not {"they", "and", "the", "are", "they are", "and the"} & set(named.terms)
    (refused,) = named_latents(dataclasses.replace(answered, values=csr([[float(not fire)] for fire in fires])), np.array([1.0]))  # fmt: skip
    assert any("cannot" in term or "not" in term.split() for term in refused.terms)


def test_a_latent_that_follows_a_word_has_that_name_and_one_that_fires_by_chance_has_none():
    answered, weight_S = made()
    named = {one.latent: one for one in named_latents(answered, weight_S)}
    assert set(named) == {1, 2}
    assert named[1].auc > 0.98
    assert "apples" in named[1].terms
    assert 0.25 < named[2].auc < 0.75


def test_scores_of_a_response_come_from_a_classifier_that_did_not_see_its_prompt():
    answered, weight_S = made()
    # Every text has a word of its prompt's own, which decides where the latent fires: it says nothing of other prompts.
    texts = [f"{'x' if prompt % 2 else 'y'}{prompt} z{prompt}" for prompt in answered.prompts]
    values = csr([[0, 2.0 * (prompt % 2), 0, 0] for prompt in answered.prompts])
    (one,) = named_latents(Answered(values, answered.prompts, texts, answered.pairs), weight_S)
    assert one.auc < 0.7


def test_all_figures_of_made_up_responses():
    answered, weight_S = made()
    found = readability(answered, weight_S, named_latents(answered, weight_S))
    assert found.num_alive_at_reward == 3
    apples = float((answered.values[:, [1]].toarray() != 0).mean()) * 2
    chance = float((answered.values[:, [2]].toarray() != 0).mean()) * 0.5
    assert found.always_on_share.value == pytest.approx(5 / (5 + apples + chance))
    assert found.latents_half_margin.value == 1
    assert found.latents_ninety_margin.value == 2
    for estimate in (found.always_on_share, found.names_auc):
        assert estimate is not None
        assert estimate.ci95 is not None
        assert estimate.ci95[0] <= estimate.value <= estimate.ci95[1]


def test_texts_without_a_common_word_and_latents_that_always_fire_have_no_names():
    answered, weight_S = made()
    texts = [f"only{number}" for number in range(len(answered.texts))]
    assert named_latents(Answered(answered.values, answered.prompts, texts, answered.pairs), weight_S) == []
    always = Answered(answered.values[:, [0]], answered.prompts, answered.texts, answered.pairs)
    weight_S = np.array([1.0])
    assert readability(always, weight_S, named_latents(always, weight_S)).names_auc is None


def test_an_interval_over_prompts_is_wider_than_one_over_rows_where_rows_of_a_prompt_are_alike():
    values = np.repeat(np.random.default_rng(0).normal(size=30), 10)
    prompts = np.repeat(np.arange(30), 10)

    def width(clusters):
        estimate = over_prompts(lambda rows: float(values[rows].mean()), clusters, seed=0)
        return estimate.ci95[1] - estimate.ci95[0]

    assert width(prompts) > 2 * width(np.arange(300))
    assert over_prompts(lambda rows: float(values[rows].mean()), np.zeros(300), seed=0).ci95 is None

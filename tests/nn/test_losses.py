import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sarm.nn.losses import VarianceUnexplained, bradley_terry, cosine, reward_centring, reward_fidelity


def fvu_of(x, x_hat, cuts=()):
    """FVU with the rows added in batches that end at `cuts`."""
    found = VarianceUnexplained(x.shape[1])
    edges = [0, *sorted(cuts), len(x)]
    for start, end in pairwise(edges):
        found.add(x[start:end], x_hat[start:end])
    return found.value()


def two_tensors(seed, num, d_in=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, d_in, generator=generator) * 2 + 1
    return x, x + 0.3 * torch.randn(num, d_in, generator=generator)


@given(data=st.data(), seed=st.integers(0, 1000), num=st.integers(2, 40))
def test_fvu_is_the_ratio_of_sums_however_the_rows_are_batched(data, seed, num):
    x, x_hat = two_tensors(seed, num)
    cuts = data.draw(st.lists(st.integers(0, num), max_size=5))
    a, b = x.double().numpy(), x_hat.double().numpy()
    wanted = np.sum((a - b) ** 2) / np.sum((a - a.mean(0)) ** 2)
    assert fvu_of(x, x_hat, cuts) == pytest.approx(wanted, rel=1e-9)


def test_fvu_is_not_the_mean_of_batch_ratios():
    x = torch.tensor([[0.0], [1.0], [0.0], [10.0]])
    x_hat = torch.tensor([[0.0], [0.0], [0.0], [10.0]])
    # One unit of error over 0 1 0 10, whose squared distances from 2.75 sum to 70.75; the batches alone give 2 and 0.
    assert fvu_of(x, x_hat, [2]) == pytest.approx(1 / 70.75)


def test_fvu_is_0_for_a_perfect_reconstruction_and_1_for_the_mean():
    x, _ = two_tensors(0, 10)
    assert fvu_of(x, x) == 0
    assert fvu_of(x, x.mean(0).expand_as(x)) == pytest.approx(1, rel=1e-6)


@given(seed=st.integers(0, 1000), num=st.integers(0, 200))
def test_fvu_is_undefined_without_two_different_rows(seed, num):
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)).repeat(num, 1)
    assert fvu_of(x, x + 1) is None


def test_fvu_of_rows_that_hardly_differ_is_still_measured():
    x, x_hat = two_tensors(0, 50)
    assert fvu_of(x.double() * 1e-4 + 1, x_hat.double() * 1e-4 + 1) == pytest.approx(fvu_of(x, x_hat), rel=1e-4)


def test_bradley_terry_matches_hand_numbers():
    found = bradley_terry(torch.tensor([0.0, math.log(3), -math.log(3)], dtype=torch.float64))
    # sigmoid(log 3) is 3/4.
    torch.testing.assert_close(found, torch.tensor([math.log(2), math.log(4 / 3), math.log(4)], dtype=torch.float64))


def test_bradley_terry_is_stable_at_huge_margins():
    margins = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = bradley_terry(margins)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 1e4]
    assert margins.grad.tolist() == [0.0, -1.0]


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=8))
def test_bradley_terry_of_a_pair_and_of_its_swap_are_the_two_sides_of_one_coin(margins):
    margins = torch.tensor(margins, dtype=torch.float64)
    chances = torch.exp(-bradley_terry(margins)) + torch.exp(-bradley_terry(-margins))
    torch.testing.assert_close(chances, torch.ones_like(margins))


def test_bradley_terry_computes_in_float32_or_wider():
    margins = torch.tensor([0.3, -2.0])
    assert bradley_terry(margins.bfloat16()).dtype == torch.float32
    assert bradley_terry(margins.double()).dtype == torch.float64


def test_gradcheck_of_bradley_terry():
    margins = torch.tensor([-3.0, -0.1, 0.0, 2.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bradley_terry, [margins])


def test_cosine_matches_hand_numbers():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    x_hat = torch.tensor([[4.0, 3.0], [-2.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(cosine(x_hat, x), torch.tensor([24 / 25, -1.0, 0.0]))


def test_reward_fidelity_matches_hand_numbers():
    # Rewards 0, 2, 4 become 0, 3, 4: an error of 1 over a spread of 8.
    x = torch.tensor([[0.0, 5.0], [1.0, 6.0], [2.0, 7.0]])
    x_hat = torch.tensor([[0.0, 0.0], [1.5, 0.0], [2.0, 0.0]])
    assert reward_fidelity(x, x_hat, torch.tensor([2.0, 0.0])) == pytest.approx(1 - 1 / 8)
    assert reward_fidelity(x, x, torch.tensor([2.0, 1.0])) == 1
    assert reward_fidelity(x, -x, torch.tensor([2.0, 0.0])) < 0, "an error larger than the spread"


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rewards_without_a_spread_have_no_fidelity(rows):
    x = torch.ones(rows, 2)
    assert reward_fidelity(x, x + 1, torch.tensor([1.0, 1.0])) is None


@given(
    margins=st.lists(st.floats(-30, 30), min_size=1, max_size=5),
    smoothing=st.floats(0, 0.49),
)
def test_bradley_terry_is_the_weighted_log_likelihood_of_both_labels(margins, smoothing):
    found = bradley_terry(torch.tensor(margins, dtype=torch.float64), smoothing)
    wanted = [
        (1 - smoothing) * math.log1p(math.exp(-m)) + smoothing * math.log1p(math.exp(m)) for m in margins
    ]  # fmt: skip
    assert found.tolist() == pytest.approx(wanted, abs=1e-9)


def test_the_gradients_of_the_pair_losses_are_right_in_float64():
    chosen, rejected = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda c, r: bradley_terry(c - r - 0.3, 0.1), (chosen, rejected))
    assert torch.autograd.gradcheck(reward_centring, (chosen, rejected))


def test_centring_is_least_where_both_rewards_cancel_and_ignores_their_difference():
    chosen = torch.tensor([2.0, 2.0, -1.0])
    assert reward_centring(chosen, torch.tensor([-2.0, 1.0, -1.0])).tolist() == [0.0, 9.0, 4.0]

"""What fits a device, on cards that are only numbers here; the sizes are those of the papers' models."""

import pytest

from sarm.settings.budget import (
    CORE_TOKENS,
    Device,
    Size,
    dtype_of,
    pass_budget,
    pass_gb,
    training_budget,
    training_gb,
)

# Llama-3.1-8B at 16 blocks, beside 65,536 latents; Llama-3.2-1B at 12, beside 16,384.
LARGE = Size(16 * 218_103_808 + 128_256 * 4096, 4096, 14336, 16, beside=2 * 4096 * 65536)
SMALL = Size(12 * 60_817_408 + 128_256 * 2048, 2048, 8192, 12, beside=2 * 2048 * 16384)
# GB of 1e9 bytes, as drivers count them: an L4, an A100, an H100, an H200.
CARDS = {24: Device(24.0), 40: Device(42.0), 80: Device(85.0), 141: Device(150.0)}
LENGTH = 4096


@pytest.mark.parametrize("size", [LARGE, SMALL], ids=["8B", "1B"])
@pytest.mark.parametrize("card", CARDS)
def test_a_pass_fits_and_one_of_twice_the_tokens_would_not_or_would_bring_nothing(card, size):
    device, budget = CARDS[card], pass_budget(CARDS[card], size, LENGTH)
    assert budget.dtype == "bfloat16"
    assert budget.gb == pass_gb(size, budget.dtype, budget.batch_tokens) <= device.usable_gb
    assert budget.batch_tokens >= LENGTH
    assert budget.batch_tokens == 65536 or pass_gb(size, budget.dtype, 2 * budget.batch_tokens) > device.usable_gb


def test_larger_cards_take_no_fewer_tokens():
    tokens = [pass_budget(device, LARGE, LENGTH).batch_tokens for device in CARDS.values()]
    assert tokens == sorted(tokens)
    tokens = [pass_budget(Device(gb), LARGE, LENGTH).batch_tokens for gb in (12.0, 16.0, 24.0)]
    assert tokens == [2048 * 2, 16384, 65536]


def test_cores_keep_float32_and_short_passes():
    assert pass_budget(Device(), LARGE, LENGTH)[:2] == ("float32", CORE_TOKENS)
    budget = training_budget(Device(), LARGE, 2, LENGTH, least_stage=2)
    assert (budget.precision, budget.batch_tokens, budget.zero_stage) == ("float32", CORE_TOKENS, 2)
    assert not budget.gradient_checkpointing


def test_a_card_without_bfloat16_computes_in_float32():
    assert dtype_of(Device(16.0, has_bfloat16=False)) == "float32"
    assert pass_budget(Device(16.0, has_bfloat16=False), SMALL, LENGTH).dtype == "float32"


def test_what_is_given_is_kept():
    budget = pass_budget(CARDS[80], LARGE, LENGTH, "float32", 1234)
    assert budget[:2] == ("float32", 1234)
    training = training_budget(CARDS[141], SMALL, 8, LENGTH, precision="float32", batch_tokens=5000, least_stage=3, checkpointing=True)  # fmt: skip
    assert training[:4] == ("float32", 5000, True, 3)


@pytest.mark.parametrize(
    ("card", "workers", "size", "tokens", "checkpointing", "stage"),
    [
        # One card: 16 bytes a weight are 64 GB for the large one, which a card of 80 GB holds if blocks are recomputed.
        (24, 1, SMALL, 16384, True, 0),
        (40, 1, SMALL, 8192, False, 0),
        (80, 1, LARGE, 8192, True, 0),
        (141, 1, LARGE, 16384, False, 0),
        # Eight cards share them out: stage 2 where it fits, since stage 3 gathers weights for every pass.
        (24, 8, LARGE, 16384, True, 3),
        (40, 8, LARGE, 16384, True, 2),
        (80, 8, LARGE, 8192, False, 2),
        (80, 8, SMALL, 16384, False, 0),
    ],
)
def test_training_takes_the_fastest_way_that_fits(card, workers, size, tokens, checkpointing, stage):
    budget = training_budget(CARDS[card], size, workers, LENGTH)
    assert budget.fits
    assert budget.gb <= CARDS[card].usable_gb
    assert budget[1:4] == (tokens, checkpointing, stage)


def test_what_fits_no_way_is_said():
    budget = training_budget(CARDS[24], LARGE, 1, LENGTH)
    assert not budget.fits
    assert budget.gradient_checkpointing
    assert budget.gb > CARDS[24].usable_gb


def test_sixteen_bytes_a_weight_are_worked_out_by_hand():
    weights = LARGE.weights
    assert weights == 4_014_997_504
    plain = training_gb(LARGE, "bfloat16", 64, 1, 0, checkpointing=True)
    assert plain == pytest.approx((16 * weights + 4 * LARGE.beside) / 1e9, rel=2e-3)
    # Eight workers: stage 2 has the weights and 16 / 8 bytes, which is 28 GB with the SAE and a pass of 8,192 tokens; stage 3 an eighth.
    two, three = (training_gb(LARGE, "bfloat16", 8192, 8, stage, checkpointing=True) for stage in (2, 3))
    assert 24 < two < 30
    assert three < 14
    # Of one worker stage 2 holds more than a card of 80 GB, and stage 3 does not.
    two, three = (training_gb(LARGE, "bfloat16", 8192, 1, stage, checkpointing=True) for stage in (2, 3))
    assert two > 80 > three

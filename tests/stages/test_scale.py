"""The simulation of docs/scale.md against arithmetic: what can be worked out by hand is, and losses cost what they must."""

import math
from dataclasses import replace

import pytest
from tests.bench import bench_scale
from tests.bench.scale_model import Machines, Step, block_seconds, pass_over_blocks, reward_steps, training

from sarm.settings.presets import PRESETS
from sarm.stages.dry_run.scales import costs_on
from sarm.stages.dry_run.scaling import SPREAD_OF_LENGTHS, all_reduce_seconds, busy_share, network_bytes


@pytest.mark.parametrize("gpus", [1, 3, 8, 64])
def test_equal_blocks_take_as_many_rounds_as_there_are(gpus):
    machines = Machines(gpus)
    found = pass_over_blocks([10.0] * 100, machines)
    rounds = math.ceil(100 / gpus)
    assert found.seconds == pytest.approx(machines.start_seconds + 10 * rounds)
    assert found.idle_share == pytest.approx(1 - 1000 / (found.seconds * gpus))
    assert (found.redone_share, found.recovery_seconds) == (0, 0)


def test_no_deal_of_unlike_blocks_beats_their_mean_or_misses_it_by_more_than_one_block():
    blocks = block_seconds(1e9, 250_000, 2e-5, 0.3)
    assert sum(blocks) == pytest.approx(2e4, rel=0.03)
    for gpus in (4, 32):
        found = pass_over_blocks(blocks, Machines(gpus, start_seconds=0))
        assert sum(blocks) / gpus <= found.seconds <= sum(blocks) / gpus + max(blocks)


def test_a_lost_node_costs_its_absence_and_what_was_in_work():
    machines = Machines(16, start_seconds=40, detect_seconds=30, replace_seconds=240)
    blocks = [10.0] * 1600
    whole, lost = pass_over_blocks(blocks, machines), pass_over_blocks(blocks, machines, [405.0])
    # Eight of sixteen are away for 310 s, and half a block of each is done again: both are shared out over all.
    away, again = 8 * (30 + 240 + 40), 8 * 5.0
    assert lost.redone_share == pytest.approx(again / (16_000 + again))
    assert lost.seconds - whole.seconds == pytest.approx((away + again) / 16, abs=10)
    assert lost.recovery_seconds == lost.seconds - whole.seconds


def test_all_of_a_cluster_lost_waits_for_it():
    machines = Machines(8)
    whole, lost = pass_over_blocks([10.0] * 80, machines), pass_over_blocks([10.0] * 80, machines, [65.0])
    # It is lost 25 s after the start, in the middle of the third round.
    assert lost.seconds - whole.seconds == pytest.approx(30 + 240 + 40 + 5)


def test_synchronous_steps_are_the_slowest_and_the_network():
    machines, step = Machines(16, start_seconds=0), Step(2.0, 24.0, 2e9)
    found = training([step] * 100, machines)
    each = 2.0 + all_reduce_seconds(2e9, 16)
    assert found.seconds == pytest.approx(100 * each)
    assert found.idle_share == pytest.approx(1 - 24.0 / (16 * each))
    assert found.network_gb == pytest.approx(100 * network_bytes(2e9, 16) / 1e9)


def test_a_loss_costs_a_start_and_at_most_the_work_since_the_last_state():
    machines, steps = (
        Machines(8, start_seconds=40, detect_seconds=30, replace_seconds=240),
        [Step(1.0, 8.0, 0.0)] * 1000,
    )
    whole, lost = training(steps, machines), training(steps, machines, [700.0])
    # States at 300 and 600 steps; the loss comes at step 660.
    assert lost.seconds - whole.seconds == pytest.approx(30 + 240 + 40 + 60, abs=1)
    assert lost.redone_share == pytest.approx(60 / 1060, rel=0.02)
    fine = training(steps, machines, [700.0], checkpoint_seconds=10.0)
    assert fine.seconds - whole.seconds == pytest.approx(30 + 240 + 40, abs=11)


@pytest.mark.parametrize(("pairs", "gpus"), [(8, 8), (64, 8), (64, 32)])
def test_steps_of_pairs_keep_the_workers_as_busy_as_a_dry_run_says(pairs, gpus):
    steps = list(reward_steps(400, pairs, gpus, 1.0, SPREAD_OF_LENGTHS, 0.0))
    found = training(steps, Machines(gpus, start_seconds=0))
    assert 1 - found.idle_share == pytest.approx(busy_share(pairs, gpus), abs=0.01)


@pytest.mark.parametrize("gpus", [1, 8, 32])
def test_the_simulated_stages_take_what_a_dry_run_says(gpus, tmp_path):
    preset = PRESETS["sarm-4b"][1]
    costs = costs_on(replace(preset, run=replace(preset.run, out=tmp_path)), gpus)
    extraction, sae, sarm = (
        bench_scale.STAGES[name](gpus, ()).seconds for name in ("extraction", "SAE", "SARM, 8 pairs a step")
    )
    # The dry run has the pairs' tokens in its extraction too, and the scalar head's training beside the SARM's.
    assert extraction == pytest.approx(costs["extract_activations"].seconds / 1.077, rel=0.05)
    assert sae == pytest.approx(costs["train_sae"].seconds, rel=0.12)
    assert sarm == pytest.approx(costs["train_sarm"].seconds / 2, rel=0.03)

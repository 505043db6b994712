"""A learner's step: AuxK and the dead clock, resuming bit for bit, and dictionaries split over workers."""

import copy
import io
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.nn.every_sae import KINDS, kind_of, sae_of_settings, silence_
from torch import Tensor

from sarm.data.store.shuffled_rows import Cursor
from sarm.nn import sae as nn_sae
from sarm.nn.batch_topk import BatchTopKSae
from sarm.nn.jumprelu import JumpReluSae
from sarm.nn.sae import standardise
from sarm.settings.checks import UserError
from sarm.settings.sae import SaeSettings
from sarm.training.sae import Phase, SaeTraining
from sarm.training.sae_learner import Learner, shard_of

ROOT = Path(__file__).parents[2]
D_IN, D_SAE, K = 12, 32, 3


def rows(seed: int = 0, num: int = 64) -> Tensor:
    return torch.randn(num, D_IN, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def config_of(architecture: str, **changes) -> SaeSettings:
    return SaeSettings(**{"d_sae": D_SAE, "k": K, "batch_size": 16, **kind_of(architecture), **changes})


def fresh(config: SaeSettings, seed: int = 0) -> nn_sae.Sae:
    sae = sae_of_settings(config, D_IN)
    sae.initialise_(standardise(rows()), torch.Generator().manual_seed(seed))
    return sae


class Windows:
    """Three windows of the rows, whatever the seed and epoch."""

    num_rows = 100

    def windows(self, seed: int, epoch: int, first: int = 0):
        yield from rows(3, 100).chunk(3)[first:]


def phase(epochs: int = 2) -> Phase:
    return Phase("text", Windows(), rows(4), epochs, 3e-3)


def test_a_latent_is_dead_once_enough_rows_have_passed_since_it_fired():
    config = config_of("topk", dead_after_rows=48)
    sae = fresh(config)
    sae.b_enc.data[5] = -100.0
    sae.b_enc.data[6] = 100.0
    learner = Learner(sae, config)
    for number, dead in ((1, False), (2, False), (3, True)):
        learner.step(standardise(rows(number, 16)), 0.0)
        assert learner.rows_since_fired[5] == 16 * number
        assert learner.rows_since_fired[6] == 0
        assert bool(learner.dead()[5]) is dead
    assert learner.dead_share() == pytest.approx(float((learner.rows_since_fired >= 48).double().mean()))


def test_auxk_moves_the_encoder_of_dead_latents_and_without_it_they_stay():
    moved = {}
    for aux_k in (0, 4):
        config = config_of("topk", aux_k=aux_k, dead_after_rows=1000)
        sae = fresh(config)
        learner = Learner(sae, config)
        # Too weak to win TopK, but not so weak that they are never positive.
        sae.W_enc.data[:, :8] *= 1e-3
        learner.rows_since_fired[:8] = 1000
        before = sae.W_enc.detach().clone()
        learner.step(standardise(rows(7)), 1e-3)
        assert (learner.rows_since_fired[:8] == 1064).all(), "none of them fired"
        moved[aux_k] = (sae.W_enc.detach() != before).any(0)[:8]
    assert not moved[0].any()
    assert moved[4].all()


def test_auxk_waits_until_a_latent_is_dead():
    plain, waiting = (Learner(fresh(c), c) for c in (config_of("topk"), config_of("topk", aux_k=4)))
    for learner in (plain, waiting):
        learner.step(standardise(rows(7)), 1e-3)
    assert torch.equal(plain.sae.W_enc, waiting.sae.W_enc)


def test_the_batch_topk_threshold_follows_the_smallest_value_that_is_kept():
    config = config_of("batch_topk")
    sae = fresh(config)
    assert isinstance(sae, BatchTopKSae)
    before, x = sae.threshold.clone(), standardise(rows(8))
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    smallest = pre.flatten().topk(K * len(x)).values[-1]
    Learner(sae, config).step(x, 0.0)
    torch.testing.assert_close(sae.threshold, 0.99 * before + 0.01 * smallest)
    assert sae.threshold.unique().numel() == 1


def test_the_l0_penalty_pulls_thresholds_towards_k():
    config = config_of("jumprelu")
    found = []
    for factor in (0.5, 1.5):
        sae = fresh(config)
        assert isinstance(sae, JumpReluSae)
        sae.bandwidth = 5.0
        with torch.no_grad():
            sae.threshold.mul_(factor)
        learner = Learner(sae, config)
        # Reconstruction pulls at thresholds too; a strong penalty outweighs it.
        sae.l0_penalty = 1000.0
        before = sae.threshold.detach().clone()
        learner.step(standardise(rows(9)), 1e-2)
        found.append(float((sae.threshold - before).mean().detach()))
    assert found[0] > 0 > found[1]


@pytest.mark.parametrize("architecture", KINDS)
def test_every_architecture_learns(architecture):
    config = config_of(architecture, batch_size=50)
    losses = []
    training = SaeTraining([fresh(config)], phase(epochs=40), [config], 0)
    training.run([lambda step, metrics: losses.append(metrics["loss"])], max_steps=1)
    training.run([lambda step, metrics: losses.append(metrics["loss"])])
    assert losses[-1] < 0.8 * losses[0]
    sae = training.learners[0].sae
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=0, atol=1e-6)
    assert all(p.dtype == torch.float32 for p in sae.parameters())


def state_after(training: SaeTraining) -> dict:
    """The state, through the bytes of a file."""
    file = io.BytesIO()
    torch.save(training.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def equal(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("stop", [1, 6, 8, 13])
@pytest.mark.parametrize("architecture", KINDS)
def test_a_training_that_is_stopped_anywhere_and_continued_is_bit_equal(architecture, stop):
    config = config_of(architecture, aux_k=2, dead_after_rows=40)
    other = config_of("topk", d_sae=16)

    def start() -> SaeTraining:
        return SaeTraining([fresh(config), fresh(other, seed=5)], phase(), [config, other], 3)

    def log(step, metrics):
        pass

    whole = start()
    whole.run([log, log])
    first = start()
    first.run([log, log], max_steps=stop)
    second = start()
    second.load_state_dict(state_after(first))
    assert second.num_steps == stop
    assert second.place == first.place
    second.run([log, log])
    assert whole.num_steps == 2 * (3 + 3 + 2), "windows of 34, 34 and 32 rows"
    assert equal(second.state_dict(), whole.state_dict())


def test_a_state_of_another_training_is_refused():
    config = config_of("topk")
    training = SaeTraining([fresh(config)], phase(), [config], 3)
    with pytest.raises(ValueError, match="training state is of"):
        SaeTraining([fresh(config)], phase(), [config], 4).load_state_dict(training.state_dict())


def test_saes_that_train_together_learn_what_each_learns_alone():
    kinds = [config_of("topk"), config_of("topk", d_sae=16, k=2), config_of("batch_topk")]
    together = SaeTraining([fresh(c) for c in kinds], phase(), kinds, 0)
    logged: list[list[int]] = [[], [], []]
    together.run([lambda step, metrics, to=to: to.append(step) for to in logged])
    assert all(logged)
    for config, learner in zip(kinds, together.learners, strict=True):
        alone = SaeTraining([fresh(config)], phase(), [config], 0)
        alone.run([lambda step, metrics: None])
        assert equal(alone.learners[0].state_dict(), learner.state_dict())


def test_saes_that_share_a_batch_need_one_batch_size():
    kinds = [config_of("topk"), config_of("topk", batch_size=8)]
    with pytest.raises(ValueError, match=r"one batch_size, got \[8, 16\]"):
        SaeTraining([fresh(c) for c in kinds], phase(), kinds, 0)


def test_a_place_is_that_of_the_next_step():
    config = config_of("topk")
    training = SaeTraining([fresh(config)], phase(), [config], 0)
    assert training.place == Cursor(0)
    training.run([lambda step, metrics: None], max_steps=10)
    assert training.place == Cursor(0, epoch=1, window=0, offset=32), "eight steps an epoch"


def test_a_dictionary_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="d_sae must be a multiple of the 3 workers that split it, got 32"):
        shard_of(fresh(config_of("topk")), 0, 3)


SPLIT_CASES = [(a, split) for a in KINDS for split in ("latents", "rows")]


def split_training(architecture: str, split: str) -> SaeTraining:
    config = config_of(architecture, aux_k=3, dead_after_rows=40, batch_size=33)
    sae = fresh(config)
    # Dead from the start, and of one worker only.
    silence_(sae, 4)
    return SaeTraining([sae], phase(), [config], 0, split=split)


def refuse_what_nccl_refuses() -> None:
    """From here on, collectives of this process take contiguous tensors only; gloo alone takes any."""
    for name in ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor"):
        call = getattr(dist, name)

        def checked(*tensors, call=call, **options):
            given = [t for one in tensors for t in (one if isinstance(one, list) else [one]) if isinstance(t, Tensor)]
            assert all(t.is_contiguous() for t in given), (
                f"NCCL: tensors must be contiguous, got {[t.stride() for t in given]}"
            )
            return call(*tensors, **options)

        setattr(dist, name, checked)


def train_on_rank(rank: int, world: int, folder: str) -> None:
    """What each process of the test below runs: every case, one after the other."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    refuse_what_nccl_refuses()
    found = {}
    for architecture, split in SPLIT_CASES:
        training = split_training(architecture, split)
        losses: list[float] = []
        training.run([lambda step, metrics, to=losses: to.append(metrics["loss"])])
        learner = training.learners[0]
        clock = [torch.empty_like(learner.rows_since_fired) for _ in range(world)]
        dist.all_gather(clock, learner.rows_since_fired)
        found[architecture, split] = (copy.deepcopy(learner.whole().state_dict()), clock, losses)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_that_split_a_step_learn_what_one_does(tmp_path, monkeypatch):
    # Spawned processes import this file by its name from the repository's root.
    monkeypatch.syspath_prepend(str(ROOT))
    mp.spawn(train_on_rank, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for architecture, split in SPLIT_CASES:
        alone = split_training(architecture, split)
        losses: list[float] = []
        alone.run([lambda step, metrics, to=losses: to.append(metrics["loss"])])
        weights, clock, split_losses = ranks[0][architecture, split]
        case = f"{architecture}, {split}"
        assert equal(weights, ranks[1][architecture, split][0]), case
        assert split_losses[-1] == pytest.approx(losses[-1], rel=1e-5), case
        for name, weight in alone.learners[0].sae.state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5, msg=f"{case}: {name}")
        wanted = alone.learners[0].rows_since_fired
        assert torch.equal(torch.cat(clock) if split == "latents" else clock[0], wanted), case
        assert (wanted > 40).any(), "AuxK had work to do"

import copy
import json
import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sarm.evaluate.sae_quality import LatentCounts, count_latents, measure, quality_metrics
from sarm.nn.sae import Codes, standardise
from sarm.nn.topk import TopKSae
from sarm.settings.sae import SaeSettings
from sarm.training.sae import Phase, log_after, train_sae
from sarm.training.sae_learner import Learner

ROOT = Path(__file__).parents[2]
D_IN, D_SAE, K = 16, 32, 2
CONFIG = SaeSettings(d_sae=D_SAE, k=K, batch_size=32)


class MemoryRows:
    """Rows in windows that are the same for every seed and epoch."""

    def __init__(self, x: Tensor, num_windows: int = 2):
        self.num_rows, self._x, self._num_windows = len(x), x, num_windows

    def windows(self, seed, epoch, first=0):
        yield from self._x.chunk(self._num_windows)[first:]


def sparse_rows(num: int, seed: int = 0) -> Tensor:
    """Sums of two of 24 fixed directions with positive weights: what a TopK SAE can represent."""
    directions = torch.randn(24, D_IN, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(num, 24, generator=generator)
    kept = torch.rand(num, 24, generator=generator).topk(2).indices
    return torch.zeros(num, 24).scatter(1, kept, weights.gather(1, kept) + 0.5) @ directions


def phase(num: int = 321, epochs: int = 2, lr: float = 5e-3, name: str = "text") -> Phase:
    return Phase(name, MemoryRows(sparse_rows(num)), sparse_rows(200, seed=1), epochs, lr)


def fresh_sae() -> TopKSae:
    sae = TopKSae(D_IN, D_SAE, K)
    sae.initialise_(standardise(sparse_rows(300)), torch.Generator().manual_seed(0))
    return sae


def trained(seed: int = 0, log=lambda step, metrics: None, **options) -> TopKSae:
    sae = fresh_sae()
    train_sae(sae, phase(**options), CONFIG, seed, log)
    return sae


def test_fvu_on_rows_that_were_never_trained_on_falls():
    before = measure(fresh_sae(), phase().heldout).fvu
    after = measure(trained(num=2000, epochs=10), phase().heldout).fvu
    assert after < 0.25 * before


def test_the_same_seed_gives_the_same_weights_bit_for_bit():
    first, second, other = trained(0), trained(0), trained(1)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
    assert not torch.equal(first.W_dec, other.W_dec)


def test_all_four_parameters_are_trained_and_decoder_rows_keep_unit_norm():
    before, after = fresh_sae(), trained()
    for name, parameter in before.named_parameters():
        assert not torch.equal(parameter, after.get_parameter(name)), name
    torch.testing.assert_close(after.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=0, atol=1e-6)


def test_no_step_sees_a_held_out_row():
    """The heldout rows are measured alone: other ones change what is logged, not what is learnt."""
    first, second = fresh_sae(), fresh_sae()
    for sae, heldout_seed in ((first, 1), (second, 2)):
        train_sae(
            sae,
            Phase("text", MemoryRows(sparse_rows(100)), sparse_rows(50, heldout_seed), 1, 1e-3),
            CONFIG,
            0,
            lambda step, metrics: None,
        )
    assert torch.equal(first.W_dec, second.W_dec)


def test_each_row_is_seen_once_an_epoch_and_progress_ends_at_1(monkeypatch):
    seen: list[Tensor] = []
    sae = fresh_sae()
    logged = []
    step = Learner.step

    def watch(self, x, lr, num_all_rows):
        assert num_all_rows == len(x), "there is one worker"
        seen.append(x.clone())
        return step(self, x, lr, num_all_rows)

    monkeypatch.setattr(Learner, "step", watch)
    rows = phase(epochs=3)
    train_sae(sae, rows, CONFIG, 0, lambda step, metrics: logged.append((step, metrics)))
    x = torch.cat(seen)
    assert len(x) == 3 * 321
    wanted = standardise(sparse_rows(321))
    for epoch in x.split(321):
        # Sorted by the first value, each row lies on its own.
        torch.testing.assert_close(epoch[epoch[:, 0].argsort()], wanted[wanted[:, 0].argsort()], rtol=0, atol=0)
    assert not torch.equal(x[:321], x[321:642]), "in another order"
    assert max(map(len, seen)) <= CONFIG.batch_size
    assert logged[-1][1]["progress"] == 1


def test_the_log_has_what_mlflow_shows():
    logged = []
    trained(log=lambda step, metrics: logged.append((step, metrics)))
    step, metrics = logged[-1]
    # Two windows of 161 and 160 rows make 6 and 5 steps of at most 32.
    assert step == 2 * (6 + 5)
    assert metrics.keys() == {
        "progress", "loss", "lr", "fvu", "explained_variance", "cosine", "l0", "alive_share", "dead_fraction", "dead_by_clock"
    }  # fmt: skip
    assert 0 < metrics["l0"] <= K
    json.dumps(metrics, allow_nan=False)


def test_a_second_phase_counts_its_steps_from_the_first():
    logged = []
    train_sae(fresh_sae(), phase(), CONFIG, 0, lambda step, metrics: logged.append(step), first_step=100)
    assert logged[-1] == 122


def test_one_step_is_adams_on_the_normalised_error_at_the_rate_of_the_steps_middle():
    sae, x, logged = fresh_sae(), sparse_rows(64), []
    before = copy.deepcopy(sae)
    config = SaeSettings(d_sae=D_SAE, k=K, batch_size=64, warmup_share=0.0, decay_share=1.0)
    one_step = Phase("text", MemoryRows(x, num_windows=1), x, 1, 1e-3)
    train_sae(sae, one_step, config, 0, lambda step, metrics: logged.append(metrics))
    rows = standardise(x)
    losses = (before.decode(before(rows)) - rows).square().sum(1) / rows.square().sum(1)
    assert logged[0]["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert logged[0]["lr"] == pytest.approx(0.5e-3), "half-way down the decay"
    losses.mean().backward()
    gradient = before.b_enc.grad
    # Adam's first step: the rate times the gradient over its own size.
    torch.testing.assert_close(
        sae.b_enc - before.b_enc, -0.5e-3 * gradient / (gradient.abs() + 1e-8), rtol=1e-4, atol=0
    )
    # The decoder's gradient first loses what is parallel to its rows, and the rows are normalised afterwards.
    W_dec, gradient = before.W_dec.detach(), before.W_dec.grad
    gradient = gradient - (gradient * W_dec).sum(1, keepdim=True) * W_dec
    wanted = torch.nn.functional.normalize(W_dec - 0.5e-3 * gradient / (gradient.abs() + 1e-8))
    torch.testing.assert_close(sae.W_dec.detach(), wanted, rtol=0, atol=1e-6)


def train_on_rank(rank: int, world: int, folder: str, num: int) -> None:
    """What each process of the test below runs."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    logged = []
    sae = fresh_sae()
    train_sae(sae, phase(num=num), CONFIG, 0, lambda step, metrics: logged.append(step))
    torch.save({"weights": sae.state_dict(), "logged": logged}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_learn_what_one_does(tmp_path, monkeypatch):
    # Spawned processes import this file by its name from the repository's root.
    monkeypatch.syspath_prepend(str(ROOT))
    # The last step of the first window has a single row, so that one rank has none.
    num = 2 * (5 * 32 + 1)
    mp.spawn(train_on_rank, (2, str(tmp_path), num), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, weight in trained(num=num).state_dict().items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        torch.testing.assert_close(ranks[0]["weights"][name], weight, rtol=0, atol=1e-5)
    assert ranks[0]["logged"]
    assert ranks[1]["logged"] == [], "one of them logs"


def test_latent_counts_match_hand_numbers():
    counts = LatentCounts(4)
    counts.add(Codes(torch.tensor([[3.0, 1.0], [2.0, 0.0]]), torch.tensor([[1, 0], [1, 2]])))
    counts.add(Codes(torch.tensor([[5.0, 0.5]]), torch.tensor([[0, 1]])))
    assert counts.num_rows == 3
    assert counts.fired.tolist() == [2, 3, 0, 0], "a latent of value 0 did not fire"
    assert counts.total.tolist() == [6.0, 5.5, 0, 0]
    assert counts.peak.tolist() == [5.0, 3.0, 0, 0]
    assert counts.alive_share() == 0.5
    assert counts.l0() == pytest.approx(5 / 3)


def test_counts_of_two_workers_add_up_to_those_of_one():
    sae, x = fresh_sae(), sparse_rows(50)
    alone, first, second = (count_latents(sae, [part]) for part in (x, x[:19], x[19:]))
    both = first + second
    assert both.num_rows == alone.num_rows == 50
    assert torch.equal(both.fired, alone.fired)
    assert torch.equal(both.peak, alone.peak)
    torch.testing.assert_close(both.total, alone.total, rtol=1e-12, atol=0)
    assert second.num_rows == 31, "adding leaves the parts as they are"


def test_a_worker_that_others_wait_for_measures_for_a_fiftieth_of_the_time():
    assert log_after(10.0, 10.8, num_workers=1) == 12.8
    assert log_after(10.0, 10.8, num_workers=2) == pytest.approx(10.0 + 50 * 0.8)
    assert log_after(10.0, 10.001, num_workers=2) == 12.001, "not more often than alone"


def test_latents_of_either_sign_are_counted_by_their_size():
    counts = LatentCounts(3)
    counts.add(Codes(torch.tensor([[-3.0, 1.0], [2.0, -0.5]]), torch.tensor([[1, 0], [1, 0]])))
    assert counts.fired.tolist() == [2, 2, 0]
    assert counts.total.tolist() == [0.5, -1.0, 0]
    assert counts.peak.tolist() == [1.0, 3.0, 0]


def test_measuring_does_not_depend_on_the_chunk():
    sae, x = fresh_sae(), sparse_rows(50)
    whole, parts = measure(sae, x), measure(sae, x, chunk=7)
    assert parts.fvu == pytest.approx(whole.fvu, rel=1e-9)
    assert torch.equal(parts.counts.fired, whole.counts.fired)


@pytest.mark.filterwarnings("ignore:std_mean")
def test_fvu_is_left_out_of_the_metrics_where_nothing_is_held_out():
    quality = measure(fresh_sae(), sparse_rows(1)[:0])
    assert quality.fvu is None
    assert quality_metrics(quality).keys() == {"l0", "alive_share", "dead_fraction"}


def test_density_and_its_histogram_match_hand_numbers():
    counts = LatentCounts(4)
    fires = torch.zeros(100, 4)
    fires[:, 0] = fires[:10, 1] = fires[:1, 2] = 1.0
    counts.add(Codes(fires, torch.arange(4).expand(100, 4)))
    torch.testing.assert_close(counts.density(), torch.tensor([1, 0.1, 0.01, 0]).double())
    edges, latents = counts.density_histogram(decades=2, bins_per_decade=1)
    assert edges == [-2, -1, 0]
    assert latents == [1, 2], "1 in 100; 1 in 10 and always; the dead one in no bin"
    assert sum(LatentCounts(4).density_histogram()[1]) == 0


def test_metrics_are_of_one_definition():
    sae, h = fresh_sae(), sparse_rows(50)
    x = standardise(h)
    x_hat = sae.decode(sae(x)).detach()
    quality = measure(sae, h)
    metrics = quality_metrics(quality)
    assert metrics["explained_variance"] == pytest.approx(1 - metrics["fvu"])
    assert metrics["fvu"] == pytest.approx(float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()), rel=1e-5)
    cosines = (x * x_hat).sum(1) / x.norm(dim=1) / x_hat.norm(dim=1)
    assert metrics["cosine"] == pytest.approx(float(cosines.mean()), rel=1e-5)


def test_rows_are_read_one_batch_ahead_and_measuring_waits_as_log_after_says(monkeypatch):
    threads: set[str] = set()

    class Noted(MemoryRows):
        def windows(self, seed, epoch, first=0):
            threads.add(threading.current_thread().name)
            return super().windows(seed, epoch, first)

    asked: list[int] = []

    def never(began: float, ended: float, num_workers: int) -> float:
        assert began <= ended
        asked.append(num_workers)
        return ended + 1e9

    monkeypatch.setattr("sarm.training.sae.log_after", never)
    steps: list[int] = []
    own = Phase("text", Noted(sparse_rows(321)), sparse_rows(200, seed=1), 2, 5e-3)
    train_sae(fresh_sae(), own, CONFIG, 0, lambda step, metrics: steps.append(step))
    assert threads
    assert all(name.startswith("ahead") for name in threads)
    # The first step and the last: between them it is not yet time.
    assert asked == [1, 1]
    assert (steps[0], len(steps)) == (1, 2)

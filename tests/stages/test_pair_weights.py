"""What pairs weigh in sharded training, against a loop over single pairs; and the accuracy that training reports of itself."""

import gc
import math
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sarm.data.tokens.chat import Tokens
from sarm.data.tokens.groups import PairOfGroup, PromptGroup
from sarm.engine.deepspeed.zero import ZeroEngine
from sarm.nn.losses import bradley_terry
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import load_backbone
from sarm.nn.topk import TopKSae
from sarm.settings.reward import RewardSettings
from sarm.stages.train_reward_worker import last_epoch_accuracy
from sarm.training.reward import RewardTraining, parameter_groups
from sarm.training.reward_batches import cut_into_steps
from sarm.training.reward_engine import LocalEngine
from sarm.training.schedule import warmup_cosine

ROW_TOKENS, END, WORLD = 64, 1, 2
CONFIG = {"lr": 1e-3, "head_lr": 1e-2, "epochs": 2, "batch_pairs": 6, "batch_tokens": 64, "max_grad_norm": 15.0}
WEIGHTS = ("equal", "step")
# (ZeRO stage, rule): clipping is DeepSpeed's from stage 1 on.
TRAININGS = [(0, "equal"), (1, "equal"), (2, "equal"), (3, "equal"), (0, "step"), (2, "step")]
# Penalties that make the head sparse and keep latents from firing always: they know neither workers nor shards.
PENALISED = {"head_l1": 0.05, "dense_weight": 0.5, "epochs": 6, "lr": 2e-4}
TRAININGS += [(stage, "penalised") for stage in (0, 1, 2, 3)]


def settings(rule: str, stage: int = 2) -> RewardSettings:
    own = PENALISED if rule == "penalised" else {"pair_weights": rule}
    return RewardSettings(**{**CONFIG, **own}, zero_stage=stage)


def untrained(folder: Path) -> SarmForSequenceClassification:
    backbone = load_backbone(str(folder), 2)
    generator = torch.Generator().manual_seed(5)
    sae = TopKSae(64, 96, 8)
    sae.initialise_(torch.randn(200, 64, generator=generator), generator)
    config = SarmConfig(backbone=backbone.config.to_dict(), layer=2, d_sae=96, k=8, end_of_turn_id=END)
    model = SarmForSequenceClassification(config, backbone, sae)
    torch.nn.init.normal_(model.score.weight, std=0.3, generator=generator)
    return model.train()


def prompts() -> list[PromptGroup]:
    """Eight prompts of one to nine pairs: steps of very different sizes."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 90, (count,), generator=generator).tolist()

    groups = []
    for g, count in enumerate((9, 1, 2, 1, 5, 1, 7, 3)):
        prompt = ids(4 + g)
        answers = [[*prompt, *ids(3 + a), END] for a in range(4)]
        places = [(i, j) for i in range(4) for j in range(4) if i != j][:count]
        pairs = [PairOfGroup(f"{g}-{i}-{j}", i, j, 0.3 if i else None, None) for i, j in places]
        groups.append(PromptGroup(f"g{g}", ["a"] * 4, [Tokens(answer, 0) for answer in answers], pairs))
    return groups


def one_pair_at_a_time(folder: Path, config: RewardSettings) -> tuple[list[float], dict[str, torch.Tensor], list[int]]:
    """Norms, last weights and sizes of steps of a training that knows neither packing, micro-batches nor workers."""
    model, groups = untrained(folder), prompts()
    to_train = parameter_groups(model, config)
    parameters = [p for group in to_train for p in group["params"]]
    optimizer, rates = torch.optim.AdamW(to_train), [group["lr"] for group in to_train]
    total, seen, norms, sizes = config.epochs * sum(len(group.pairs) for group in groups), 0, [], []
    for epoch in range(config.epochs):
        for step in cut_into_steps(groups, config.batch_pairs, 0, epoch):
            size = sum(len(group.pairs) for group in step)
            scale = config.batch_pairs if config.pair_weights == "equal" else size
            for group in step:
                for pair in group.pairs:
                    chosen, rejected = (
                        model(input_ids=torch.tensor([group.tokens[i].ids])).logits[0]
                        for i in (pair.chosen, pair.rejected)
                    )
                    (bradley_terry(chosen - rejected - (pair.margin or 0.0)).sum() / scale).backward()
            norms.append(
                float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm * size / scale)) * scale / size
            )
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * warmup_cosine((seen + size / 2) / total, config.warmup_share)
            optimizer.step()
            optimizer.zero_grad()
            seen += size
            sizes.append(size)
    return norms, {name: p.detach().clone() for name, p in model.named_parameters()}, sizes


def live_bytes() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def sharded(rank: int, port: int, folder: str, out: str) -> None:
    """One of the workers: every stage and both ways to weigh, one after the other; rank 0 leaves what came out."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ.update(place | {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for stage, weights in TRAININGS:
        before = live_bytes()
        config = settings(weights, stage)
        model, norms = untrained(Path(folder)), []
        engine = ZeroEngine(model, parameter_groups(model, config), config, torch.device("cpu"))
        training = RewardTraining(engine, prompts(), config, 0, ROW_TOKENS, END, d_sae=96)
        training.run(lambda _, metrics, norms=norms: norms.append(metrics["grad_norm"]))
        whole = engine.whole_state()
        size, held = sum(weight.nbytes for weight in whole.values()), live_bytes()
        engine.free_()
        found[stage, weights] = norms, whole, size, held - before, live_bytes() - before
        del model, engine, training
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_workers(tiny_folder, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("sharded") / "found.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(sharded, (port, str(tiny_folder), str(out)), nprocs=WORLD)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_sharded_training_weighs_pairs_as_a_loop_over_single_pairs_does(on_two_workers, tiny_folder, weights):
    norms, wanted, sizes = one_pair_at_a_time(tiny_folder, RewardSettings(**CONFIG, pair_weights=weights))
    assert max(sizes) >= 3 * min(sizes)
    assert min(norms) < CONFIG["max_grad_norm"] < max(norms), "some steps are clipped and some are not"
    for stage in (stage for stage, rule in TRAININGS if rule == weights):
        found_norms, found, *_ = on_two_workers[stage, weights]
        assert found_norms == pytest.approx(norms, rel=2e-3), f"stage {stage}"
        for name, weight in wanted.items():
            # Adam turns the rounding of a gradient near zero into a step of either sign.
            torch.testing.assert_close(
                found[name], weight, rtol=0, atol=2e-4, msg=lambda m, n=name, s=stage: f"{s} {n}: {m}"
            )


def test_penalties_are_the_same_on_shards_as_in_one_process(on_two_workers, tiny_folder):
    config, model = settings("penalised"), untrained(tiny_folder)
    engine = LocalEngine(model, parameter_groups(model, config), config.max_grad_norm)
    training = RewardTraining(engine, prompts(), config, 0, ROW_TOKENS, END, d_sae=96)
    training.run(lambda *_: None)
    assert training.state_dict()["firing"]["num_seen"] > 128, "the penalty on dense latents has begun"
    wanted = model.score.weight.detach()
    assert 0 < int((wanted == 0).sum()) < wanted.numel()
    for stage in range(4):
        _, found, *_ = on_two_workers[stage, "penalised"]
        for name, weight in model.named_parameters():
            torch.testing.assert_close(
                found[name], weight.detach(), rtol=0, atol=2e-4, msg=lambda m, n=name, s=stage: f"{s} {n}: {m}"
            )
        assert torch.equal(found["score.weight"] == 0, wanted == 0), stage
    plain = on_two_workers[2, "equal"][1]["score.weight"]
    assert not (plain == 0).any()


def test_the_two_ways_to_weigh_are_two_trainings(on_two_workers):
    equal, step = (on_two_workers[0, weights][1]["score.weight"] for weights in WEIGHTS)
    assert (equal - step).abs().max() > 1e-3


def steps(*entries: tuple[float, int, float]) -> list[dict[str, float]]:
    return [{"epoch": epoch, "pairs": pairs, "accuracy": accuracy} for epoch, pairs, accuracy in entries]


def test_the_training_accuracy_counts_every_pair_of_the_last_epoch_once():
    whole = steps((0.5, 10, 0.1), (1.0, 10, 0.2), (1.9, 18, 0.5), (2.0, 2, 1.0))
    assert last_epoch_accuracy(whole) == pytest.approx((18 * 0.5 + 2 * 1.0) / 20)


def test_after_early_stopping_the_training_accuracy_is_of_what_was_trained():
    stopped = steps((0.5, 10, 0.9), (1.0, 10, 0.95), (1.5, 10, 0.96))
    assert last_epoch_accuracy(stopped) == pytest.approx(0.96), (
        "training was to take three epochs and stopped in the second"
    )
    assert last_epoch_accuracy(stopped[:2]) == pytest.approx((0.9 + 0.95) / 2)
    assert last_epoch_accuracy([]) is None
    assert math.isclose(last_epoch_accuracy(steps((0.1, 1, 1.0))), 1.0)


@pytest.mark.parametrize(("stage", "weights"), TRAININGS)
def test_an_engine_that_is_freed_holds_nothing_beside_the_model_that_is_written(on_two_workers, stage, weights):
    """What is left is the whole state, which is in host memory, and crumbs."""
    _, _, size, held, left = on_two_workers[stage, weights]
    assert held > 2 * size, "it held weights and moments"
    assert left < 1.1 * size

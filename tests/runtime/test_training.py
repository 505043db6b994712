"""Real Ray Train workers with real DeepSpeed engines, compared with one plain process."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from sarm.config import Pipeline, Reward, Run, Sae
from sarm.data.artifacts import load_sae
from sarm.data.chat import load_chat_tokenizer
from sarm.data.groups import prompt_groups
from sarm.data.models import model_folder
from sarm.runtime.cluster import Cluster
from sarm.runtime.reward_training import RewardTask, build_model, load_pairs, reward_worker
from sarm.runtime.reward_training import train_on_cluster as train_reward_on_cluster
from sarm.runtime.sae_training import SaeTask
from sarm.runtime.sae_training import train_on_cluster as train_sae_on_cluster
from sarm.runtime.tracking import StageRun, Tracker
from sarm.runtime.trainer import run_workers
from sarm.train.reward import LocalEngine, parameter_groups, train_reward

CLUSTER = Cluster(num_nodes=1, num_cpus=6, num_gpus=0, is_local=False)


@pytest.fixture(scope="module")
def tracking(extracted: Path) -> StageRun:
    return Tracker(Run(out=extracted), "training").parent


def train_sae(extracted: Path, folder: Path, tracking: StageRun, sae: Sae, num_workers: int) -> dict:
    folder.mkdir()
    run = Run(out=extracted, num_workers=num_workers, cpus_per_worker=1)
    chat, text = extracted / "activations" / "chat", extracted / "activations" / "text"
    return train_sae_on_cluster(SaeTask(run, sae, text, chat, folder, tracking), CLUSTER)


@pytest.fixture(scope="module")
def sae_folder(extracted: Path, tmp_path_factory: pytest.TempPathFactory, tracking: StageRun, preset: Pipeline) -> Path:
    folder = tmp_path_factory.mktemp("sae") / "one"
    result = train_sae(extracted, folder, tracking, preset.sae, 1)
    assert result["figures"]["fvu_chat"] < 1
    return folder


def test_two_sae_workers_learn_what_one_learns(
    extracted: Path, sae_folder: Path, tmp_path: Path, tracking: StageRun, preset: Pipeline
) -> None:
    train_sae(extracted, tmp_path / "two", tracking, preset.sae, 2)
    one, two = load_sae(sae_folder)[0], load_sae(tmp_path / "two")[0]
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=name)


def test_two_workers_that_split_a_dictionary_with_thresholds_learn_what_one_learns(
    extracted: Path, tmp_path: Path, tracking: StageRun, preset: Pipeline
) -> None:
    from dataclasses import replace

    sae = replace(
        preset.sae,
        architecture="matryoshka",
        split="latents",
        aux_k=8,
        dead_after_rows=200,
        text_epochs=1,
        chat_epochs=1,
    )
    results = [train_sae(extracted, tmp_path / str(num), tracking, sae, num) for num in (1, 2)]
    one, two = (load_sae(tmp_path / str(num))[0].state_dict() for num in (1, 2))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=2e-4, msg=name)
    assert two["threshold"].unique().numel() == 1
    assert results[0]["figures"]["fvu_chat"] == pytest.approx(results[1]["figures"]["fvu_chat"], rel=1e-3)


def reward_task(
    extracted: Path, sae: Path, folder: Path, tracking: StageRun, preset: Pipeline, reward: Reward, workers: int
) -> RewardTask:
    run = Run(out=extracted, num_workers=workers, cpus_per_worker=1)
    return RewardTask(
        run, preset.model, model_folder(preset.model), reward, extracted / "pairs", sae, None, folder, tracking
    )


REWARD = Reward(lr=1e-3, head_lr=1e-2, epochs=1, batch_pairs=16, batch_tokens=512)


@pytest.fixture(scope="module")
def reference(
    extracted: Path, sae_folder: Path, tracking: StageRun, preset: Pipeline
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of the same training in one process without Ray or DeepSpeed."""
    task = reward_task(extracted, sae_folder, extracted, tracking, preset, REWARD, 1)
    chat = load_chat_tokenizer(preset.model, task.model_folder)
    groups = list(prompt_groups(load_pairs(task.pairs, "train"), chat))
    model = build_model(task, chat).train()
    losses: list[float] = []
    engine = LocalEngine(model, parameter_groups(model, REWARD), REWARD.max_grad_norm)
    train_reward(engine, groups, REWARD, 0, preset.model.max_length, chat.pad_id, lambda _, m: losses.append(m["loss"]))
    return losses, copy.deepcopy(model.state_dict())


def train_one_after_another(tasks: list[RewardTask]) -> list[Any]:
    """Several trainings in one group of workers, since starting a group costs more than they do."""
    return [reward_worker(task) for task in tasks]


@pytest.fixture(scope="module")
def sharded(
    extracted: Path,
    sae_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tracking: StageRun,
    preset: Pipeline,
) -> dict[int, tuple[list[float], dict[str, torch.Tensor]]]:
    """Losses and weights by ZeRO stage: 0 on one worker, 1 to 3 on two."""
    # Workers cannot import this module by name.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folders = {stage: tmp_path_factory.mktemp(f"zero{stage}") for stage in range(4)}
    found = {}
    for workers, stages in ((1, [0]), (2, [1, 2, 3])):
        rewards = [replace(REWARD, zero_stage=stage) for stage in stages]
        tasks = [
            reward_task(extracted, sae_folder, folders[reward.zero_stage], tracking, preset, reward, workers)
            for reward in rewards
        ]
        results = run_workers(
            "zero", train_one_after_another, tasks, tasks[0].run, folders[stages[0]] / "run", CLUSTER, 1
        )
        for stage, result in zip(stages, results, strict=True):
            losses = [entry["loss"] for entry in result["history"]]
            found[stage] = losses, load_file(folders[stage] / "model.safetensors")
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_trains_as_one_plain_process_does(
    stage: int,
    sharded: dict[int, tuple[list[float], dict[str, torch.Tensor]]],
    reference: tuple[list[float], dict[str, torch.Tensor]],
) -> None:
    losses, weights = reference
    found, trained = sharded[stage]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=0, atol=1e-5)
    frozen = {"sae.W_enc", "sae.b_enc", "sae.W_dec", "sae.b_dec", "model.embed_tokens.weight"}
    for name, weight in trained.items():
        if name in frozen:
            assert torch.equal(weight, weights[name]), name
        else:
            # Adam turns the rounding of a gradient near zero into a step of either sign, hence not tighter than the rate.
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=2e-4, msg=name)
    assert trained["score.weight"].abs().max() > 0


def test_a_worker_s_error_comes_back_as_itself(
    extracted: Path, sae_folder: Path, tmp_path: Path, tracking: StageRun, preset: Pipeline
) -> None:
    task = reward_task(extracted, tmp_path / "no_such_sae", tmp_path, tracking, preset, REWARD, 1)
    with pytest.raises(ValueError, match="not a readable SAE"):
        train_reward_on_cluster(task, CLUSTER)

"""Real Ray Train workers with real DeepSpeed engines, compared with one plain process."""

import copy
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sarm.config import Pipeline, Reward, Run, Sae, identity
from sarm.data.artifacts import load_sae
from sarm.data.chat import load_chat_tokenizer
from sarm.data.checkpoints import Checkpoints
from sarm.data.groups import prompt_groups
from sarm.data.models import model_folder
from sarm.runtime.cluster import Cluster
from sarm.runtime.reward_training import RewardTask, build_model, load_pairs
from sarm.runtime.reward_training import train_on_cluster as train_reward_on_cluster
from sarm.runtime.sae_training import SaeTask, sae_worker
from sarm.runtime.sae_training import train_on_cluster as train_sae_on_cluster
from sarm.runtime.tracking import StageRun, Tracker
from sarm.runtime.trainer import run_workers
from sarm.train.reward import LocalEngine, parameter_groups, train_reward
from sarm.train.sae import SaeTraining

CLUSTER = Cluster(num_nodes=1, num_cpus=6, num_gpus=0, is_local=False)


@pytest.fixture(scope="module")
def tracking(extracted: Path) -> StageRun:
    return Tracker(Run(out=extracted), "training").parent


def sae_task(extracted: Path, folder: Path, tracking: StageRun, sae: Sae, num_workers: int) -> SaeTask:
    run = Run(out=extracted, num_workers=num_workers, cpus_per_worker=1)
    chat, text = extracted / "activations" / "chat", extracted / "activations" / "text"
    states = Checkpoints(folder.with_name(f"{folder.name}_states"), {"sae": identity(sae)})
    return SaeTask(run, sae, text, chat, folder, tracking, states)


def train_sae(extracted: Path, folder: Path, tracking: StageRun, sae: Sae, num_workers: int) -> dict:
    folder.mkdir()
    result = train_sae_on_cluster(sae_task(extracted, folder, tracking, sae, num_workers), CLUSTER)
    (folder / "result.json").write_text(json.dumps(result))
    return result


@pytest.fixture(scope="module")
def sae_folder(extracted: Path, tmp_path_factory: pytest.TempPathFactory, tracking: StageRun, preset: Pipeline) -> Path:
    folder = tmp_path_factory.mktemp("sae") / "one"
    result = train_sae(extracted, folder, tracking, preset.sae, 1)
    assert result["figures"]["fvu_chat"] < 1
    return folder


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


def worker_that_is_killed(task: SaeTask) -> None:
    """`sae_worker` whose process gets SIGKILL in the second phase, five steps after it saved, as if its machine had gone."""
    run = SaeTraining.run

    def run_until_killed(self, logs, max_steps=None, after_step=lambda: None):
        def after():
            after_step()
            if self._phase.name == "chat" and self.place.epoch >= 2 and self.num_steps % SAVE_EVERY == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        run(self, logs, max_steps, after)

    SaeTraining.run = run_until_killed  # type: ignore[method-assign]
    sae_worker(task)


SAVE_EVERY = 8


@pytest.fixture(scope="module")
def killed(extracted: Path, tmp_path_factory: pytest.TempPathFactory, tracking: StageRun, preset: Pipeline) -> Path:
    """The folder of a training whose only worker was killed, with the states that it left."""
    from dataclasses import replace

    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder = tmp_path_factory.mktemp("killed") / "one"
    folder.mkdir()
    task = sae_task(extracted, folder, tracking, replace(preset.sae, checkpoint_every_steps=SAVE_EVERY), 1)
    with pytest.raises(Exception, match="worker"):
        run_workers("sae", worker_that_is_killed, task, task.run, folder, CLUSTER, 1)
    assert not (folder / "cfg.json").exists()
    return folder


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_sae_training_that_is_run_again_ends_as_if_it_had_not_been(
    extracted: Path,
    sae_folder: Path,
    killed: Path,
    tmp_path: Path,
    tracking: StageRun,
    preset: Pipeline,
    num_workers: int,
) -> None:
    states = tmp_path / "again_states"
    shutil.copytree(killed.with_name("one_states"), states)
    assert len(list(states.glob("step-*"))) == 2
    result = train_sae(extracted, tmp_path / "again", tracking, preset.sae, num_workers)
    whole, again = load_sae(sae_folder)[0], load_sae(tmp_path / "again")[0]
    for name, weight in whole.named_parameters():
        if num_workers == 1:
            assert torch.equal(again.get_parameter(name), weight), name
        else:
            torch.testing.assert_close(again.get_parameter(name), weight, rtol=0, atol=1e-6, msg=name)
    last = result["history"]["chat"][-1]
    wanted = json.loads((sae_folder / "result.json").read_text())["history"]["chat"][-1]
    assert last["step"] == wanted["step"]
    assert (
        last["loss"] == wanted["loss"] if num_workers == 1 else last["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
    )


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


@pytest.mark.parametrize(("stage", "workers"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_zero_trains_as_one_plain_process_does(
    stage: int,
    workers: int,
    extracted: Path,
    sae_folder: Path,
    tmp_path: Path,
    tracking: StageRun,
    preset: Pipeline,
    reference: tuple[list[float], dict[str, torch.Tensor]],
) -> None:
    from dataclasses import replace

    folder = tmp_path / "sarm"
    folder.mkdir()
    task = reward_task(extracted, sae_folder, folder, tracking, preset, replace(REWARD, zero_stage=stage), workers)
    result = train_reward_on_cluster(task, CLUSTER)
    losses, weights = reference
    torch.testing.assert_close(
        torch.tensor([h["loss"] for h in result["history"]]), torch.tensor(losses), rtol=0, atol=1e-5
    )
    trained = load_file(folder / "model.safetensors")
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

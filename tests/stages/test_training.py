"""Real Ray Train workers with real DeepSpeed engines, compared with one plain process."""

import copy
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from sarm.data.formats.models import model_folder
from sarm.data.formats.sae_folder import load_sae
from sarm.data.store.checkpoints import Checkpoints
from sarm.data.store.pairs import load_pairs
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.data.tokens.groups import prompt_groups
from sarm.engine.mlflow.tracker import Tracker
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.ray.room import Cluster, Node
from sarm.engine.ray.trainer import run_workers
from sarm.settings.checks import StoppedError, UserError
from sarm.settings.identity import identity
from sarm.settings.jobs import Pipeline
from sarm.settings.reward import RewardSettings
from sarm.settings.run import RunSettings
from sarm.settings.sae import SaeSettings
from sarm.stages.reward_models import build_model, merge_adapters_
from sarm.stages.train_reward_worker import RewardTask, reward_worker
from sarm.stages.train_sae_worker import SaeMember, SaeTask, sae_worker
from sarm.training.reward import parameter_groups, train_reward
from sarm.training.reward_engine import LocalEngine
from sarm.training.sae import SaeTraining

CLUSTER = Cluster(nodes=(Node(6),), is_local=False)


@pytest.fixture(scope="module")
def tracking(extracted: Path) -> StageRun:
    return Tracker(RunSettings(out=extracted), "training").parent


def sae_task(extracted: Path, folder: Path, tracking: StageRun, sae: SaeSettings, workers: int) -> SaeTask:
    folder.mkdir()
    run = RunSettings(out=extracted, num_workers=workers, cpus_per_worker=1)
    activations = {name: extracted / "activations" / name for name in ("text", "chat")}
    states = Checkpoints(folder.with_name(f"{folder.name}_states"), {"sae": identity(sae)})
    return SaeTask(run, sae, activations, folder, tracking, states)


def reward_task(
    extracted: Path, sae: Path, folder: Path, tracking: StageRun, preset: Pipeline, reward: RewardSettings, workers: int
) -> RewardTask:
    folder.mkdir(exist_ok=True)
    run = RunSettings(out=extracted, num_workers=workers, cpus_per_worker=1)
    states = Checkpoints(folder.with_name(f"{folder.name}_states"), {"reward": identity(reward)})
    return RewardTask(
        run, preset.model, model_folder(preset.model), reward, extracted / "pairs", sae, None, folder, tracking, states
    )


@pytest.fixture(scope="module")
def undisturbed(
    extracted: Path, tmp_path_factory: pytest.TempPathFactory, tracking: StageRun, preset: Pipeline
) -> tuple[Path, dict[str, Any]]:
    """Folder and result of an SAE trained by one worker."""
    folder = tmp_path_factory.mktemp("sae") / "one"
    result = run_workers(sae_worker, sae_task(extracted, folder, tracking, preset.sae, 1), CLUSTER)
    assert result["figures"]["fvu_chat"] < 1
    return folder, result


@pytest.fixture(scope="module")
def sae_folder(undisturbed: tuple[Path, dict[str, Any]]) -> Path:
    return undisturbed[0]


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


def worker_that_counts(task: SaeTask) -> dict[str, Any] | None:
    """`sae_worker`, and how many steps it took."""
    run, taken = SaeTraining.run, 0

    def counted_run(self, logs, max_steps=None, after_step=lambda: None):
        def after():
            nonlocal taken
            taken += 1
            after_step()

        run(self, logs, max_steps, after)

    SaeTraining.run = counted_run  # type: ignore[method-assign]
    try:
        result = sae_worker(task)
    finally:
        SaeTraining.run = run  # type: ignore[method-assign]
    return result and {**result, "steps_taken": taken}


def worker_that_is_stopped(task: SaeTask) -> dict[str, Any] | None:
    """`sae_worker`, asked to stop whenever it begins, until it is done; how often it stopped is `stops` of the result."""
    stops = 0
    while True:
        task.states.request_stop()
        try:
            result = sae_worker(task)
        except StoppedError:
            stops += 1
        else:
            return result and {**result, "stops": stops}


@pytest.fixture(scope="module")
def killed(extracted: Path, tmp_path_factory: pytest.TempPathFactory, tracking: StageRun, preset: Pipeline) -> Path:
    """What a training whose only worker was killed had saved."""
    # Workers cannot import this module by name.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder = tmp_path_factory.mktemp("killed") / "one"
    task = sae_task(extracted, folder, tracking, replace(preset.sae, checkpoint_every_steps=SAVE_EVERY), 1)
    with pytest.raises(Exception, match="worker"):
        run_workers(worker_that_is_killed, replace(task, run=replace(task.run, max_restarts=0)), CLUSTER)
    assert not (folder / "cfg.json").exists()
    states = folder.with_name("one_states")
    assert len(list(states.glob("step-*"))) == 2
    return states


REWARD = RewardSettings(lr=3e-4, head_lr=5e-3, epochs=3, batch_pairs=16, batch_tokens=512)


# Where weights and moments wait for their turn.
OFFLOADED = {
    "zero 2 offloaded": {"zero_stage": 2, "offload": "optimizer"},
    "zero 3 offloaded": {"zero_stage": 3, "offload": "all"},
}
LORA = replace(REWARD, lora_rank=4, lr=3e-3)
# Every part learns, through every term of the objective.
WHOLE = replace(
    REWARD, train_sae=True, sae_lr=1e-3, recon_weight=1.0, recon_detached=False, label_smoothing=0.1, centre_weight=0.01
)


# How the papers' presets train.
AS_IN_PAPERS = replace(REWARD, zero_stage=3, precision="bfloat16", gradient_checkpointing=True)


class Bfloat16Engine(LocalEngine):
    """The plain loop with its products in bfloat16."""

    def __call__(self, **inputs: Any) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16):
            return super().__call__(**inputs)


def in_one_process(
    extracted: Path,
    sae_folder: Path,
    tracking: StageRun,
    preset: Pipeline,
    reward: RewardSettings,
    engine_type: type[LocalEngine] = LocalEngine,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a training without Ray or DeepSpeed."""
    task = reward_task(extracted, sae_folder, extracted, tracking, preset, reward, 1)
    chat = load_chat_tokenizer(preset.model, task.model_folder)
    groups = list(prompt_groups(load_pairs(task.pairs, "train"), chat))
    model = build_model(task.model, task.model_folder, task.sae, chat, reward, task.run.seed).train()
    losses: list[float] = []
    engine = engine_type(model, parameter_groups(model, reward), reward.max_grad_norm)
    train_reward(engine, groups, reward, 0, preset.model.max_length, chat.pad_id, lambda _, m: losses.append(m["loss"]))
    return losses, copy.deepcopy(merge_adapters_(model).state_dict())


@pytest.fixture(scope="module")
def reference(
    extracted: Path, sae_folder: Path, tracking: StageRun, preset: Pipeline
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What the sharded trainings are compared with."""
    return in_one_process(extracted, sae_folder, tracking, preset, REWARD)


@dataclass(frozen=True)
class Trainings:
    """Several trainings in one group of workers, since starting a group costs more than they do."""

    run: RunSettings
    folder: Path
    trainings: Sequence[tuple[Callable[[Any], Any], Any]] = ()
    states: Checkpoints | None = None
    name: str = "trained"


def one_after_another(task: Trainings) -> list[Any]:
    return [worker(own) for worker, own in task.trainings]


@pytest.fixture(scope="module")
def trained(
    extracted: Path,
    sae_folder: Path,
    killed: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tracking: StageRun,
    preset: Pipeline,
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Folder and result of each training; `rows` and `latents` are how two workers share an SAE's step."""
    root = tmp_path_factory.mktemp("trained")
    nested = replace(
        preset.sae,
        architecture="matryoshka",
        split="latents",
        aux_k=8,
        dead_after_rows=200,
        text_epochs=2,
        chat_epochs=2,
    )
    narrow = replace(preset.sae, d_sae=96, k=5)
    saes = {
        1: {"nested alone": nested, "narrow alone": narrow, "killed, again on 1": preset.sae},
        2: {"rows": preset.sae, "latents": nested, "killed, again on 2": preset.sae},
    }
    for workers in saes:
        shutil.copytree(killed, root / f"killed, again on {workers}_states")
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for workers, stages in ((1, [0]), (2, [1, 2, 3])):
        trainings: dict[str, tuple[Callable[[Any], Any], Any]] = {
            name: (worker_that_counts, sae_task(extracted, root / name, tracking, sae, workers))
            for name, sae in saes[workers].items()
        }
        if workers == 1:
            task = sae_task(extracted, root / "together", tracking, preset.sae, 1)
            also = SaeMember(narrow, task.run.seed, root / "together, narrow", tracking, "narrow")
            trainings["together"] = sae_worker, replace(task, also=(also,))
        for stage in stages:
            reward, folder = replace(REWARD, zero_stage=stage), root / f"zero {stage}"
            task = reward_task(extracted, sae_folder, folder, tracking, preset, reward, workers)
            trainings[folder.name] = reward_worker, task
        if workers == 2:
            task = sae_task(extracted, root / "latents, stopped", tracking, nested, workers)
            trainings["latents, stopped"] = worker_that_is_stopped, task
            special = {name: replace(REWARD, **fields) for name, fields in OFFLOADED.items()}
            special |= {"zero 3 whole": replace(WHOLE, zero_stage=3), "zero 2 adapters": replace(LORA, zero_stage=2)}
            special["as in the papers"] = AS_IN_PAPERS
            for name, reward in special.items():
                task = reward_task(extracted, sae_folder, root / name, tracking, preset, reward, workers)
                trainings[name] = reward_worker, task
        run = RunSettings(out=extracted, num_workers=workers, cpus_per_worker=1)
        together = Trainings(run, root / f"run{workers}", list(trainings.values()))
        results = run_workers(one_after_another, together, CLUSTER)
        found |= {name: (root / name, result) for name, result in zip(trainings, results, strict=True)}
    return found


def test_two_sae_workers_learn_what_one_learns(
    sae_folder: Path, trained: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    one, two = load_sae(sae_folder)[0], load_sae(trained["rows"][0])[0]
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=name)


def test_two_workers_that_split_a_dictionary_with_thresholds_learn_what_one_learns(
    trained: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    (folder_one, result_one), (folder_two, result_two) = trained["nested alone"], trained["latents"]
    one, two = load_sae(folder_one)[0].state_dict(), load_sae(folder_two)[0].state_dict()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=2e-4, msg=name)
    assert two["threshold"].unique().numel() == 1
    assert result_one["figures"]["fvu_chat"] == pytest.approx(result_two["figures"]["fvu_chat"], rel=1e-3)


def test_a_split_dictionary_that_is_stopped_and_continued_ends_as_if_it_had_not_been(
    trained: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    (folder, wanted), (stopped, result) = trained["latents"], trained["latents, stopped"]
    assert result["stops"] >= 2
    weights, again = load_sae(folder)[0].state_dict(), load_sae(stopped)[0].state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    for phase, history in wanted["history"].items():
        (last, expected) = (one[-1] for one in (result["history"][phase], history))
        assert (last["step"], last["loss"]) == (expected["step"], expected["loss"])
    assert result["figures"] == wanted["figures"]


def test_saes_that_learn_from_one_read_learn_what_each_learns_alone(
    undisturbed: tuple[Path, dict[str, Any]], trained: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    (alone, wanted), (narrow_alone, narrow_wanted) = undisturbed, trained["narrow alone"]
    folder, result = trained["together"]
    for one, other in ((alone, folder), (narrow_alone, folder.with_name("together, narrow"))):
        weights, others = load_sae(one)[0].state_dict(), load_sae(other)[0].state_dict()
        assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert result["figures"] == wanted["figures"]
    assert [also["figures"] for also in result["also"]] == [narrow_wanted["figures"]]


def test_saes_that_need_other_rows_cannot_learn_together(
    extracted: Path, tmp_path: Path, tracking: StageRun, preset: Pipeline
) -> None:
    task = sae_task(extracted, tmp_path / "one", tracking, preset.sae, 1)
    with pytest.raises(UserError, match="one batch_size, got 64 and 32"):
        replace(task, also=(SaeMember(replace(preset.sae, batch_size=32), 0, tmp_path / "two", tracking),))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_sae_training_that_is_run_again_ends_as_if_it_had_not_been(
    workers: int,
    undisturbed: tuple[Path, dict[str, Any]],
    killed: Path,
    trained: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    (folder, wanted), (folder_again, result) = undisturbed, trained[f"killed, again on {workers}"]
    whole, again = load_sae(folder)[0], load_sae(folder_again)[0]
    tolerance = 0 if workers == 1 else 1e-6
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), weight, rtol=0, atol=tolerance, msg=name)
    last, wanted_last = result["history"]["chat"][-1], wanted["history"]["chat"][-1]
    assert last["step"] == wanted_last["step"]
    saved = max(int(path.name.removeprefix("step-")) for path in killed.glob("step-*"))
    assert result["steps_taken"] == last["step"] - saved, "what was done is not done again"
    assert last["loss"] == pytest.approx(wanted_last["loss"], rel=0, abs=tolerance)


@pytest.mark.parametrize("name", [*(f"zero {stage}" for stage in range(4)), *OFFLOADED])
def test_zero_trains_as_one_plain_process_does(
    name: str,
    trained: dict[str, tuple[Path, dict[str, Any]]],
    reference: tuple[list[float], dict[str, torch.Tensor]],
) -> None:
    losses, weights = reference
    folder, result = trained[name]
    assert len(losses) >= 20
    found = [entry["loss"] for entry in result["history"]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=0, atol=1e-5)
    frozen = {"sae.W_enc", "sae.b_enc", "sae.W_dec", "sae.b_dec", "model.embed_tokens.weight"}
    after = load_file(folder / "model.safetensors")
    for key, weight in after.items():
        if key in frozen:
            assert torch.equal(weight, weights[key]), key
        else:
            # Adam turns the rounding of a gradient near zero into a step of either sign, hence not tighter than the rate.
            torch.testing.assert_close(weight, weights[key], rtol=0, atol=2e-4, msg=key)
    assert after["score.weight"].abs().max() > 0


def learnt_as_in(
    one_process: tuple[list[float], dict[str, torch.Tensor]], sharded: tuple[Path, dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """The weights that a sharded training left, once its losses and they were those of one process."""
    (losses, weights), (folder, result) = one_process, sharded
    found = torch.tensor([entry["loss"] for entry in result["history"]])
    torch.testing.assert_close(found, torch.tensor(losses), rtol=0, atol=1e-5)
    after = load_file(folder / "model.safetensors")
    for key, weight in after.items():
        torch.testing.assert_close(weight, weights[key], rtol=0, atol=2e-4, msg=key)
    return after


def test_sharded_adapters_learn_as_in_one_process_and_leave_plain_weights(
    extracted: Path,
    sae_folder: Path,
    tracking: StageRun,
    preset: Pipeline,
    reference: tuple[list[float], dict[str, torch.Tensor]],
    trained: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    after = learnt_as_in(in_one_process(extracted, sae_folder, tracking, preset, LORA), trained["zero 2 adapters"])
    assert after.keys() == reference[1].keys()


def test_sharded_the_sae_learns_from_the_whole_objective_as_in_one_process(
    extracted: Path,
    sae_folder: Path,
    tracking: StageRun,
    preset: Pipeline,
    trained: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    after = learnt_as_in(in_one_process(extracted, sae_folder, tracking, preset, WHOLE), trained["zero 3 whole"])
    before = load_sae(sae_folder)[0].state_dict()
    assert not any(torch.equal(after[f"sae.{name}"], tensor) for name, tensor in before.items())


def test_bfloat16_with_checkpointing_under_zero_3_trains_as_the_plain_loop_does(
    extracted: Path,
    sae_folder: Path,
    tracking: StageRun,
    preset: Pipeline,
    reference: tuple[list[float], dict[str, torch.Tensor]],
    trained: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    losses, weights = in_one_process(extracted, sae_folder, tracking, preset, AS_IN_PAPERS, Bfloat16Engine)
    folder, result = trained["as in the papers"]
    found = torch.tensor([entry["loss"] for entry in result["history"]])
    plain, exact = torch.tensor(losses), torch.tensor(reference[0])
    rounding = (plain - exact).abs().max()
    assert rounding > 1e-5, "the plain loop rounds too"
    # Sums over two workers are rounded in another order: as far from the plain loop as that is from float32, and no farther than twice that.
    assert (found - plain).abs().max() <= 2 * rounding
    after = load_file(folder / "model.safetensors")
    assert after.keys() == weights.keys()
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    trained_names = [key for key, weight in weights.items() if not torch.equal(weight, reference[1][key])]
    assert "score.weight" in trained_names
    apart = sum((after[key] - weights[key]).square().sum() for key in trained_names)
    rounded = sum((weights[key] - reference[1][key]).square().sum() for key in trained_names)
    assert apart <= 4 * rounded, "twice as far"


def test_a_worker_s_error_comes_back_as_itself(
    extracted: Path, sae_folder: Path, tmp_path: Path, tracking: StageRun, preset: Pipeline
) -> None:
    task = reward_task(extracted, tmp_path / "no_such_sae", tmp_path, tracking, preset, REWARD, 1)
    with pytest.raises(ValueError, match="not a readable SAE"):
        run_workers(reward_worker, task, CLUSTER)


def test_workers_for_whom_there_is_no_room_are_not_waited_for_without_end(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a node has gone for good: the check before the start saw it, and Ray Train would wait for another."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    run = RunSettings(out=tmp_path, num_workers=2, cpus_per_worker=40)
    with pytest.raises(
        TimeoutError, match=r"lost: no room for 2 workers of 40 CPUs each: the cluster has \d+ CPUs and"
    ):
        run_workers(print, Trainings(run, tmp_path, name="lost"), replace(CLUSTER, nodes=(Node(100),)))

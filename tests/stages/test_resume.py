"""Reward trainings that are stopped, killed and continued, on real Ray Train workers with real DeepSpeed engines."""

import contextlib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from sarm.data.formats.models import model_folder
from sarm.data.formats.sae_folder import save_sae
from sarm.data.store.checkpoints import Checkpoint, Checkpoints
from sarm.engine.mlflow.tracker import Tracker
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.ray import stall, training_states
from sarm.engine.ray.room import Cluster, Node
from sarm.engine.ray.trainer import run_workers
from sarm.nn.topk import TopKSae
from sarm.settings.checks import StoppedError
from sarm.settings.jobs import Pipeline
from sarm.settings.reward import RewardSettings
from sarm.settings.run import RunSettings
from sarm.stages.train_reward_worker import RewardTask, reward_worker
from sarm.training.reward import RewardTraining

CLUSTER = Cluster(nodes=(Node(6),), is_local=False)
REWARD = RewardSettings(
    lr=1e-3, head_lr=1e-2, epochs=2, batch_pairs=24, batch_tokens=512, validation_share=0.3, validate_every=2
)
STOP_AT = 3
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Trainings:
    """Several trainings in one group of workers, whose start costs more than they do."""

    run: RunSettings
    folder: Path
    trainings: Sequence[tuple[Callable[[Any], Any], RewardTask]]
    states: Checkpoints | None = None
    name: str = "resume"


def stopped_after_every_step(task: RewardTask) -> dict[str, Any] | None:
    """`reward_worker` in as many processes' lives as there are steps: everything but the states is built anew each time."""
    while True:
        task.states.request_stop()
        try:
            return reward_worker(task)
        except StoppedError:
            continue


def asked_to_stop(task: RewardTask, ask: Callable[[], None]) -> None:
    """`reward_worker`, asked to stop while it takes a step in the middle; raises StoppedError."""
    take = RewardTraining._step

    def step(self, groups):
        if self.num_steps == STOP_AT - 1:
            ask()
        return take(self, groups)

    RewardTraining._step, training_states._SECONDS_BETWEEN_LOOKS = step, 0  # type: ignore[method-assign]
    try:
        reward_worker(task)
    finally:
        RewardTraining._step = take  # type: ignore[method-assign]
        dist.barrier()
        task.states.withdraw_stop()


def stopped_in_the_middle(task: RewardTask) -> None:
    with pytest.raises(StoppedError, match=f"stopped after step {STOP_AT}"):
        asked_to_stop(task, task.states.request_stop)


def stopped_by_sigterm(task: RewardTask) -> None:
    """As a job that gets SIGTERM: the signal goes to the process that started the workers."""

    def ask():
        if dist.get_rank() == 0:
            os.kill(int(task.folder.with_name("driver").read_text()), signal.SIGTERM)
            while not task.states.is_stop_requested():
                time.sleep(0.01)

    asked_to_stop(task, ask)


def killed_then_hung(task: RewardTask) -> dict[str, Any] | None:
    """`reward_worker` on workers of which one gets SIGKILL in the middle of a step, as if its machine had gone, and later one that never ends a step."""
    take, killed, hung = RewardTraining._step, task.folder.with_name("killed"), task.folder.with_name("hung")

    def step(self, groups):
        if self.num_steps == STOP_AT + 1 and self.rank == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.num_steps == STOP_AT + 2 and self.rank == 1 and not hung.exists():
            hung.touch()
            time.sleep(600)
        return take(self, groups)

    RewardTraining._step, stall.NO_PROGRESS_SECONDS = step, 20.0  # type: ignore[method-assign]
    try:
        return reward_worker(task)
    finally:
        RewardTraining._step = take  # type: ignore[method-assign]


def one_after_another(together: Trainings) -> None:
    """Each leaves its result beside its folder."""
    for worker, task in together.trainings:
        result = task.folder.with_name(f"{task.folder.name}.json")
        if not result.exists():
            found = worker(task)
            if dist.get_rank() == 0 and found is not None:
                result.write_text(json.dumps(found))
                task.folder.with_name("precision").write_text(torch.get_float32_matmul_precision())
        dist.barrier()


class Trained:
    """The trainings of this module in one folder, by name."""

    def __init__(self, root: Path, extracted: Path, preset: Pipeline, tracking: StageRun):
        self.root, self._extracted, self._preset, self._tracking = root, extracted, preset, tracking
        self.sae = root / "sae"
        self.sae.mkdir()
        sae = TopKSae(64, 96, 8)
        generator = torch.Generator().manual_seed(0)
        sae.initialise_(torch.randn(200, 64, generator=generator), generator)
        save_sae(sae, self.sae, {"activations": {"model": preset.model.name, "layer": preset.model.layer}})

    def task(self, name: str, stage: int, workers: int, states: str | None = None, **reward: Any) -> RewardTask:
        run = RunSettings(out=self._extracted, num_workers=workers, cpus_per_worker=1)
        (self.root / name).mkdir(exist_ok=True)
        settings = replace(REWARD, zero_stage=stage, **reward)
        return RewardTask(
            run, self._preset.model, model_folder(self._preset.model), settings, self._extracted / "pairs", self.sae, None,
            self.root / name, self._tracking, Checkpoints(self.root / f"{states or name}_states", {"stage": stage}),
        )  # fmt: skip

    def train(
        self, trainings: Sequence[tuple[Callable[[Any], Any], RewardTask]], states: Checkpoints | None = None
    ) -> None:
        together = Trainings(trainings[0][1].run, self.root / "ray", trainings, states)
        run_workers(one_after_another, together, CLUSTER)

    def losses(self, name: str) -> list[float]:
        return [entry["loss"] for entry in self.result(name)["history"]]

    def result(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / f"{name}.json").read_text())

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Of the model that was kept, the best on the validation prompts."""
        return load_file(self.root / name / "model.safetensors")

    def last_state(self, name: str, states: str | None = None) -> Checkpoint:
        found = Checkpoints(self.root / f"{states or name}_states", {"stage": int(name[-1])}).latest()
        assert found is not None
        return found


@pytest.fixture(scope="module")
def trained(extracted: Path, tmp_path_factory: pytest.TempPathFactory, preset: Pipeline) -> Trained:
    # Workers cannot import this module by name.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    found = Trained(
        tmp_path_factory.mktemp("resume"), extracted, preset, Tracker(RunSettings(out=extracted), "resume").parent
    )
    (found.root / "driver").write_text(str(os.getpid()))
    on_two: Trainings = []
    for stage in STAGES:
        on_two.append((reward_worker, found.task(f"whole {stage}", stage, 2)))
        on_two.append((stopped_after_every_step, found.task(f"interrupted {stage}", stage, 2)))
        on_two.append((stopped_in_the_middle, found.task(f"on one {stage}", stage, 2)))
    last = found.task("sigterm 2", 2, 2)
    with pytest.raises(StoppedError, match=f"stopped after step {STOP_AT}"):
        found.train([*on_two, (stopped_by_sigterm, last)], last.states)
    on_one: Trainings = []
    for stage in STAGES:
        on_one.append((reward_worker, found.task(f"on one {stage}", stage, 1)))
        on_one.append((stopped_in_the_middle, found.task(f"on two {stage}", stage, 1)))
    found.train(on_one)
    again: Trainings = [(reward_worker, found.task(f"on two {stage}", stage, 2)) for stage in STAGES]
    killed = found.task("killed 3", 3, 2, checkpoint_every_steps=2)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        found.train([*again, (reward_worker, found.task("sigterm 2", 2, 2)), (killed_then_hung, killed)], killed.states)
    assert (found.root / "killed").exists()
    (found.root / "said").write_text(said.getvalue())
    return found


def states_equal(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether all ranks' weights and moments are the same to the last bit."""
    tensors = [
        {name: load_file(found.folder / f"{name}.safetensors") for name in found.parts if name.startswith("rank")}
        for found in (one, other)
    ]
    return tensors[0].keys() == tensors[1].keys() and all(
        part.keys() == tensors[1][name].keys() and all(torch.equal(t, tensors[1][name][key]) for key, t in part.items())
        for name, part in tensors[0].items()
    )


@pytest.mark.parametrize("name", [*(f"interrupted {stage}" for stage in STAGES), "sigterm 2", "killed 3"])
def test_what_was_interrupted_ends_bit_for_bit_as_if_it_had_not_been(name: str, trained: Trained) -> None:
    whole = f"whole {name[-1]}"
    losses = trained.losses(whole)
    assert len(losses) >= STOP_AT + 3
    assert [loss.hex() for loss in trained.losses(name)] == [loss.hex() for loss in losses]
    weights = trained.weights(whole)
    assert all(torch.equal(weight, weights[key]) for key, weight in trained.weights(name).items())
    last = trained.last_state(name)
    assert last.step == len(losses)
    assert states_equal(last, trained.last_state(whole))


def test_who_died_and_who_stood_still_is_said(trained: Trained) -> None:
    died, stood_still = re.findall(
        r"resume: (.*), starting again from step [2-9]$", (trained.root / "said").read_text(), re.MULTILINE
    )
    assert died == "a worker died"
    assert re.fullmatch(r"worker 1 stood still at test_resume\.py:\d+ in step", stood_still)


def test_workers_let_gpus_multiply_in_tf32(trained: Trained) -> None:
    # What torch calls the leave to use TF32.
    assert (trained.root / "precision").read_text() == "high"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["on one", "on two"])
def test_what_was_saved_by_one_number_of_workers_goes_on_with_another(name: str, stage: int, trained: Trained) -> None:
    wanted = torch.tensor(trained.losses(f"whole {stage}"))
    torch.testing.assert_close(torch.tensor(trained.losses(f"{name} {stage}")), wanted, rtol=0, atol=1e-5)
    weights = trained.weights(f"whole {stage}")
    for key, weight in trained.weights(f"{name} {stage}").items():
        # Adam turns the rounding of a gradient near zero into a step of either sign, hence not tighter than the rate.
        torch.testing.assert_close(weight, weights[key], rtol=0, atol=5e-4, msg=key)

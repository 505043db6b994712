"""What training states cost, and how long a training stands still when a worker dies. Reads a finished demo (`make demo`).

The demo's SARM, one worker, saved after every second step; SIGKILL while it takes the fifth.

    make bench BENCH=resume
"""

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from sarm.data.formats.models import model_folder
from sarm.data.store.checkpoints import Checkpoints
from sarm.engine.mlflow.tracker import Tracker
from sarm.engine.ray.cluster import connect
from sarm.engine.ray.trainer import run_workers
from sarm.settings.presets import PRESETS
from sarm.settings.run import RunSettings
from sarm.stages.train_reward_worker import RewardTask, reward_worker
from sarm.training.reward import RewardTraining

DEMO = Path(os.environ.get("DEMO", "outputs/demo")).absolute()
OUT = Path("outputs/bench/resume.json")
KILLED_AT, LAST, SAVE_EVERY = 5, 8, 2


class Enough(Exception):  # noqa: N818
    """Raised after the last step that is measured."""


def worker(task: RewardTask) -> None:
    """`reward_worker` that notes what happens when, and is killed once."""
    diary, killed = task.folder / "diary.jsonl", task.folder / "killed"

    def note(**what: Any) -> None:
        with diary.open("a") as file:
            file.write(json.dumps({**what, "at": time.time()}) + "\n")

    take, write, commit = RewardTraining._step, Checkpoints.write, Checkpoints._commit

    def step(self, groups):
        if self.num_steps == KILLED_AT - 1 and not killed.exists():
            killed.touch()
            note(killed=self.num_steps)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.num_steps == LAST:
            raise Enough
        started = time.monotonic()
        found = take(self, groups)
        note(step=self.num_steps, seconds=time.monotonic() - started)
        return found

    def timed_write(self, number, parts):
        started, used = time.monotonic(), time.thread_time()
        found = write(self, number, parts)
        note(written=number, seconds=time.monotonic() - started, cpu_seconds=time.thread_time() - used)
        return found

    def sized_commit(self, number, pending, files):
        size = sum((pending / name).stat().st_size for name in files)
        commit(self, number, pending, files)
        note(committed=number, bytes=size)

    RewardTraining._step, Checkpoints.write, Checkpoints._commit = step, timed_write, sized_commit  # type: ignore[method-assign]
    log = task.tracking.log_metrics

    def keep(metrics, step=0, series=None):
        note(logged=step, stood_still=metrics.get("sarm/seconds_checkpoints", 0.0))
        log(metrics, step, series)

    object.__setattr__(task.tracking, "log_metrics", keep)
    try:
        reward_worker(task)
    except Enough:
        return


def main() -> None:
    # Workers cannot import this file by name.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    if not (DEMO / "sae" / "manifest.json").exists():
        sys.exit(f"error: no finished demo at {DEMO}. Run `make demo` first, or name another with DEMO=FOLDER.")
    preset = PRESETS["demo"][1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "out" / "sarm"
        folder.mkdir(parents=True)
        run = RunSettings(out=folder.parent)
        reward = replace(preset.reward, checkpoint_every_steps=SAVE_EVERY, head_init="zero")
        states = Checkpoints(folder.parent / "training", {})
        task = RewardTask(
            run, preset.model, model_folder(preset.model), reward, DEMO / "pairs", DEMO / "sae", None, folder,
            Tracker(run, "bench").parent, states,
        )  # fmt: skip
        with connect(run) as cluster:
            run_workers(worker, task, cluster)
        diary = [json.loads(line) for line in (folder / "diary.jsonl").read_text().splitlines()]
    killed = next(entry["at"] for entry in diary if "killed" in entry)
    steps = [entry for entry in diary if "step" in entry]
    first = next(entry for entry in steps if entry["at"] > killed)
    written = [entry for entry in diary if "written" in entry]
    stood_still = max(entry["stood_still"] for entry in diary if "logged" in entry and entry["at"] < killed)
    saved_before = sum(entry["at"] < killed for entry in written)
    cost = stood_still / saved_before + statistics.mean(entry["cpu_seconds"] for entry in written)
    figures = {
        "recovery_seconds": round(first["at"] - first["seconds"] - killed, 2),
        "recovery_to_the_end_of_the_step_seconds": round(first["at"] - killed, 2),
        "step_seconds": round(statistics.median(entry["seconds"] for entry in steps), 2),
        "state_megabytes": round(max(entry["bytes"] for entry in diary if "committed" in entry) / 1e6),
        "stood_still_seconds": round(stood_still / saved_before, 3),
        "written_behind_seconds": round(statistics.mean(entry["seconds"] for entry in written), 2),
        "cost_at_the_default_interval": round(cost / reward.checkpoint_every_seconds, 4),
        "steps_repeated": KILLED_AT - 1 - (first["step"] - 1),
    }
    print(json.dumps(figures, indent=1))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

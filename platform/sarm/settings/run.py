"""Where a job writes, what it logs to, which machines it may use."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args

import tyro

from sarm.settings.checks import OPERATIONAL, UserError, check, check_least, check_rate
from sarm.settings.results_root import READ, WRITTEN, place_paths

# `run` and `out` are too common to be typed with a prefix: `--out`, `--seed`, `--dry-run`.
Flat = tyro.conf.arg(name="")


ModelsLogged = Literal["reference", "copy", "none"]


StageName = Literal[
    "prepare_data",
    "extract_activations",
    "train_sae",
    "train_sarm",
    "evaluate",
    "collect_contexts",
    "feature_pages",
]
"""The stages of the chain by the names of their jobs, in order."""


STAGES: tuple[StageName, ...] = get_args(StageName)


def _check_place(out: Path) -> None:
    """Raise UserError for an output folder that the shell or a mistyped address made."""
    text = str(out)
    reason = ""
    if not out.name:
        reason = "it names no folder of its own"
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        reason = "it is an address, and stages write files: mount the bucket and pass its path"
    elif "$" in text:
        reason = "it holds a variable that the shell did not fill in"
    elif any(ord(character) < 32 for character in text):
        reason = "it holds control characters"
    elif any(len(part.encode("utf-8", "replace")) > 200 for part in out.parts):
        reason = "a part of it is longer than 200 bytes"
    if reason:
        shown = repr(text if len(text) <= 60 else text[:60] + "...")
        raise UserError(f"the output folder {shown} cannot be used: {reason}. Pass --out FOLDER.")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a job writes, what it logs to and which machines it may use."""

    common: ClassVar[tuple[str, ...]] = ("out", "seed", "config", "dry_run")
    out: Path = field(default=Path("outputs/run"), metadata=OPERATIONAL | WRITTEN)
    """Folder of the run; every stage writes one folder inside it. In a submitted job a relative one stands under `$SARM_RESULTS` (default ~/sarm-outputs)."""
    seed: int = 0
    """Seed of every random choice: initialisation, shuffling, permutations."""
    mlflow_uri: str = field(default="", metadata=OPERATIONAL)
    """MLflow tracking URI (server, or absolute sqlite path). Empty: `MLFLOW_TRACKING_URI`, else sqlite beside `out`."""
    experiment: str = field(default="sarm", metadata=OPERATIONAL)
    """MLflow experiment."""
    mlflow_models: ModelsLogged = field(default="reference", metadata=OPERATIONAL)
    """How reward models are registered in MLflow: `reference` names the folder, which has to stay; `copy` copies it; `none` registers none."""
    tensorboard: bool = field(default=False, metadata=OPERATIONAL)
    """Write metrics to `OUT/tensorboard` too, as event files: `tensorboard --logdir OUT/tensorboard`."""
    wandb: bool = field(default=False, metadata=OPERATIONAL)
    """Send metrics to Weights & Biases too: its project is `experiment`. With `WANDB_MODE=offline` they wait in `wandb` beside `out`."""
    ray_address: str = field(default="", metadata=OPERATIONAL)
    """Ray cluster to join (`auto`, `HOST:PORT`). Empty: the cluster of the submitted job, else a local one."""
    num_workers: int = field(default=0, metadata=OPERATIONAL)
    """Ray Train workers of the SAE and reward training; one GPU each where the cluster has GPUs. 0: all GPUs, or one worker a node without any."""
    num_actors: int = field(default=0, metadata=OPERATIONAL)
    """Ray Data actors of extraction and scoring; one GPU each where the cluster has GPUs. 0: all GPUs, or one actor a node without any."""
    max_restarts: int = field(default=3, metadata=OPERATIONAL)
    """How often in a row workers are started again after one of them died. A newer training state in between starts the count anew."""
    cpus_per_worker: int = field(default=0, metadata=OPERATIONAL)
    """CPU cores (and torch threads) of each worker and actor; 0 divides the cluster's cores among them."""
    use_gpu: Literal["auto", "yes", "no"] = field(default="auto", metadata=OPERATIONAL)
    """Whether each worker and actor takes a GPU: `auto` where the cluster has any, `yes` also where an autoscaler has yet to bring them, `no` never."""
    wait_for_nodes: float = field(default=0.0, metadata=OPERATIONAL)
    """Seconds to wait for the nodes of a cluster that grows: the autoscaler is asked for what the workers need. 0: what is there now has to do."""
    supervise: bool = field(default=False, metadata=OPERATIONAL)
    """Run the job in a process of its own. If it dies, it is started again, as often in a row as `max_restarts` says."""
    submit: str = field(default="", metadata=OPERATIONAL)
    """Dashboard of a Ray cluster (http://HOST:8265) to hand the job to, supervised; the same job is not started there twice."""
    config: str = field(default="", metadata=OPERATIONAL | READ)
    """YAML or JSON file of settings, as `--dry-run --json` prints them. It goes over the preset, and flags go over it."""
    dry_run: bool = field(default=False, metadata=OPERATIONAL)
    """Print what the job would do and cost, then stop."""
    json: bool = field(default=False, metadata=OPERATIONAL)
    """With `--dry-run`: print the resolved settings as JSON instead, for `--config`."""
    debug: bool = field(default=False, metadata=OPERATIONAL)
    """Show the traceback of an error instead of one line."""

    def __post_init__(self) -> None:
        _check_place(self.out)
        is_name = 0 < len(self.experiment) <= 100 and re.fullmatch(r"[A-Za-z0-9][\w .+()-]*", self.experiment, re.ASCII)
        check(self, "experiment", bool(is_name), "1 to 100 letters, digits, spaces and ._+-()")
        place_paths(self)
        check_least(self, "", num_workers=0, num_actors=0, cpus_per_worker=0, max_restarts=0)
        check_rate(self, "wait_for_nodes", zero_allowed=True)


@dataclass(frozen=True, kw_only=True)
class ChainSettings(RunSettings):
    """Where a job of the chain of stages writes, and which stages it runs."""

    common: ClassVar[tuple[str, ...]] = (*RunSettings.common, "only", "redo_from")
    only: bool = field(default=False, metadata=OPERATIONAL)
    """Run this job's own stage alone; the folders that it reads must be finished. Without this flag the job first makes what is missing."""
    redo_from: StageName | None = field(default=None, metadata=OPERATIONAL)
    """Move the folders of this stage and of all later ones aside (to `OUT.aside/TIME`), then make them again."""

"""A reward model's training by its own job, to be disturbed, on what an undisturbed pipeline left before it."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def copy_up_to_training(finished: Path, out: Path) -> None:
    """The outputs of all stages before the reward model's training."""
    shutil.copytree(finished, out)
    for stage in ("sarm", "evaluation", "contexts", "features"):
        shutil.rmtree(out / stage)


def train_sarm(out: Path, mlflow_uri: str, *options: str) -> list[str]:
    """The job's command line."""
    job = str(ROOT / "jobs" / "train_sarm.py")
    return [sys.executable, job, "tiny", "--out", str(out), "--mlflow-uri", mlflow_uri, *options]


def states(out: Path) -> Iterator[Path]:
    return (out / "training" / "sarm").glob("step-*")


def is_same_model(one: Path, other: Path) -> bool:
    """Whether the weights of two pipelines' reward models are equal, bit for bit."""
    weights, others = (load_file(folder / "sarm" / "model.safetensors") for folder in (one, other))
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)

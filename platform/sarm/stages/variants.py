"""Which reward models a training job makes: the SARM and its baselines, each with its folder and settings.

Loads no torch, so that a job can be refused by its settings at once.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RANDOM_ENCODERS, RewardSettings

NO_PEFT = "--reward.lora-rank needs the package peft. Run pip install 'sarm[lora]'."


class Variant(NamedTuple):
    """One training of the job: its stage, the folder under `--out` that it writes, its SAE (None for a scalar head) and settings."""

    stage: str
    folder: str
    sae: Path | None
    model: ModelSettings
    reward: RewardSettings


def full_depth(model: ModelSettings) -> int:
    """The number of blocks of the whole model; loads its config, and so torch."""
    from sarm.data.formats.models import model_folder
    from sarm.nn.pretrained import read_depth

    return read_depth(model_folder(model), revision=model.revision, gguf_file=model.gguf_file)


def check_rewarded(model: ModelSettings) -> None:
    """Before a training: raise UserError for another rewarded token than a SARM's."""
    if model.rewarded_token != "end_of_turn":
        raise UserError("a SARM is rewarded where the answer's turn ends. Leave out --model.rewarded-token, and extract activations there.")  # fmt: skip


def variants(
    model: ModelSettings, reward: RewardSettings, sae: Path, depth_of: Callable[[ModelSettings], int] = full_depth
) -> list[Variant]:
    """The SARM and the baselines that the settings ask for; `depth_of` says where the whole backbone ends.

    Raises UserError if they ask for adapters and `peft` is not installed.
    """
    if reward.lora_rank and find_spec("peft") is None:
        raise UserError(NO_PEFT)
    sarm = Variant(stage="train SARM", folder="sarm", sae=sae, model=model, reward=reward)
    return [sarm, *(_baseline(name, sarm, depth_of) for name in reward.baselines)]


def _baseline(name: str, sarm: Variant, depth_of: Callable[[ModelSettings], int]) -> Variant:
    """The variant that a baseline's name stands for: what differs from the SARM."""
    reward = sarm.reward
    if name == "scalar":
        return sarm._replace(stage="train scalar head", folder="scalar_head", sae=None)
    if name == "scalar_full":
        whole = replace(sarm.model, layer=depth_of(sarm.model))
        return sarm._replace(stage="train scalar head, full depth", folder="scalar_head_full", sae=None, model=whole)
    if name == "token_sae":
        assert reward.token_sae is not None
        return sarm._replace(stage="train SARM on token SAE", folder="sarm_token_sae", sae=reward.token_sae)
    random = replace(reward, encoder=RANDOM_ENCODERS[name])
    if name == "random_encoder":
        return sarm._replace(stage="train SARM, random encoder", folder="sarm_random_encoder", reward=random)
    if name == "random_directions":
        return sarm._replace(stage="train SARM, random directions", folder="sarm_random_directions", reward=random)
    # The papers' code trains this encoder, since its random weights are not worth keeping.
    trained = replace(random, train_sae=True, sae_lr=reward.lr or reward.sae_lr)
    return sarm._replace(stage="train SARM, random linear map", folder="sarm_random_linear", reward=trained)

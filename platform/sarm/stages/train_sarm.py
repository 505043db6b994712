"""pairs/v1 and SAE -> SARM, and its baselines beside it.

What needs torch or Ray is imported inside, so that a finished stage is a no-op that starts nothing.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sarm.contracts.folders import SAE_FOLDER
from sarm.contracts.manifest import read_manifest
from sarm.data.formats.models import check_model, model_folder
from sarm.data.formats.reward_classes import is_attached
from sarm.data.store.checkpoints import Checkpoints
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.engine.terminal import say
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RewardSettings
from sarm.stages import plan
from sarm.stages.train_sae import finish_training
from sarm.stages.variants import Variant, check_rewarded, variants


def train_sarm(session: Session, model: ModelSettings, reward: RewardSettings) -> None:
    """pairs/v1 and SAE -> SARM, and its baselines beside it."""
    from sarm.stages import reward_models

    check_model(model)
    if is_attached(session.folders.sarm):
        say(f"train_sarm: {session.folders.sarm} is a reward model of others with a dictionary, which is not trained")
        return
    check_rewarded(model)
    trainings = variants(model, reward, session.folders.sae)
    for sae in dict.fromkeys(variant.sae for variant in trainings if variant.sae):
        read_manifest(sae, SAE_FOLDER)
        reward_models.check_sae(sae, model)
        reward_models.check_width(sae, model)
    for variant in trainings:
        train_reward_model(session, variant)


def train_reward_model(session: Session, variant: Variant) -> Path:
    """pairs/v1, and an SAE if it has one, -> one reward model; returns its folder."""
    folder = plan.reward_model(session.folders, variant, session.run.seed).open()
    states = Checkpoints(session.folders.states(variant.folder), {"config": folder.config, "inputs": folder.inputs})
    session.stage(variant.stage, folder, functools.partial(_train, session, variant, folder.folder, states))
    finish_training(states)
    return folder.folder


def _train(session: Session, variant: Variant, target: Path, states: Checkpoints, child: StageRun) -> Mapping[str, Any]:
    from sarm.data.tokens.chat import load_chat_tokenizer
    from sarm.engine.ray.trainer import run_workers
    from sarm.report.figures import reward_curves
    from sarm.stages import train_reward_worker as reward_training
    from sarm.stages.reward_pairs import read_reward_pairs

    chat_ends, place = session.folders.chat_activations, model_folder(variant.model)
    # Before there are workers that wait for it.
    read_reward_pairs(
        session.folders.pairs,
        load_chat_tokenizer(variant.model, place),
        variant.reward.validation_share,
        model=variant.model.name,
        states=states,
    )
    task = reward_training.RewardTask(
        run=session.run,
        model=variant.model,
        model_folder=place,
        reward=variant.reward,
        pairs=session.folders.pairs,
        sae=variant.sae,
        head_start=chat_ends if variant.reward.head_init == "probe" else None,
        folder=target,
        tracking=child,
        states=states,
        report_steps=session.reports.every_steps,
        chat_ends=chat_ends if variant.reward.encoder == "random_matched" else None,
    )
    result = run_workers(reward_training.reward_worker, task, session.cluster, session.reports.callbacks)
    history = {target.name: result["history"]}
    (target / "history.json").write_text(json.dumps(history))
    child.log_figure(reward_curves(history), "reward_curves.png")
    if session.registers_models:
        child.register_model(target, f"{session.run.experiment}-{target.name}", session.run.mlflow_models)
    return {"figures": result["figures"]}

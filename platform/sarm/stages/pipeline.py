"""The stages of the platform, each from finished folders to a finished folder. Jobs call these in order.

What needs torch or Ray is imported inside, so that a finished stage is a no-op that starts nothing.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sarm.contracts.folders import (
    ACTIVATIONS_FOLDER,
    CORPUS_FOLDER,
    EVALUATION_FOLDER,
    PAIRS_FOLDER,
    SAE_FOLDER,
    SARM_FOLDER,
)
from sarm.contracts.manifest import Manifest, StageFolder, read_manifest
from sarm.data.formats.models import check_model, model_folder
from sarm.data.sources import pairs as pair_sources
from sarm.data.sources import texts as text_sources
from sarm.data.sources.prepare import prepare_corpus, prepare_pairs
from sarm.data.store.checkpoints import Checkpoints
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.settings.checks import UserError
from sarm.settings.data import DataSettings
from sarm.settings.evaluation import EvaluationSettings
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RewardSettings
from sarm.settings.sae import AlsoSaes, SaeSettings
from sarm.stages import plan
from sarm.stages.extract import extract as extract
from sarm.stages.train_sae import SaeStage, finish_training, train_saes

if TYPE_CHECKING:
    from sarm.stages.variants import Variant

_SPELLED = "contents_with_control_tokens"


def check_sources(data: DataSettings) -> None:
    """Raise UserError unless every source can be opened."""
    for spec in data.texts:
        text_sources.check_source(spec, data.text_field)
    for spec in data.pairs:
        pair_sources.check_source(spec)
    if not data.pairs:
        raise UserError(
            "there are no preference pairs. Pass --data.pairs with files, hf:NAME, or a preset that names them."
        )


def prepare(session: Session, data: DataSettings) -> None:
    """Sources -> corpus/v1 and pairs/v1; without text sources there is no corpus."""
    folders = session.folders
    pairs = StageFolder(folders.pairs, PAIRS_FOLDER, plan.pairs_settings(data))
    # Before the texts are paid for.
    pairs.finished()
    if data.texts:
        corpus = StageFolder(folders.corpus, CORPUS_FOLDER, plan.corpus_settings(data))
        session.stage(
            "prepare corpus",
            corpus,
            lambda _: plan.with_figures(prepare_corpus(data, corpus.folder), "rows", "duplicates", _SPELLED),
        )
    session.stage(
        "prepare pairs",
        pairs,
        lambda _: plan.with_figures(
            prepare_pairs(data, pairs.folder), "rows", "prompts", "near_duplicate_prompts", _SPELLED
        ),
    )


def train_sae(session: Session, sae: SaeSettings, also: AlsoSaes = AlsoSaes()) -> None:
    """activations/v1 -> SAE, and `also` others beside it, all from one read."""
    folders = session.folders
    wanted = [SaeStage(*one) for one in plan.sae_folders(folders, sae, also, session.run.seed)]
    activations = {"text": folders.text_activations, "chat": folders.chat_activations}
    train_saes(session, wanted, activations, folders.corpus, folders.states(folders.sae.name))


def train_sarm(session: Session, model: ModelSettings, reward: RewardSettings) -> None:
    """pairs/v1 and SAE -> SARM, and its baselines beside it."""
    from sarm.stages import reward_models
    from sarm.stages.variants import variants

    check_model(model)
    trainings = variants(model, reward, session.folders.sae)
    for sae in dict.fromkeys(one.sae for one in trainings if one.sae):
        read_manifest(sae, SAE_FOLDER)
        reward_models.check_sae(sae, model)
        reward_models.check_width(sae, model)
    for one in trainings:
        train_reward_model(session, one)


def train_reward_model(session: Session, one: "Variant") -> Path:
    """pairs/v1, and an SAE if it has one, -> one reward model; returns its folder."""
    folders, target = session.folders, session.folders.out / one.folder
    is_matched = one.reward.encoder == "random_matched"
    inputs = {PAIRS_FOLDER: (folders.pairs, PAIRS_FOLDER)}
    if one.reward.head_init == "probe" or is_matched:
        inputs |= {"activations/chat": (folders.chat_activations, ACTIVATIONS_FOLDER)}
    inputs |= {SAE_FOLDER: (one.sae, SAE_FOLDER)} if one.sae else {}
    folder = StageFolder(target, SARM_FOLDER, plan.reward_settings(one.model, one.reward, session.run.seed), inputs)
    states = Checkpoints(folders.states(one.folder), {"config": folder.config, "inputs": folder.inputs})
    session.stage(one.stage, folder, functools.partial(_train_reward, session, one, target, states))
    finish_training(states)
    return target


def evaluate(session: Session, extraction: ExtractionSettings, evaluation: EvaluationSettings) -> Manifest:
    """pairs/v1, activations and models -> held-out scores, baselines, attributions and contexts."""
    from sarm.stages import evaluate as work

    folders = session.folders
    inputs = {
        SARM_FOLDER: (folders.sarm, SARM_FOLDER),
        SAE_FOLDER: (folders.sae, SAE_FOLDER),
        PAIRS_FOLDER: (folders.pairs, PAIRS_FOLDER),
        "activations/chat": (folders.chat_activations, ACTIVATIONS_FOLDER),
        "activations/heldout": (folders.heldout_activations, ACTIVATIONS_FOLDER),
    }
    inputs |= {name: (folders.out / name, SARM_FOLDER) for name in plan.BASELINES if (folders.out / name).exists()}
    folder = StageFolder(
        folders.evaluation, EVALUATION_FOLDER, plan.evaluation_settings(evaluation, session.run.seed), inputs
    )
    return session.stage(
        "evaluate",
        folder,
        functools.partial(work.evaluate, session, extraction, evaluation, folder.folder),
        resume=True,
    )


def _train_reward(
    session: Session, one: "Variant", target: Path, states: Checkpoints, child: StageRun
) -> Mapping[str, Any]:
    from sarm.report.figures import reward_curves
    from sarm.stages import train_reward_worker as reward_training

    chat_ends = session.folders.chat_activations
    task = reward_training.RewardTask(
        session.run,
        one.model,
        model_folder(one.model),
        one.reward,
        session.folders.pairs,
        one.sae,
        chat_ends if one.reward.head_init == "probe" else None,
        target,
        child,
        states,
        session.reports.every_steps,
        chat_ends if one.reward.encoder == "random_matched" else None,
    )
    result = reward_training.train_on_cluster(task, session.cluster, session.reports.callbacks)
    history = {target.name: result["history"]}
    (target / "history.json").write_text(json.dumps(history))
    child.log_figure(reward_curves(history), "reward_curves.png")
    if session.registers_models:
        child.register_model(target, f"{session.run.experiment}-{target.name}", session.run.mlflow_models)
    return {"figures": result["figures"]}

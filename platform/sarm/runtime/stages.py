"""The stages of the platform, each from finished folders to a finished folder. Jobs call these in order.

What needs torch or Ray is imported inside, so that a finished stage is a no-op that starts nothing.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sarm.config import AlsoSaes, Data, Evaluation, Extraction, Model, Reward, Sae, UserError
from sarm.data import pair_sources, text_sources
from sarm.data.checkpoints import Checkpoints
from sarm.data.models import check_model, model_folder
from sarm.data.prepare import prepare_corpus, prepare_pairs
from sarm.folder_schemas import ACTIVATIONS, CORPUS, EVALUATION, PAIRS, SAE, SARM
from sarm.manifest import Manifest, StageFolder, read_manifest
from sarm.runtime import plan
from sarm.runtime.extraction.activation_stages import extract as extract
from sarm.runtime.session import Session
from sarm.runtime.tracking import StageRun
from sarm.runtime.training.sae_stages import SaeStage, finish_training, train_saes

if TYPE_CHECKING:
    from sarm.runtime.training.variants import Variant

_SPELLED = "contents_with_control_tokens"


def check_sources(data: Data) -> None:
    """Raise UserError unless every source can be opened."""
    for spec in data.texts:
        text_sources.check_source(spec, data.text_field)
    for spec in data.pairs:
        pair_sources.check_source(spec)
    if not data.pairs:
        raise UserError(
            "there are no preference pairs. Pass --data.pairs with files, hf:NAME, or a preset that names them."
        )


def prepare(session: Session, data: Data) -> None:
    """Sources -> corpus/v1 and pairs/v1; without text sources there is no corpus."""
    folders = session.folders
    pairs = StageFolder(folders.pairs, PAIRS, plan.pairs_settings(data))
    # Before the texts are paid for.
    pairs.finished()
    if data.texts:
        corpus = StageFolder(folders.corpus, CORPUS, plan.corpus_settings(data))
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


def train_sae(session: Session, sae: Sae, also: AlsoSaes = AlsoSaes()) -> None:
    """activations/v1 -> SAE, and `also` others beside it, all from one read."""
    folders = session.folders
    wanted = [SaeStage(*one) for one in plan.sae_folders(folders, sae, also, session.run.seed)]
    activations = {"text": folders.text_activations, "chat": folders.chat_activations}
    train_saes(session, wanted, activations, folders.corpus, folders.states(folders.sae.name))


def train_sarm(session: Session, model: Model, reward: Reward) -> None:
    """pairs/v1 and SAE -> SARM, and its baselines beside it."""
    from sarm.runtime.training import reward_models
    from sarm.runtime.training.variants import variants

    check_model(model)
    trainings = variants(model, reward, session.folders.sae)
    for sae in dict.fromkeys(one.sae for one in trainings if one.sae):
        read_manifest(sae, SAE)
        reward_models.check_sae(sae, model)
        reward_models.check_width(sae, model)
    for one in trainings:
        train_reward_model(session, one)


def train_reward_model(session: Session, one: "Variant") -> Path:
    """pairs/v1, and an SAE if it has one, -> one reward model; returns its folder."""
    folders, target = session.folders, session.folders.out / one.folder
    is_matched = one.reward.encoder == "random_matched"
    inputs = {PAIRS: (folders.pairs, PAIRS)}
    if one.reward.head_init == "probe" or is_matched:
        inputs |= {"activations/chat": (folders.chat_activations, ACTIVATIONS)}
    inputs |= {SAE: (one.sae, SAE)} if one.sae else {}
    folder = StageFolder(target, SARM, plan.reward_settings(one.model, one.reward, session.run.seed), inputs)
    states = Checkpoints(folders.states(one.folder), {"config": folder.config, "inputs": folder.inputs})
    session.stage(one.stage, folder, functools.partial(_train_reward, session, one, target, states))
    finish_training(states)
    return target


def evaluate(session: Session, extraction: Extraction, evaluation: Evaluation) -> Manifest:
    """pairs/v1, activations and models -> held-out scores, baselines, attributions and contexts."""
    from sarm.runtime.benchmarks import evaluation as work

    folders = session.folders
    inputs = {
        SARM: (folders.sarm, SARM),
        SAE: (folders.sae, SAE),
        PAIRS: (folders.pairs, PAIRS),
        "activations/chat": (folders.chat_activations, ACTIVATIONS),
        "activations/heldout": (folders.heldout_activations, ACTIVATIONS),
    }
    inputs |= {name: (folders.out / name, SARM) for name in plan.BASELINES if (folders.out / name).exists()}
    folder = StageFolder(folders.evaluation, EVALUATION, plan.evaluation_settings(evaluation, session.run.seed), inputs)
    return session.stage(
        "evaluate", folder, functools.partial(work.evaluate, session, extraction, evaluation, folder.folder)
    )


def _train_reward(
    session: Session, one: "Variant", target: Path, states: Checkpoints, child: StageRun
) -> Mapping[str, Any]:
    from sarm.interpret.figures import reward_curves
    from sarm.runtime.training import reward_training

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

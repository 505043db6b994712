"""The stages of the platform, each from finished folders to a finished folder. Jobs call these in order.

What needs torch or Ray is imported inside, so that a finished stage is a no-op that starts nothing.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sarm.config import Data, Evaluation, Extraction, Model, Reward, Sae, UserError
from sarm.data import pair_sources, text_sources
from sarm.data.activations import ACTIVATIONS, ActivationStore
from sarm.data.artifacts import SAE, SARM
from sarm.data.checkpoints import Checkpoints
from sarm.data.models import check_model, model_folder
from sarm.data.prepare import prepare_corpus, prepare_pairs
from sarm.manifest import Manifest, StageFolder, read_manifest
from sarm.runtime import plan
from sarm.runtime.activation_stages import extract as extract
from sarm.runtime.plan import CORPUS, EVALUATION, PAIRS
from sarm.runtime.session import Session
from sarm.runtime.tracking import StageRun


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
    if data.texts:
        corpus = StageFolder(folders.corpus, CORPUS, plan.corpus_settings(data))
        session.stage(
            "prepare corpus",
            corpus,
            lambda _: plan.with_figures(prepare_corpus(data, corpus.folder), "rows", "duplicates"),
        )
    pairs = StageFolder(folders.pairs, PAIRS, plan.pairs_settings(data))
    session.stage(
        "prepare pairs", pairs, lambda _: plan.with_figures(prepare_pairs(data, pairs.folder), "rows", "prompts")
    )


def train_sae(session: Session, sae: Sae) -> None:
    """activations/v1 -> SAE."""
    folders = session.folders
    epochs = {"text": sae.text_epochs, "chat": sae.chat_epochs}
    sources = {"text": folders.text_activations, "chat": folders.chat_activations}
    used = {name: sources[name] for name in sources if epochs[name] > 0}
    inputs = {f"activations/{name}": (path, ACTIVATIONS) for name, path in used.items()}
    folder = StageFolder(folders.sae, SAE, plan.sae_settings(sae, session.run.seed), inputs)
    states = Checkpoints(folders.sae_states, {"config": folder.config, "inputs": folder.inputs})

    def body(child: StageRun) -> Mapping[str, Any]:
        from sarm.interpret.figures import density_histograms, sae_curves
        from sarm.runtime import sae_training

        sae_training.check_activations(sae, {name: ActivationStore(path) for name, path in used.items()})
        task = sae_training.SaeTask(
            session.run,
            sae,
            used.get("text"),
            used.get("chat"),
            folder.folder,
            child,
            states,
            folders.corpus if "text" in used else None,
        )
        result = sae_training.train_on_cluster(task, session.cluster)
        (folder.folder / "history.json").write_text(json.dumps(result["history"]))
        child.log_figure(sae_curves(result["history"]), "sae_curves.png")
        densities = json.loads((folder.folder / "density.json").read_text())
        child.log_figure(density_histograms(densities), "density.png")
        child.log_artifact(folder.folder / "cfg.json")
        if result["rejected"]:
            (folder.folder / "rejected_rows.json").write_text(json.dumps(result["rejected"]))
            child.log_artifact(folder.folder / "rejected_rows.json")
        rejected = {
            name: {reason: len(ids) for reason, ids in kinds.items()} for name, kinds in result["rejected"].items()
        }
        return {"figures": result["figures"], "rejected": rejected}

    session.stage("train SAE", folder, body)
    states.delete()


def train_sarm(session: Session, model: Model, reward: Reward) -> None:
    """pairs/v1 and SAE -> SARM, and the scalar-head baseline beside it."""
    from sarm.runtime import reward_models

    check_model(model)
    folders = session.folders
    read_manifest(folders.sae, SAE)
    reward_models.check_sae(folders.sae, model)
    head_start = folders.chat_activations if reward.head_init == "probe" else None
    inputs = {PAIRS: (folders.pairs, PAIRS)} | ({"activations/chat": (head_start, ACTIVATIONS)} if head_start else {})
    heads: list[tuple[str, Path, Path | None]] = [("train SARM", folders.sarm, folders.sae)]
    if reward.scalar_baseline:
        heads.append(("train scalar head", folders.scalar_head, None))
    for name, target, sae in heads:
        needed = inputs | ({SAE: (sae, SAE)} if sae else {})
        folder = StageFolder(target, SARM, plan.reward_settings(model, reward, session.run.seed), needed)
        session.stage(
            name,
            folder,
            functools.partial(_train_reward, session, model, reward, folders.pairs, sae, head_start, target),
        )


def evaluate(session: Session, extraction: Extraction, evaluation: Evaluation) -> Manifest:
    """pairs/v1, activations and models -> held-out scores, baselines, attributions and contexts."""
    from sarm.runtime import evaluation as work

    folders = session.folders
    inputs = {
        SARM: (folders.sarm, SARM),
        SAE: (folders.sae, SAE),
        PAIRS: (folders.pairs, PAIRS),
        "activations/chat": (folders.chat_activations, ACTIVATIONS),
        "activations/heldout": (folders.heldout_activations, ACTIVATIONS),
    }
    if folders.scalar_head.exists():
        inputs["scalar_head"] = (folders.scalar_head, SARM)
    folder = StageFolder(folders.evaluation, EVALUATION, plan.evaluation_settings(evaluation, session.run.seed), inputs)
    return session.stage(
        "evaluate", folder, functools.partial(work.evaluate, session, extraction, evaluation, folder.folder)
    )


def _train_reward(
    session: Session,
    model: Model,
    reward: Reward,
    pairs: Path,
    sae: Path | None,
    head_start: Path | None,
    target: Path,
    child: StageRun,
) -> Mapping[str, Any]:
    from sarm.interpret.figures import reward_curves
    from sarm.runtime import reward_training

    task = reward_training.RewardTask(
        session.run, model, model_folder(model), reward, pairs, sae, head_start, target, child
    )
    result = reward_training.train_on_cluster(task, session.cluster)
    history = {target.name: result["history"]}
    (target / "history.json").write_text(json.dumps(history))
    child.log_figure(reward_curves(history), "reward_curves.png")
    child.log_artifact(target / "config.json")
    return {"figures": result["figures"]}

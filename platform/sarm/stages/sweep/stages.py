"""The stages of an ablation: those that cells share, each done once, and those of one cell."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sarm.contracts.figures import plain_values
from sarm.contracts.folders import (
    ACTIVATIONS_FOLDER,
    EVALUATION_FOLDER,
    PAIRS_FOLDER,
    SAE_FOLDER,
    SARM_FOLDER,
    SPARSE_RM_FOLDER,
)
from sarm.contracts.manifest import MANIFEST, Manifest, StageFolder, read_manifest
from sarm.data.formats.models import check_model
from sarm.data.formats.sae_folder import load_sae
from sarm.data.store.activations import ActivationStore
from sarm.engine.mlflow.run_card import SOURCE_NAME, parameters
from sarm.engine.mlflow.tracking import PARENT_RUN, StageRun
from sarm.engine.session import Reports, Session
from sarm.evaluate.readability import READABLE, Estimate
from sarm.settings.identity import as_json
from sarm.settings.sae import OF_ONE_DICTIONARY
from sarm.settings.sweep import FROZEN
from sarm.stages import plan as plans
from sarm.stages.extract import extract
from sarm.stages.plan import MORE_RESPONSES, RESPONSES
from sarm.stages.prepare import prepare
from sarm.stages.sweep.frozen_cell import do_frozen
from sarm.stages.sweep.plan import SweepPlan
from sarm.stages.sweep.points import Cell, SaeKey
from sarm.stages.sweep.readings import CellFolders, SweepFolders, digest, folders_of
from sarm.stages.train_sae import SaeStage, train_saes
from sarm.stages.train_sarm import train_reward_model

_SHARED_SETTINGS = ("model", "lr_sae", "lr_sae_chat", "lr_reward", "lr_head", "reward_epochs", "reward_batch")
# What the runs of other jobs call the same figures.
_IN_MLFLOW = {
    "ci95_low": "heldout_accuracy_low",
    "ci95_high": "heldout_accuracy_high",
    "heldout_margin": "mean_margin",
    "fvu_heldout": "sae_fvu",
    "alive_at_reward": "sae_alive_at_reward",
    "dead_share": "sae_dead_share",
    "evaluation_seconds": "seconds_of_evaluation",
}
WITH_TRAINED_SAE = ("sarm", "token_sae")


def share(session: Session, plan: SweepPlan) -> None:
    """Corpus, pairs, activations of all layers from one pass for each reading, and every SAE that a cell reads."""
    config = plan.config
    prepare(session, config.data)
    for reading, (first, *others) in plan.readings.items():
        session.own_folders = folders_of(config, reading)
        model, extraction = replace(reading.model, layer=first), replace(reading.extraction, layers=tuple(others))
        extract(session, model, extraction)
    session.own_folders = SweepFolders(config.run.out)
    missing = [key for key in plan.saes if not (plan.sae_folder(key) / MANIFEST).exists()]
    for group in _of_one_read(plan, missing):
        _train_group(session, plan, group)


def _of_one_read(plan: SweepPlan, keys: list[SaeKey]) -> list[list[SaeKey]]:
    """Groups of SAEs that learn from the same rows in the same steps, at most `saes_at_once` in each."""
    at_once, same = plan.config.sweep.saes_at_once, dict[Any, list[SaeKey]]()
    for key in keys:
        steps = tuple(item for item in dataclasses.asdict(plan.sae(key)).items() if item[0] not in OF_ONE_DICTIONARY)
        same.setdefault((key.layer, plan.reading(key), steps), []).append(key)
    return [own[start : start + at_once] for own in same.values() for start in range(0, len(own), at_once)]


def _train_group(session: Session, plan: SweepPlan, group: list[SaeKey]) -> None:
    layer = group[0].layer
    wanted = []
    for key in group:
        folder = plan.sae_folder(key)
        wanted.append(SaeStage(f"train SAE {folder.name}", folder, plan.sae(key), key.seed))
    folders = folders_of(plan.config, plan.reading(group[0]))
    responses = [RESPONSES, *([MORE_RESPONSES] if plan.config.data.responses else [])]
    activations = {name: folders.activations(name, layer, layer) for name in ("text", "chat", *responses)}
    together = digest(sorted(one.folder.name for one in wanted))
    train_saes(
        session=session,
        wanted=wanted,
        activations=activations,
        corpus=folders.corpus,
        in_training=folders.states(f"saes-{together}"),
    )


def cell_session(plan: SweepPlan, cell: Cell, reports: Reports) -> Session:
    """The session of one cell: its MLflow run hangs under the sweep's and has a tag and a parameter for every axis."""
    run, key = plan.run(cell), plan.sae_key(cell)
    axes = {name: value for name, value in plan.axes(cell).items() if value is not None}
    config = json.loads(as_json(plan.settings(cell)))
    settings = {name: value for name, value in parameters(config).items() if name in _SHARED_SETTINGS}
    shared = folders_of(plan.config, plan.reading(key or cell))
    folders = CellFolders(run.out, shared, cell.layer or plan.layers[0], key and plan.sae_folder(key))
    tags = {PARENT_RUN: plan.parent_run_id, **{name: str(value) for name, value in axes.items()}}
    # A trial's process is a worker of Ray's.
    tags |= {SOURCE_NAME: "tune/ablation.py", "command": ""}
    # Of a sweep's models only the best is registered, by the sweep.
    return Session(
        run=run,
        name=plan.name(cell),
        params={**settings, **axes},
        tags=tags,
        own_folders=folders,
        reports=reports,
        registers_models=False,
    )


def do_cell(plan: SweepPlan, cell: Cell, reports: Reports) -> Manifest:
    """Train and evaluate the cell's reward model, as far as that is not done; returns the evaluation's manifest."""
    from sarm.stages.variants import check_rewarded, variants

    key = plan.sae_key(cell)
    if cell.component in FROZEN:
        with cell_session(plan, cell, reports) as session:
            return _logged(session, plan, cell, do_frozen(session, plan, cell))
    sae = plan.sae_folder(key) if key else plan.cell_folder(cell) / "no-sae"
    model, reward = plan.model(cell), plan.reward(cell)
    with cell_session(plan, cell, reports) as session:
        check_rewarded(model)
        *_, variant = variants(model, reward, sae)
        check_model(variant.model)
        folder = train_reward_model(session, variant)
        return _logged(session, plan, cell, _evaluate(session, plan, cell, folder))


def _logged(session: Session, plan: SweepPlan, cell: Cell, found: Manifest) -> Manifest:
    """The evaluation of a cell, whose figures are on the cell's run too."""
    figures = result_of(plan, cell, found)
    session.tracker.parent.log_metrics({_IN_MLFLOW.get(name, name): value for name, value in figures.items()})
    return found


def _evaluate(session: Session, plan: SweepPlan, cell: Cell, model_folder: Path) -> Manifest:
    folders = session.folders
    inputs = {SARM_FOLDER: (model_folder, SARM_FOLDER), PAIRS_FOLDER: (folders.pairs, PAIRS_FOLDER)}
    if cell.component in WITH_TRAINED_SAE:
        inputs |= {
            SAE_FOLDER: (folders.sae, SAE_FOLDER),
            "activations/heldout": (folders.heldout_activations, ACTIVATIONS_FOLDER),
        }
    settings = plans.evaluation_settings(plan.settings(cell).evaluation, cell.seed)
    folder = StageFolder(folders.evaluation, EVALUATION_FOLDER, settings, inputs)
    body = functools.partial(_measure, session, plan, cell, model_folder.name, folder.folder)
    return session.stage("evaluate", folder, body, resume=True)


def _measure(
    session: Session, plan: SweepPlan, cell: Cell, model: str, folder: Path, child: StageRun
) -> Mapping[str, Any]:
    from sarm.evaluate.pairs import measure_pairs
    from sarm.evaluate.sae_quality import measure
    from sarm.stages.evaluate import score_heldout
    from sarm.stages.evaluate_readability import answers_of, readability_of

    scores = score_heldout(session, plan.settings(cell).extraction, model, folder)
    measured = measure_pairs(scores)
    figures = {"heldout_accuracy": measured.accuracy, "heldout_margin": measured.mean_margin}
    if measured.accuracy_ci95 is not None:
        figures |= {"ci95_low": measured.accuracy_ci95.low, "ci95_high": measured.accuracy_ci95.high}
    if cell.component in WITH_TRAINED_SAE:
        sae, _ = load_sae(session.folders.sae)
        quality = measure(sae, ActivationStore(session.folders.heldout_activations).read_sides()[1])
        figures |= {"fvu_heldout": quality.fvu, "alive_at_reward": quality.counts.alive_share()}
        answers = answers_of(session.folders.pairs, scores)
        readable, _ = readability_of(session.folders.out / model, answers, scores, cell.seed)
        figures |= {name: value for name in READABLE if (value := _value(getattr(readable, name))) is not None}
    (folder / "metrics.json").write_text(json.dumps(plain_values(measured), indent=2))
    child.log_artifact(folder / "metrics.json")
    return {"figures": figures, "rows": scores.num_rows}


def _value(figure: Estimate | int | None) -> float | None:
    """A count, or an estimate without its interval."""
    return figure.value if isinstance(figure, Estimate) else figure


class Cost(NamedTuple):
    """Seconds that a cell's own stages took."""

    training: float
    evaluation: float


def cost_of(plan: SweepPlan, cell: Cell) -> Cost:
    """What the cell's finished stages cost, from their manifests."""
    folder = plan.cell_folder(cell)
    (trained,) = [path for path in folder.iterdir() if path.name != "evaluation" and (path / MANIFEST).exists()]
    return Cost(
        read_manifest(trained, SPARSE_RM_FOLDER if cell.component in FROZEN else SARM_FOLDER).counts["seconds"],
        read_manifest(folder / "evaluation", EVALUATION_FOLDER).counts["seconds"],
    )


def result_of(plan: SweepPlan, cell: Cell, evaluation: Manifest) -> dict[str, float]:
    """The figures of a finished cell: held-out accuracy, its SAE's quality, and what it cost."""
    figures = {key: value for key, value in evaluation.counts["figures"].items() if value is not None}
    key, cost = plan.sae_key(cell), cost_of(plan, cell)
    if key is not None:
        sae = read_manifest(plan.sae_folder(key), SAE_FOLDER).counts["figures"]
        figures |= {name: sae[name] for name in ("dead_share", "reward_fidelity") if isinstance(sae.get(name), float)}
    return {**figures, "training_seconds": cost.training, "evaluation_seconds": cost.evaluation}

"""The stages of an ablation: those that cells share, each done once, and those of one cell."""

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sarm.contracts.folders import ACTIVATIONS_FOLDER, EVALUATION_FOLDER, PAIRS_FOLDER, SAE_FOLDER, SARM_FOLDER
from sarm.contracts.manifest import MANIFEST, Manifest, StageFolder, read_manifest
from sarm.data.formats.models import check_model
from sarm.data.formats.sae_folder import load_sae
from sarm.data.store.activations import ActivationStore
from sarm.engine.mlflow.run_card import SOURCE_NAME, parameters
from sarm.engine.mlflow.tracking import PARENT_RUN, StageRun
from sarm.engine.session import Reports, Session
from sarm.settings.identity import as_json
from sarm.stages import plan as plans
from sarm.stages.extract import extract
from sarm.stages.prepare import prepare
from sarm.stages.sweep.cells import Cell, SaeKey, sae_key
from sarm.stages.sweep.plan import CellFolders, SweepFolders, SweepPlan, digest
from sarm.stages.train_sae import SaeStage, train_saes
from sarm.stages.train_sarm import train_reward_model

TOKENS = "text-token"
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
    """Corpus, pairs, activations of all layers from one pass, and every SAE that a cell reads."""
    config = plan.config
    prepare(session, config.data)
    first, *others = plan.layers
    extract(session, plan.model(first), replace(config.extraction, layers=tuple(others)))
    of_tokens = sorted({key.layer for key in plan.saes if key.unit == "token"})
    if of_tokens:
        # Apart, and of fewer texts: every token of the whole corpus at every layer would fill terabytes.
        first, *others = of_tokens
        few = replace(config.extraction, units=("token",), layers=tuple(others), limit_tokens=config.sweep.token_rows)
        session.own_folders = SweepFolders(config.run.out, TOKENS)
        extract(session, plan.model(first), few)
        session.own_folders = SweepFolders(config.run.out)
    missing = [key for key in plan.saes if not (plan.sae_folder(key) / MANIFEST).exists()]
    for group in _of_one_read(missing, config.sweep.saes_at_once):
        _train_group(session, plan, group)


def _of_one_read(keys: list[SaeKey], at_once: int) -> list[list[SaeKey]]:
    """Groups of SAEs that learn from the same rows, at most `at_once` in each."""
    sources = dict.fromkeys((key.layer, key.unit) for key in keys)
    groups = []
    for source in sources:
        same = [key for key in keys if (key.layer, key.unit) == source]
        groups += [same[start : start + at_once] for start in range(0, len(same), at_once)]
    return groups


def _train_group(session: Session, plan: SweepPlan, group: list[SaeKey]) -> None:
    root, unit, layer = plan.config.run.out, group[0].unit, group[0].layer
    wanted = []
    for key in group:
        folder = plan.sae_folder(key)
        wanted.append(SaeStage(f"train SAE {folder.name}", folder, plan.sae(key), key.seed))
    folders = SweepFolders(root, TOKENS if unit == "token" else "text")
    activations = {name: folders.activations(name, layer, layer) for name in ("text", "chat")}
    together = digest(sorted(one.folder.name for one in wanted))
    train_saes(session, wanted, activations, folders.corpus, folders.states(f"saes-{together}"))


def cell_session(plan: SweepPlan, cell: Cell, reports: Reports) -> Session:
    """The session of one cell: its MLflow run hangs under the sweep's and has a tag and a parameter for every axis."""
    run, key = plan.run(cell), sae_key(cell, plan.config.extraction.units)
    axes = axes_of(plan, cell)
    settings = {
        name: value for name, value in parameters(json.loads(as_json(plan.config))).items() if name in _SHARED_SETTINGS
    }
    folders = CellFolders(run.out, plan.config.run.out, cell.layer or plan.layers[0], key and plan.sae_folder(key))
    tags = {PARENT_RUN: plan.parent_run_id, **{name: str(value) for name, value in axes.items()}}
    # A trial's process is a worker of Ray's.
    tags |= {SOURCE_NAME: "tune/ablation.py", "command": ""}
    # Of a sweep's models only the best is registered, by the sweep.
    return Session(run, plan.name(cell), {**settings, **axes}, tags, folders, reports, registers_models=False)


def axes_of(plan: SweepPlan, cell: Cell) -> dict[str, Any]:
    """The cell's place on every axis, with the dictionary's size."""
    return {**cell._asdict(), "d_sae": cell.width * plan.d_in}


def do_cell(plan: SweepPlan, cell: Cell, reports: Reports) -> Manifest:
    """Train and evaluate the cell's reward model, as far as that is not done; returns the evaluation's manifest."""
    from sarm.stages.variants import variants

    key = sae_key(cell, plan.config.extraction.units)
    sae = plan.sae_folder(key) if key else plan.cell_folder(cell) / "no-sae"
    model, reward = plan.model(cell.layer), plan.reward(cell)
    with cell_session(plan, cell, reports) as session:
        *_, variant = variants(model, reward, sae)
        check_model(variant.model)
        folder = train_reward_model(session, variant)
        found = _evaluate(session, plan, cell, folder)
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
    settings = plans.evaluation_settings(plan.config.evaluation, cell.seed)
    folder = StageFolder(folders.evaluation, EVALUATION_FOLDER, settings, inputs)
    body = functools.partial(_measure, session, plan, cell, model_folder.name, folder.folder)
    return session.stage("evaluate", folder, body, resume=True)


def _measure(
    session: Session, plan: SweepPlan, cell: Cell, model: str, folder: Path, child: StageRun
) -> Mapping[str, Any]:
    from sarm.evaluate.pairs import measure_pairs
    from sarm.evaluate.sae_quality import measure
    from sarm.stages.evaluate import score_heldout

    scores = score_heldout(session, plan.config.extraction, model, folder)
    measured = measure_pairs(scores)
    figures = {"heldout_accuracy": measured.get("accuracy"), "heldout_margin": measured.get("mean_margin")}
    figures |= dict(zip(("ci95_low", "ci95_high"), measured.get("accuracy_ci95", ()), strict=False))
    if cell.component in WITH_TRAINED_SAE:
        sae, _ = load_sae(session.folders.sae)
        quality = measure(sae, ActivationStore(session.folders.heldout_activations).read_sides()[1])
        figures |= {"fvu_heldout": quality.fvu, "alive_at_reward": quality.counts.alive_share()}
    (folder / "metrics.json").write_text(json.dumps(measured, indent=2))
    child.log_artifact(folder / "metrics.json")
    return {"figures": figures, "rows": scores.num_rows}


class Cost(NamedTuple):
    """Seconds that a cell's own stages took."""

    training: float
    evaluation: float


def cost_of(plan: SweepPlan, cell: Cell) -> Cost:
    """What the cell's finished stages cost, from their manifests."""
    folder = plan.cell_folder(cell)
    (trained,) = [path for path in folder.iterdir() if path.name != "evaluation" and (path / MANIFEST).exists()]
    return Cost(
        read_manifest(trained, SARM_FOLDER).counts["seconds"],
        read_manifest(folder / "evaluation", EVALUATION_FOLDER).counts["seconds"],
    )


def result_of(plan: SweepPlan, cell: Cell, evaluation: Manifest) -> dict[str, float]:
    """The figures of a finished cell: held-out accuracy, its SAE's quality, and what it cost."""
    figures = {key: value for key, value in evaluation.counts["figures"].items() if value is not None}
    key, cost = sae_key(cell, plan.config.extraction.units), cost_of(plan, cell)
    if key is not None:
        sae = read_manifest(plan.sae_folder(key), SAE_FOLDER).counts["figures"]
        figures |= {name: sae[name] for name in ("dead_share", "reward_fidelity") if isinstance(sae.get(name), float)}
    return {**figures, "training_seconds": cost.training, "evaluation_seconds": cost.evaluation}

"""SAE stages: those that are not finished yet learn together, from one read, each into a folder and an MLflow run of its own.

What needs torch or Ray is imported inside, so that a finished stage is a no-op that starts nothing.
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sarm.contracts.manifest import StageFolder
from sarm.data.store.checkpoints import Checkpoints
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.engine.terminal import say
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings
from sarm.settings.sae import AlsoSaes, SaeSettings
from sarm.stages import plan
from sarm.stages.plan import sae_folders

if TYPE_CHECKING:
    from sarm.data.store.activations import ActivationStore


# Of distinct activations: with fewer, more latents do not explain more of unseen ones.
ROWS_A_LATENT = 4


class SaeStage(NamedTuple):
    """One SAE to train: what the stage is called, where it goes, its settings, the seed of its first weights."""

    name: str
    folder: Path
    sae: SaeSettings
    init_seed: int


def train_sae(session: Session, sae: SaeSettings, activations: Mapping[str, Path], also: AlsoSaes = AlsoSaes()) -> None:
    """activations/v1, by the names of `plan.sae_activations` -> SAE, and `also` others beside it, all from one read."""
    folders = session.folders
    wanted = [SaeStage(*member) for member in sae_folders(folders, sae, also, session.run.seed)]
    train_saes(
        session=session,
        wanted=wanted,
        activations=activations,
        corpus=folders.corpus,
        in_training=folders.states(folders.sae.name),
    )


def train_saes(
    session: Session, wanted: Sequence[SaeStage], activations: Mapping[str, Path], corpus: Path, in_training: Path
) -> None:
    """activations/v1 -> the wanted SAEs; what is finished is left as it is.

    `activations` are by the names of `plan.sae_activations`. All must agree on what they read, and in which steps. Raises UserError if they do not, or if a folder holds something else.
    """
    planned = {
        stage.name: plan.sae(
            folder=stage.folder,
            sae=stage.sae,
            seed=session.run.seed,
            activations=activations,
            init_seed=stage.init_seed,
        )
        for stage in wanted
    }
    read = {name.removeprefix("activations/"): path for name, (path, _) in planned[wanted[0].name].inputs.items()}
    folders = {name: folder.open() for name, folder in planned.items()}
    todo = []
    for stage in wanted:
        if folders[stage.name].finished() is None:
            todo.append(stage)
        else:
            session.stage(stage.name, folders[stage.name], lambda _: {})
    if not todo:
        return
    from sarm.data.store.activations import ActivationStore

    stores = {name: ActivationStore(path) for name, path in read.items()}
    check_activations(wanted[0].sae, stores)
    if any(stage.sae.cross_entropy_texts for stage in todo):
        from sarm.data.formats.models import check_predicts

        about = stores["text"].metadata
        check_predicts(ModelSettings(name=about["model"], revision=about.get("revision", "main"), layer=about["layer"]))
    for warning in dict.fromkeys(few_rows(stage.sae, stores) for stage in todo):
        if warning:
            say(warning)
    states = Checkpoints(in_training, _identity([folders[stage.name] for stage in todo]))
    training = _Training(session, todo, read, corpus if "text" in read else None, states)
    session.stages(
        {stage.name: stage.name for stage in todo}, {stage.name: folders[stage.name] for stage in todo}, training
    )
    finish_training(states)


@dataclass(frozen=True)
class _Training:
    """The body of the stages that learn together."""

    session: Session
    stages: Sequence[SaeStage]
    activations: Mapping[str, Path]
    corpus: Path | None
    states: Checkpoints

    def __call__(self, children: Mapping[Any, StageRun]) -> Mapping[Any, Mapping[str, Any]]:
        from sarm.engine.ray.trainer import run_workers
        from sarm.stages import train_sae_worker as worker

        first, *others = [
            worker.SaeMember(
                sae=stage.sae,
                seed=stage.init_seed,
                folder=stage.folder,
                tracking=children[stage.name],
                name=stage.folder.name,
            )
            for stage in self.stages
        ]
        task = worker.SaeTask(
            run=self.session.run,
            sae=first.sae,
            activations=self.activations,
            folder=first.folder,
            tracking=first.tracking,
            states=self.states,
            corpus=self.corpus,
            also=tuple(others),
            init_seed=first.seed,
        )
        trained = run_workers(worker.sae_worker, task, self.session.cluster)
        together = {"one_read": [stage.name for stage in self.stages]}
        return {
            stage.name: _written(stage.folder, own, trained["rejected"], children[stage.name]) | together
            for stage, own in zip(self.stages, (trained, *trained["also"]), strict=True)
        }


def check_activations(sae: SaeSettings, stores: dict[str, "ActivationStore"]) -> None:
    """Raise UserError unless the folders hold activations of one model and layer, with enough rows to train and measure on and something to tell them apart."""
    kinds = {name: {k: v for k, v in store.metadata.items() if k != "dtype"} for name, store in stores.items()}
    first, *others = kinds.items()
    for name, kind in others:
        if kind != first[1]:
            raise UserError(
                f"{name} activations are of {kind}, {first[0]} activations of {first[1]}. Extract both with one --model."
            )
    for name, store in stores.items():
        needed = max(32, sae.batch_size)
        if store.num_rows < needed:
            is_phase = sae.recipe == "papers"
            what = f"the {name} phase" if is_phase else f"activations/{name}"
            other = f"--sae.{name}-epochs 0" if is_phase else "other --sae.shares"
            raise UserError(
                f"{what} has {store.num_rows} activations, at least {needed} are needed (one batch). Add sources, or pass a smaller --sae.batch-size or {other}."
            )
        if not any(0 < value < math.inf for value in store.spread()):
            raise UserError(
                f"the activations in {store.folder} are all alike (every standard deviation is 0 or not finite), so there is nothing to learn from. Look at their model and texts."
            )


def few_rows(sae: SaeSettings, stores: Mapping[str, "ActivationStore"]) -> str | None:
    """What to say where there are fewer rows than a dictionary of this size can learn from; None where there are enough."""
    num_rows = sum(store.num_rows for name, store in stores.items() if sae.recipe == "papers" or name != "chat")
    if num_rows >= ROWS_A_LATENT * sae.d_sae:
        return None
    return (
        f"{num_rows:,} activations are fewer than {ROWS_A_LATENT} a latent: many of the {sae.d_sae:,} latents will stay dead. "
        f"Pass --sae.d-sae {max(sae.k, num_rows // ROWS_A_LATENT)}, or add sources."
    )


def finish_training(states: Checkpoints) -> None:
    """Remove a finished training's states, and the folder that was made for them if they were the last."""
    states.delete()
    with contextlib.suppress(OSError):
        states.folder.parent.rmdir()


def _identity(folders: Sequence[StageFolder]) -> dict[str, Any]:
    own: dict[str, Any] = {"config": folders[0].config, "inputs": folders[0].inputs}
    return own if len(folders) == 1 else {**own, "also": [folder.config for folder in folders[1:]]}


def _written(
    folder: Path, result: Mapping[str, Any], rejected: Mapping[str, Mapping[str, Any]], child: StageRun
) -> dict[str, Any]:
    """History, pictures and rejected rows beside the SAE that the worker wrote; returns the stage's counts."""
    from sarm.report.figures import density_histograms, sae_curves

    (folder / "history.json").write_text(json.dumps(result["history"]))
    child.log_figure(sae_curves(result["history"]), "sae_curves.png")
    child.log_figure(density_histograms(json.loads((folder / "density.json").read_text())), "density.png")
    child.log_artifact(folder / "cfg.json")
    if rejected:
        (folder / "rejected_rows.json").write_text(json.dumps(rejected))
        child.log_artifact(folder / "rejected_rows.json")
    counts = {name: {reason: len(ids) for reason, ids in kinds.items()} for name, kinds in rejected.items()}
    return {"figures": result["figures"], "rejected": counts}

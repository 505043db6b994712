"""SAE stages: those that are not finished yet learn together, from one read, each into a folder and an MLflow run of its own.

What needs torch or Ray is imported inside, so that a finished stage is a no-op that starts nothing.
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sarm.contracts.manifest import StageFolder
from sarm.data.store.checkpoints import Checkpoints
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.session import Session
from sarm.settings.checks import UserError
from sarm.settings.sae import AlsoSaes, SaeSettings
from sarm.stages import plan
from sarm.stages.plan import sae_folders

if TYPE_CHECKING:
    from sarm.data.store.activations import ActivationStore


class SaeStage(NamedTuple):
    """One SAE to train: what the stage is called, where it goes, its settings, the seed of its first weights."""

    name: str
    folder: Path
    sae: SaeSettings
    init_seed: int


def train_sae(session: Session, sae: SaeSettings, also: AlsoSaes = AlsoSaes()) -> None:
    """activations/v1 -> SAE, and `also` others beside it, all from one read."""
    folders = session.folders
    wanted = [SaeStage(*member) for member in sae_folders(folders, sae, also, session.run.seed)]
    train_saes(
        session=session,
        wanted=wanted,
        activations=folders.phases,
        corpus=folders.corpus,
        in_training=folders.states(folders.sae.name),
    )


def train_saes(
    session: Session, wanted: Sequence[SaeStage], activations: Mapping[str, Path], corpus: Path, in_training: Path
) -> None:
    """activations/v1 of the phases `text` and `chat` -> the wanted SAEs; what is finished is left as it is.

    All must agree on epochs and batches. Raises UserError if they do not, or if a folder holds something else.
    """
    first = wanted[0].sae
    planned = [
        plan.sae(
            folder=one.folder, sae=one.sae, seed=session.run.seed, activations=activations, init_seed=one.init_seed
        )
        for one in wanted
    ]
    used = {name.removeprefix("activations/"): path for name, (path, _) in planned[0].inputs.items()}
    todo: list[tuple[SaeStage, StageFolder]] = []
    for one, folder in zip(wanted, (folder.open() for folder in planned), strict=True):
        if folder.finished() is None:
            todo.append((one, folder))
        else:
            session.stage(one.name, folder, lambda _: {})
    if not todo:
        return
    from sarm.data.store.activations import ActivationStore

    check_activations(first, {name: ActivationStore(path) for name, path in used.items()})
    states = Checkpoints(in_training, _identity([folder for _, folder in todo]))

    def train(children: Mapping[Any, StageRun]) -> Mapping[Any, Mapping[str, Any]]:
        from sarm.stages import train_sae_worker as worker

        members = [
            worker.SaeMember(
                sae=one.sae, seed=one.init_seed, folder=one.folder, tracking=children[one.name], name=one.folder.name
            )
            for one, _ in todo
        ]
        first, *others = members
        task = worker.SaeTask(
            run=session.run,
            sae=first.sae,
            text=used.get("text"),
            chat=used.get("chat"),
            folder=first.folder,
            tracking=first.tracking,
            states=states,
            corpus=corpus if "text" in used else None,
            also=tuple(others),
            init_seed=first.seed,
        )
        result = worker.train_on_cluster(task, session.cluster)
        results = [{**one, "rejected": result["rejected"]} for one in (result, *result["also"])]
        together = {"one_read": [one.name for one, _ in todo]}
        return {
            one.name: _written(one.folder, own, children[one.name]) | together
            for (one, _), own in zip(todo, results, strict=True)
        }

    names = {one.name: one.name for one, _ in todo}
    session.stages(names, {one.name: folder for one, folder in todo}, train)
    finish_training(states)


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
            raise UserError(
                f"the {name} phase has {store.num_rows} activations, at least {needed} are needed (one batch). Add sources, or pass a smaller --sae.batch-size or --sae.{name}-epochs 0."
            )
        if not any(0 < value < math.inf for value in store.spread()):
            raise UserError(
                f"the activations in {store.folder} are all alike (every standard deviation is 0 or not finite), so there is nothing to learn from. Look at their model and texts."
            )


def finish_training(states: Checkpoints) -> None:
    """Remove a finished training's states, and the folder that was made for them if they were the last."""
    states.delete()
    with contextlib.suppress(OSError):
        states.folder.parent.rmdir()


def _identity(folders: Sequence[StageFolder]) -> dict[str, Any]:
    own: dict[str, Any] = {"config": folders[0].config, "inputs": folders[0].inputs}
    return own if len(folders) == 1 else {**own, "also": [folder.config for folder in folders[1:]]}


def _written(folder: Path, result: Mapping[str, Any], child: StageRun) -> dict[str, Any]:
    """History, pictures and rejected rows beside the SAE that the worker wrote; returns the stage's counts."""
    from sarm.report.figures import density_histograms, sae_curves

    (folder / "history.json").write_text(json.dumps(result["history"]))
    child.log_figure(sae_curves(result["history"]), "sae_curves.png")
    child.log_figure(density_histograms(json.loads((folder / "density.json").read_text())), "density.png")
    child.log_artifact(folder / "cfg.json")
    rejected: Mapping[str, Mapping[str, Any]] = result["rejected"]
    if rejected:
        (folder / "rejected_rows.json").write_text(json.dumps(rejected))
        child.log_artifact(folder / "rejected_rows.json")
    counts = {name: {reason: len(ids) for reason, ids in kinds.items()} for name, kinds in rejected.items()}
    return {"figures": result["figures"], "rejected": counts}

"""Where a chain of stages stands: what is done, what a job would do, and what it may not touch.

Reads manifests alone, so that a job is refused before anything is paid for, and a dry run loads nothing heavy.
"""

import contextlib
import datetime
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sarm.contracts.folders import (
    SAE_FOLDER,
    Folders,
)
from sarm.contracts.manifest import MANIFEST, difference_of, record_of, sha256_of, write_atomically
from sarm.engine.stopping import JOB_TOKEN, SUPERVISED
from sarm.engine.writer_lock import WriterLock
from sarm.settings.checks import UserError
from sarm.settings.jobs import FeaturePages, Pipeline
from sarm.settings.run import ChainSettings, StageName
from sarm.stages.plan import FolderPlan
from sarm.stages.stage import STAGES, existing

# The run in MLflow: its parameters cannot change, so that other settings get a new one.
_RUN_FILE = "run.json"
# Which supervised job moved a folder's content aside.
_MOVED_BY = "moved-by"

_ORDER = tuple(STAGES)

State = Literal["done", "goes on", "to do", "refused"]


class StageState(NamedTuple):
    """How a stage of a job stands; `why` explains a refusal."""

    name: StageName
    state: State
    why: str = ""


class ChainState(NamedTuple):
    """Every stage that the job runs, in order, and what lies there that its work would make stale."""

    stages: tuple[StageState, ...]
    stale: tuple[str, ...] = ()
    """Folders of later stages that were made from what the job makes anew."""

    @property
    def is_done(self) -> bool:
        return all(stage.state == "done" for stage in self.stages)

    def is_todo(self, name: StageName) -> bool:
        """Whether the job runs the stage and it is not done."""
        return any(stage.name == name and stage.state != "done" for stage in self.stages)

    def refuse(self, out: Path) -> None:
        """Raise UserError if any stage cannot run, or would leave later folders that no longer fit; nothing has been touched then."""
        refused = [stage for stage in self.stages if stage.state == "refused"]
        if refused:
            whys = "; ".join(stage.why for stage in refused)
            raise UserError(
                f"{whys}. Pass the settings that it was made with, another --out, or --redo-from {refused[0].name}, which moves what was made with others aside. Nothing has been started."
            )
        if self.stale:
            first = next(stage.name for stage in self.stages if stage.state != "done")
            raise UserError(
                f"{first} would be done again, and {', '.join(self.stale)} in {out} {'was' if len(self.stale) == 1 else 'were'} made from what it made before. Pass --redo-from {first}, which moves {'that' if len(self.stale) == 1 else 'those'} aside, or another --out. Nothing has been started."
            )


def scope_of(config: Any) -> tuple[StageName, ...]:
    """The stages that the job of this config runs, in order: its own, and those that it reads, unless it is asked for its own `only`."""
    target: StageName = config.stage
    if isinstance(config, Pipeline) and not isinstance(config, FeaturePages):
        if config.run.only:
            raise UserError("the pipeline is all stages, so that --only has no meaning. Pass it to the job of one stage.")  # fmt: skip
        return _ORDER if config.pages.in_pipeline else _ORDER[: _ORDER.index("evaluate") + 1]
    if config.run.only:
        return (target,)
    upto = _ORDER[: _ORDER.index(target) + 1]
    # Contexts are of a model's training, whether it was evaluated or not.
    return tuple(stage for stage in upto if target != "collect_contexts" or stage != "evaluate")


def state_of(config: Any) -> ChainState:
    """How the stages of a job stand; with `redo_from`, as they will once its folders have been moved.

    Raises UserError for folders that belong to something else.
    """
    run: ChainSettings = config.run
    folders, scope = Folders(run.out), scope_of(config)
    if run.redo_from is not None and run.redo_from not in scope:
        raise UserError(f"--redo-from {run.redo_from} is no stage that this job runs. Pass one of {', '.join(scope)}.")
    gone = set(folders_from(run.redo_from, run.out)) if run.redo_from else set()
    remade: set[Path] = set()
    stages, stale = [], []
    for stage in STAGES:
        plans = STAGES[stage].folders(config, folders) if stage in scope else []
        if plans:
            stages.append(_state(stage=stage, plans=plans, folders=folders, gone=gone, remade=remade))
        if not remade:
            continue
        for folder, schema in _existing(stage, folders, gone):
            if folder in {plan.folder for plan in plans} or (record := record_of(folder, schema)) is None:
                continue
            if any(path in remade for path, _ in _inputs(folder, record, folders)):
                remade.add(folder)
                stale.append(folder.relative_to(run.out).as_posix())
    return ChainState(tuple(stages), tuple(stale))


def folders_from(stage: StageName, out: Path) -> list[Path]:
    """What a stage and all that read what it makes have written under a run's folder, and their training states."""
    folders, found = Folders(out), []
    for name in _ORDER[_ORDER.index(stage) :]:
        if stage == "evaluate" and name == "collect_contexts":
            # Contexts, and what judges were paid to say of them, are of a model, whether it was evaluated or not.
            continue
        own = [folder for folder, _ in existing(name, folders)]
        found += [
            *own,
            *(folders.states(folder.name) for folder in own),
            *(out / file for file in STAGES[name].files),
        ]
        found += sorted((out / "training").glob(pattern)) if (pattern := STAGES[name].states) else []
    return [path for path in dict.fromkeys(found) if path.exists()]


def move_aside(config: Any) -> Path | None:
    """Do what `redo_from` asks for: move the folders of that stage, and what was made from them, beside `out`; returns where they are.

    Raises UserError if somebody writes to one of the folders; nothing has been moved then.
    """
    run: ChainSettings = config.run
    if run.redo_from is None or was_moved(run.out):
        return None
    return move(folders_from(run.redo_from, run.out), run.out)


def was_moved(out: Path) -> bool:
    """Whether an earlier start of this supervised job has moved folders aside: it goes on with what it has made anew since."""
    token = os.environ.get(JOB_TOKEN)
    return bool(token) and any(path.read_text() == token for path in _aside(out).glob(f"*/{_MOVED_BY}"))


def move(paths: Sequence[Path], out: Path) -> Path | None:
    """Move what a run's folder holds at `paths`, and its run in MLflow, to a new folder beside `out`; None if there is nothing.

    Raises UserError if somebody writes to one of the folders, or below; nothing has been moved then.
    """
    if not paths:
        return None
    aside = _aside(out) / datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
    run_file = out / _RUN_FILE
    with contextlib.ExitStack() as locks:
        if not os.environ.get(SUPERVISED):
            # Else the supervisor of this very job holds it.
            locks.enter_context(WriterLock(out, "--redo-from"))
        for path in paths:
            for folder in [path, *(_locked_by(lock) for lock in sorted(path.rglob(".*.lock")))]:
                locks.enter_context(WriterLock(folder, "--redo-from"))
        for path in [*paths, *([run_file] if run_file.exists() else [])]:
            target = aside / path.relative_to(out)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        # Last: who is killed before this begins again.
        write_atomically(aside / _MOVED_BY, os.environ.get(JOB_TOKEN, ""))
    return aside


def _aside(out: Path) -> Path:
    return out.with_name(f"{out.name}.aside")


def _locked_by(lock: Path) -> Path:
    return lock.with_name(lock.name.removeprefix(".").removesuffix(".lock"))


def _state(
    stage: StageName, plans: Sequence[FolderPlan], folders: Folders, gone: Collection[Path], remade: set[Path]
) -> StageState:
    """How one stage stands; the folders that it will write join `remade`."""
    whys, has_begun, todo = [], False, []
    for plan in plans:
        record = None if plan.folder in gone else record_of(plan.folder, plan.schema)
        if record is None:
            todo.append(plan.folder)
            continue
        is_finished = (plan.folder / MANIFEST).exists()
        has_begun = has_begun or not is_finished
        todo += [] if is_finished else [plan.folder]
        if is_finished and "attached" in record.get("config", {}):
            # A reward model of others with a dictionary: no setting of the chain decides it. Training in its place is refused by the folder.
            continue
        if plan.settings is not None and (difference := difference_of(record, plan.settings)):
            whys.append(f"{plan.folder} was made with {difference}")
        elif changed := _changed(plan, record, folders, remade):
            whys.append(f"{plan.folder} was made from another {', '.join(changed)}")
    remade.update(todo)
    if whys:
        remade.update(plan.folder for plan in plans)
        return StageState(stage, "refused", "; ".join(whys))
    return StageState(stage, "done" if not todo else "goes on" if has_begun else "to do")


def _changed(plan: FolderPlan, record: Mapping[str, Any], folders: Folders, remade: Collection[Path]) -> list[str]:
    """Names of the inputs that are not, or will no longer be, what the folder was made from."""
    changed = set((plan.inputs.keys() ^ record["inputs"].keys()) - plan.may_lack)
    for path, name in _inputs(plan.folder, record, folders):
        manifest = path / MANIFEST
        if path in remade or not manifest.exists() or sha256_of(manifest) != record["inputs"][name]:
            changed.add(name)
    return sorted(changed)


def _inputs(folder: Path, record: Mapping[str, Any], folders: Folders) -> Iterable[tuple[Path, str]]:
    """The folders of this run that a recorded folder was made from, with the names that its record gives them."""
    # That one's SAE is another run's.
    names = [name for name in record["inputs"] if not (folder.name == "sarm_token_sae" and name == SAE_FOLDER)]
    return [(path, name) for name, (path, _) in folders.inputs(*names).items()]


def _existing(stage: StageName, folders: Folders, gone: Collection[Path]) -> list[tuple[Path, str]]:
    return [(path, schema) for path, schema in existing(stage, folders) if path not in gone]

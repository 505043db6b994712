"""A run of one or more stages over one output folder: its MLflow parent, its Ray cluster (started when first needed), its folders."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sarm.contracts.folders import SAE_FOLDER, Folders
from sarm.contracts.manifest import Manifest, StageFolder, write_atomically
from sarm.contracts.untrusted import read_json
from sarm.engine.live.display import note_work
from sarm.engine.mlflow import run_card
from sarm.engine.mlflow.tracking import StageRun, ended_by, tracking_uri, untracked
from sarm.engine.peak_memory import peak_memory
from sarm.engine.ray.cluster import check_machine, connect, nodes_without
from sarm.engine.ray.look import look_at_devices, tell
from sarm.engine.ray.room import Cluster
from sarm.engine.stopping import leave_if_asked
from sarm.engine.terminal import say
from sarm.engine.writer_lock import WriterLock
from sarm.settings.checks import UserError
from sarm.settings.identity import as_json
from sarm.settings.run import RunSettings

if TYPE_CHECKING:
    from sarm.engine.mlflow.tracker import Tracker
    from sarm.engine.passes import Counts, Pass

RUN_FILE = "run.json"


Body = Callable[[Mapping[Any, StageRun]], Mapping[Any, Mapping[str, Any]]]


class Reports(NamedTuple):
    """Callbacks of Ray Train's controller that hear of a training every `every_steps` steps; 0 is never."""

    every_steps: int = 0
    callbacks: Sequence[Any] = ()


@dataclass
class Session:
    """What the stages of one run share."""

    run: RunSettings
    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of its MLflow run."""
    own_folders: Folders | None = None
    """Where its stages write, if not each in its usual place under `run.out`."""
    reports: Reports = Reports()
    """To whom else its reward training tells how it goes."""
    registers_models: bool = True
    """Whether each of its reward models is registered in MLflow."""
    needs: tuple[int, ...] = ()
    """Numbers of workers and actors that its stages ask for: what the cluster has no room for is refused before the first of them begins."""
    settings: Mapping[str, str] | None = None
    """Parameters that tell its MLflow run from others; None: those of `params`."""
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _cluster: Cluster | None = None
    _tracker: "Tracker | None" = None
    _verified: set[Path] = field(default_factory=set)

    @property
    def folders(self) -> Folders:
        return self.own_folders or Folders(self.run.out)

    @property
    def cluster(self) -> Cluster:
        """The Ray cluster, joined or started at the first stage that needs it."""
        if self._cluster is None:
            say("starting Ray")
            self._cluster = self._stack.enter_context(connect(self.run))
            if self._cluster.num_nodes > 1 and self.tracker.uri.startswith("sqlite:"):
                raise UserError(
                    f"the cluster has {self._cluster.num_nodes} nodes, and {self.tracker.uri} is a file on one of them. Pass --mlflow-uri http://HOST:PORT."
                )
            if self._cluster.num_nodes > 1 and (blind := nodes_without(self.run.out)):
                raise UserError(
                    f"{self.run.out} is not the same folder on {', '.join(blind)}: results would be scattered. Pass an --out that all nodes share."
                )
            self._cluster.check_room(self.run, self.needs)
            devices = look_at_devices(self._cluster, self.run)
            tell(devices)
            self.tracker.parent.set_tags(devices.tags)
        return self._cluster

    def look(self) -> None:
        """Join or start the cluster now, and say what it is; raises UserError for what the stages cannot work on."""
        assert self.cluster is not None

    @property
    def tracker(self) -> "Tracker":
        """The MLflow parent run, continued under the id in `run.json` if the output folder has been worked on before."""
        if self._tracker is None:
            from sarm.engine.mlflow.tracker import Tracker

            path = self.run.out / RUN_FILE
            known = _known_run(path)
            few = run_card.parameters(self.params) if self.settings is None else self.settings
            tags = run_card.origin() | dict(self.tags)
            tags |= {run_card.NOTE: run_card.description(few, tags)}
            self._tracker = Tracker(
                run=self.run, run_name=self.name, parent_run_id=known.get("mlflow_run_id"), tags=tags, params=few
            )
            self._tracker.parent.log_config(self.params, tags[run_card.SOURCE_NAME], few)
            self.run.out.mkdir(parents=True, exist_ok=True)
            write_atomically(
                path, json.dumps({"mlflow_run_id": self._tracker.parent.run_id, "mlflow_uri": self._tracker.uri})
            )
        return self._tracker

    def run_pass(self, work: "Pass") -> "Counts":
        """Do what is not done yet of a pass, with the actors of this run (`run_over`)."""
        from sarm.engine.ray.passes import run_over

        return run_over(work, self.run, self.cluster)

    def stage(
        self, name: str, folder: StageFolder, body: Callable[[StageRun], Mapping[str, Any]], *, resume: bool = False
    ) -> Manifest:
        """Do a stage unless it is done: claim its folder, run `body` inside an MLflow child run, write the manifest.

        `body` returns the stage's counts; `figures` among them are logged as metrics. With `resume` it goes on with what an unfinished run left.
        """
        return self.stages({name: name}, {name: folder}, lambda children: {name: body(children[name])}, resume=resume)[
            name
        ]

    def stages(
        self,
        names: Mapping[Any, str],
        folders: Mapping[Any, StageFolder],
        body: Body,
        *,
        resume: bool = False,
    ) -> dict[Any, Manifest]:
        """Do those of several stages that are not done, in one go. Stages of one name share an MLflow child run.

        `body` gets the child run of each, by key, and returns their counts. With `resume`, what an unfinished run left in the folders is
        kept for it to go on with.
        """
        manifests = {key: folder.finished() for key, folder in folders.items()}
        for key, manifest in manifests.items():
            if manifest is not None:
                say(f"{names[key]}: already done, {folders[key].folder}")
        todo = [key for key, manifest in manifests.items() if manifest is None]
        if todo:
            with contextlib.ExitStack() as locks:
                for key in todo:
                    locks.enter_context(WriterLock(folders[key].folder, names[key]))
                # Who wrote until now may have finished.
                manifests |= {key: folders[key].finished() for key in todo}
                if todo := [key for key in todo if manifests[key] is None]:
                    manifests |= self._do(names, {key: folders[key] for key in todo}, body, resume=resume)
        return {key: manifest for key, manifest in manifests.items() if manifest is not None}

    def _do(
        self, names: Mapping[Any, str], folders: Mapping[Any, StageFolder], body: Body, *, resume: bool
    ) -> dict[Any, Manifest]:
        leave_if_asked()
        note_work(", ".join(dict.fromkeys(names[key] for key in folders)))
        for name in dict.fromkeys(names[key] for key in folders):
            say(f"{name}: started")
        started = time.monotonic()
        for folder in folders.values():
            folder.verify_inputs(self._verified)
        notes = {key: folder.claim(resume=resume) for key, folder in folders.items()}
        manifests, children = {}, {}
        with contextlib.ExitStack() as runs:
            named: dict[str, StageRun] = {}
            for key, folder in folders.items():
                if (name := names[key]) not in named:
                    known, params = notes[key].get("mlflow_run_id"), run_card.flat_params(folder.config)
                    named[name] = runs.enter_context(self.tracker.stage(name, known, params))
                children[key] = named[name]
                folder.note(mlflow_run_id=children[key].run_id)
            with peak_memory() as memory:
                counted = body(children)
            took = {"seconds": round(time.monotonic() - started, 2), "peak_rss_gb": round(memory.peak / 1e9, 3)}
            together = {"made_together": len(folders)} if len(folders) > 1 else {}
            for key, folder in folders.items():
                counts = {**counted[key], **took, **together}
                child, manifests[key] = children[key], folder.finish(counts)
                self._verified.add(folder.folder)
                figures = counts.get("figures", {})
                numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
                child.log_metrics({**numbers, **took})
                child.log_artifact(folder.folder / "manifest.json")
                self._name_inputs(child, [*folder.read_manifests, manifests[key]])
        note_work("")
        for name in named:
            say(f"{name}: done in {took['seconds']:.0f} s")
        return manifests

    def _name_inputs(self, child: StageRun, manifests: Sequence[Manifest]) -> None:
        """Tell MLflow the data sets of a stage, and the parent the dictionary that it reads, which its own config may not hold."""
        for manifest in manifests:
            if data := run_card.data_set(manifest):
                child.log_data_set(data)
                self.tracker.parent.log_data_set(data)
            if manifest.schema == SAE_FOLDER and self.own_folders is None:
                self.tracker.parent.log_params(
                    {name: manifest.config[name] for name in ("d_sae", "k") if name in manifest.config}
                )

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: Any) -> None:
        if self._tracker is not None:
            self._tracker.parent.end(ended_by(error))
        self._stack.close()


@contextlib.contextmanager
def tracked_folder(folder: StageFolder, run: RunSettings) -> Iterator[StageRun]:
    """Claim the folder of a job that is one stage, and its own MLflow run, continued if the folder has been worked on before.

    The run ends as the body does; the body finishes the folder.
    """
    # No session: such a folder is `--out` itself, where a session keeps `run.json` beside the folders of its stages, and claiming it would
    # throw that away. Its one MLflow run would become a parent and a child. And one of these jobs asks judges in an event loop.
    with WriterLock(folder.folder, run.out.name):
        note_work(run.out.name)
        yield from _tracked(folder, run)


def _tracked(folder: StageFolder, run: RunSettings) -> Iterator[StageRun]:
    if (own_run := untracked(run)) is not None:
        folder.claim()
        yield own_run
        return
    from sarm.engine.mlflow.tracker import Tracker

    notes = folder.claim()
    tracker = Tracker(run, run.out.name, notes.get("mlflow_run_id"))
    folder.note(mlflow_run_id=tracker.parent.run_id)
    try:
        yield tracker.parent
    except BaseException as error:
        tracker.parent.end(ended_by(error))
        raise
    tracker.parent.end(ended_by(None))


def open_session(config: Any, *, is_guest: bool = False) -> Session:
    """The session of a job's config: named after its output folder, with the settings that tell runs apart as the parent run's parameters.

    `is_guest` says that another job's folder is worked on: its parent run goes on, and the settings are on the children alone.

    Raises UserError for an unusable MLflow address or more workers than fit this machine, before any folder is claimed.
    """
    tracking_uri(config.run)
    check_machine(config.run)
    settings = {} if is_guest else run_card.identifying(config)
    return Session(config.run, config.run.out.name, json.loads(as_json(config)), settings=settings)


def _known_run(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is torn ({error}). Delete it: the folder's next run gets a new MLflow parent run."
        ) from error

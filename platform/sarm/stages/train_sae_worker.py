"""SAE training on Ray Train: what each worker runs, and the trainer that starts them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sarm.data.store.activations import ActivationStore
from sarm.data.store.checkpoints import Checkpoint, Checkpoints
from sarm.data.store.shuffled_rows import ShuffledRows, memory_for_rows
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.ray.cluster import Cluster
from sarm.engine.ray.stall import StallGuard
from sarm.engine.ray.trainer import (
    Progress,
    preemption_notice,
    run_workers,
    worker_device,
    worker_storage,
    workers_on_device,
)
from sarm.engine.ray.training_states import WorkerStates
from sarm.evaluate.sae_quality import measure
from sarm.nn.architectures import OPTIONS, build_sae
from sarm.nn.sae import standardise
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings
from sarm.settings.sae import OF_ONE_DICTIONARY, SaeSettings
from sarm.stages.train_sae_folder import write_sae_folder
from sarm.train.phase_shift import absorb_phase_shift_
from sarm.train.sae import Phase, SaeTraining

_SAMPLE_ROWS = 16 * 1024
_OF_THE_SAE = ("architecture", "d_sae", "k", *OPTIONS)


@dataclass(frozen=True)
class SaeMember:
    """One of the SAEs that learn from one read: its settings, the seed of its first weights, and where it goes."""

    sae: SaeSettings
    seed: int
    folder: Path
    tracking: StageRun
    name: str = ""
    """What its lines of progress have behind the phase."""


@dataclass(frozen=True)
class SaeTask:
    """What a worker needs to know; picklable. A phase whose folder is None is left out.

    `also` are further SAEs for the same rows in the same order, each step read and standardised once for all of them. They may
    differ in all that is of one dictionary (width, k, architecture, AuxK, seed); raises UserError if they differ in more.
    """

    run: RunSettings
    sae: SaeSettings
    text: Path | None
    chat: Path | None
    folder: Path
    tracking: StageRun
    states: Checkpoints
    corpus: Path | None = None
    also: tuple[SaeMember, ...] = ()
    init_seed: int | None = None
    """Seed of the first weights; None: the run's, which also decides the order of rows."""

    def __post_init__(self) -> None:
        for member in self.also:
            for field in dataclasses.fields(self.sae):
                mine, others = getattr(self.sae, field.name), getattr(member.sae, field.name)
                if field.name not in OF_ONE_DICTIONARY and mine != others:
                    raise UserError(
                        f"SAEs that learn from one read need one {field.name}, got {mine} and {others}. Train them apart."
                    )

    def members(self) -> list[SaeMember]:
        """All SAEs, the task's own first."""
        seed = self.run.seed if self.init_seed is None else self.init_seed
        return [SaeMember(self.sae, seed, self.folder, self.tracking), *self.also]


def train_on_cluster(task: SaeTask, cluster: Cluster) -> dict[str, Any]:
    """Train on the cluster's workers and leave the SAE in `task.folder`; returns its figures and history.

    Goes on from the newest of `task.states` if there is one.
    """
    threads = cluster.cpus_each(task.run, task.run.num_workers)
    trained: dict[str, Any] = run_workers(
        name="sae",
        worker=sae_worker,
        task=task,
        run=task.run,
        folder=task.folder,
        cluster=cluster,
        threads=threads,
        states=task.states,
    )
    return trained


def sae_worker(task: SaeTask) -> dict[str, Any] | None:
    """One Ray Train worker: both phases, then the latents' statistics; rank 0 writes the folders and returns the figures."""
    device, rank = worker_device(), dist.get_rank() if dist.is_initialized() else 0
    guard = StallGuard(worker_storage(), rank)
    states = WorkerStates(
        task.states,
        task.sae.checkpoint_every_steps,
        task.sae.checkpoint_every_seconds,
        notice=preemption_notice,
        beat=guard.beat,
    )
    found = states.latest()
    stores = {
        name: ActivationStore(path) for name, path in (("text", task.text), ("chat", task.chat)) if path is not None
    }
    rows = {name: _training_rows(store, task.sae, device) for name, store in stores.items()}
    settings = {"text": (task.sae.text_epochs, task.sae.lr), "chat": (task.sae.chat_epochs, task.sae.chat_lr)}
    samples = {name: standardise(source.sample(task.run.seed, _SAMPLE_ROWS)) for name, source in rows.items()}
    names, members = list(rows), task.members()
    d_in = stores[names[0]].d_in
    saes = [build_sae(d_in=d_in, **{name: getattr(member.sae, name) for name in _OF_THE_SAE}) for member in members]
    saved: Any = None if found is None else _shared_state(found, task.sae, states.world)
    histories: list[dict[str, Any]] = [{} for _ in members] if saved is None else saved["histories"]
    figures: list[dict[str, Any]] = [{} for _ in members] if saved is None else saved["figures"]
    first_step = 0
    if saved is None:
        for sae, member in zip(saes, members, strict=True):
            sae.initialise_(samples[names[0]], torch.Generator().manual_seed(member.seed), member.sae.b_dec_init)
    for number, name in enumerate(names):
        if saved is not None and number < saved["phase"]:
            continue
        is_resumed = saved is not None and number == saved["phase"]
        if number > 0 and not is_resumed:
            for sae in saes:
                absorb_phase_shift_(sae, samples[names[number - 1]].to(device), samples[name].to(device))
        epochs, lr = settings[name]
        logs = [
            Progress(f"sae_{name}", member.tracking, ("loss", "fvu", "alive_share"), member.name) for member in members
        ]
        phase = Phase(name=name, rows=rows[name], heldout=rows[name].heldout, epochs=epochs, lr=lr)
        member_configs = [member.sae for member in members]
        training = SaeTraining(
            saes=saes,
            phase=phase,
            sae_configs=member_configs,
            seed=task.run.seed + number,
            device=device,
            first_step=first_step,
            split=task.sae.split,
        )
        if found is not None and is_resumed:
            training.load_state_dict(states.own_state(found) if task.sae.split == "latents" else saved["training"])
            states.restore_random(found)
            for log, history in zip(logs, histories, strict=True):
                log.history = history[name]
            if rank == 0:
                print(f"sae_{name} goes on after step {training.num_steps}", flush=True)
        for log, history in zip(logs, histories, strict=True):
            history[name] = log.history

        def state(training: SaeTraining = training, number: int = number) -> tuple[Any, Any]:
            learnt, is_own = training.state_dict(), task.sae.split == "latents"
            shared = {
                "phase": number,
                "histories": histories,
                "figures": figures,
                "split": [task.sae.split, states.world],
                "training": None if is_own else learnt,
            }
            return shared, learnt if is_own else None

        def after_step(training: SaeTraining = training, state: Any = state) -> None:
            guard.beat()
            states.after_step(training.num_steps, state)

        with guard:
            training.run(logs, after_step=after_step)
        saes = [learner.whole() for learner in training.learners]
        first_step = training.num_steps
        for sae, of_sae in zip(saes, figures, strict=True):
            of_sae[f"fvu_{name}_after_its_phase"] = measure(sae, rows[name].heldout, device).fvu
    states.finish()
    if rank != 0:
        return None
    results = []
    for sae, member, of_sae, history in zip(saes, members, figures, histories, strict=True):
        heldout = {name: rows[name].heldout for name in names}
        of_sae |= write_sae_folder(
            sae=sae,
            config=member.sae,
            folder=member.folder,
            stores=stores,
            heldout=heldout,
            seed=task.run.seed,
            device=device,
        )
        if task.corpus is not None and member.sae.cross_entropy_texts:
            # Seconds of imports, for a language model that is rarely asked for.
            from sarm.stages.train_sae_cross_entropy import cross_entropy_figures

            metadata, share = stores[names[0]].metadata, member.sae.heldout_share
            of_sae |= cross_entropy_figures(
                sae=sae,
                corpus=task.corpus,
                activations=metadata,
                num_texts=member.sae.cross_entropy_texts,
                heldout_share=share,
                device=device,
            )
        results.append({"figures": of_sae, "history": history})
    rejected = {name: source.rejected for name, source in rows.items() if source.rejected}
    return {**results[0], "rejected": rejected, "also": results[1:]}


def _shared_state(found: Checkpoint, sae: SaeSettings, world: int) -> Any:
    saved = found.read("shared")
    split, num_workers = saved["split"]
    if "latents" in (split, sae.split) and (split, num_workers) != (sae.split, world):
        raise UserError(
            f"the training state in {found.folder} is split by {split} over {num_workers} workers, asked for {sae.split} over {world}. Pass --sae.split {split} --num-workers {num_workers}, or delete it to start over."
        )
    return saved


def _training_rows(store: ActivationStore, sae: SaeSettings, device: torch.device) -> ShuffledRows:
    rows = ShuffledRows(
        store, sae.heldout_share, memory_bytes=memory_for_rows(device, workers_on_device(device)), device=device
    )
    if rows.num_rows < sae.batch_size:
        raise UserError(
            f"{store.folder} has {rows.num_rows} rows to train on ({rows.num_rejected} are constant, NaN or infinite), fewer than a batch of {sae.batch_size}. Add sources, or pass a smaller --sae.batch-size."
        )
    return rows

"""SAE training on Ray Train: what each worker runs, and the trainer that starts them."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sarm.data.store.activations import ActivationStore
from sarm.data.store.checkpoints import Checkpoint, Checkpoints
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.ray.stall import StallGuard
from sarm.engine.ray.trainer import (
    preemption_notice,
    worker_device,
    worker_storage,
    workers_on_device,
)
from sarm.engine.ray.training_progress import Progress
from sarm.engine.ray.training_states import WorkerStates
from sarm.evaluate.sae_quality import LatentCounts, measure
from sarm.nn.architectures import OPTIONS, build_sae
from sarm.nn.precision import allow_tf32_
from sarm.nn.sae import Sae
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings
from sarm.settings.sae import OF_ONE_DICTIONARY, SaeSettings
from sarm.stages.train_sae_folder import latent_counts, write_sae_folder
from sarm.stages.train_sae_rows import SaeRows, rows_of, workers_together
from sarm.training.phase_shift import absorb_phase_shift_
from sarm.training.sae import SaeTraining

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
    """What a worker needs to know; picklable. `activations` are those that the recipe reads, by the names that manifests give them.

    `also` are further SAEs for the same rows in the same order, each step read and standardised once for all of them. They may
    differ in all that is of one dictionary (width, k, architecture, AuxK, seed); raises UserError if they differ in more.
    """

    run: RunSettings
    sae: SaeSettings
    activations: Mapping[str, Path]
    folder: Path
    tracking: StageRun
    states: Checkpoints
    corpus: Path | None = None
    also: tuple[SaeMember, ...] = ()
    init_seed: int | None = None
    """Seed of the first weights; None: the run's, which also decides the order of rows."""
    name: str = "sae"
    """What messages call the training."""

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


class _Begun(NamedTuple):
    """A training that goes on: its newest checkpoint, and what of it all workers share."""

    checkpoint: Checkpoint
    shared: Mapping[str, Any]


@dataclass(frozen=True)
class _Worker:
    """What the steps of one worker share."""

    task: SaeTask
    device: torch.device
    guard: StallGuard
    states: WorkerStates
    rows: SaeRows
    histories: list[dict[str, Any]]
    """Of each SAE, by phase; training adds to them."""
    figures: list[dict[str, Any]]
    """Of each SAE; training adds to them."""


def sae_worker(task: SaeTask) -> dict[str, Any] | None:
    """One Ray Train worker: every phase, then the latents' statistics; rank 0 writes the folders and returns the figures."""
    device = worker_device()
    allow_tf32_()
    guard = StallGuard(worker_storage(), dist.get_rank() if dist.is_initialized() else 0)
    states = WorkerStates(
        task.states,
        task.sae.checkpoint_every_steps,
        task.sae.checkpoint_every_seconds,
        notice=preemption_notice,
        beat=guard.beat,
    )
    checkpoint = states.latest()
    rows = rows_of(task.sae, task.activations, task.run.seed, device, workers_on_device(device))
    members = task.members()
    d_in = rows.samples[0].shape[1]
    saes = [build_sae(d_in=d_in, **{name: getattr(member.sae, name) for name in _OF_THE_SAE}) for member in members]
    begun = None if checkpoint is None else _Begun(checkpoint, _shared_state(checkpoint, task.sae, states.world))
    worker = _Worker(
        task=task,
        device=device,
        guard=guard,
        states=states,
        rows=rows,
        histories=[{} for _ in members] if begun is None else begun.shared["histories"],
        figures=[{} for _ in members] if begun is None else begun.shared["figures"],
    )
    if begun is None:
        for sae, member in zip(saes, members, strict=True):
            sae.initialise_(rows.samples[0], torch.Generator().manual_seed(member.seed), member.sae.b_dec_init)
    first, first_step = 0 if begun is None else begun.shared["phase"], 0
    for number in range(first, len(rows.phases)):
        own = begun if number == first else None
        if number > 0 and own is None:
            for sae in saes:
                absorb_phase_shift_(sae, rows.samples[number - 1].to(device), rows.samples[number].to(device))
        training = _run_phase(worker=worker, number=number, saes=saes, first_step=first_step, begun=own)
        saes, first_step = [learner.whole() for learner in training.learners], training.num_steps
        _measure_phase(worker, number, saes)
    states.finish()
    counts = _counts(worker, saes)
    return _write(worker, saes, counts) if states.rank == 0 else None


def _run_phase(worker: _Worker, number: int, saes: Sequence[Sae], first_step: int, begun: _Begun | None) -> SaeTraining:
    """Train through one phase, from its first step or where it had `begun`; returns the training at its end."""
    task, phase = worker.task, worker.rows.phases[number]
    name, members, is_own = phase.name, task.members(), task.sae.split == "latents"
    logs = [Progress(f"sae_{name}", member.tracking, ("loss", "fvu", "alive_share"), member.name) for member in members]
    training = SaeTraining(
        saes=saes,
        phase=phase,
        sae_configs=[member.sae for member in members],
        seed=task.run.seed + number,
        device=worker.device,
        first_step=first_step,
        split=task.sae.split,
    )
    if begun is not None:
        training.load_state_dict(worker.states.own_state(begun.checkpoint) if is_own else begun.shared["training"])
        worker.states.restore_random(begun.checkpoint)
        for log, history in zip(logs, worker.histories, strict=True):
            log.history = history[name]
        if worker.states.rank == 0:
            print(f"sae_{name} goes on after step {training.num_steps}", flush=True)
    for log, history in zip(logs, worker.histories, strict=True):
        history[name] = log.history

    def state() -> tuple[Any, Any]:
        learnt = training.state_dict()
        shared = {
            "phase": number,
            "histories": worker.histories,
            "figures": worker.figures,
            "split": [task.sae.split, worker.states.world],
            "training": None if is_own else learnt,
        }
        return shared, learnt if is_own else None

    def after_step() -> None:
        worker.guard.beat()
        worker.states.after_step(training.num_steps, state)

    with worker.guard:
        training.run(logs, after_step=after_step)
    return training


def _measure_phase(worker: _Worker, number: int, saes: Sequence[Sae]) -> None:
    phase = worker.rows.phases[number]
    for sae, figures in zip(saes, worker.figures, strict=True):
        found = measure(sae, phase.heldout, worker.device, prepare=phase.prepare)
        figures[f"fvu_{phase.name}_after_its_phase"] = found.fvu


def _counts(worker: _Worker, saes: Sequence[Sae]) -> list[dict[str, LatentCounts]]:
    """What fires of every finished SAE, counted by all workers together."""
    for sae in saes:
        if worker.rows.reward_map is not None:
            worker.rows.reward_map.fold_(sae)
    return [latent_counts(sae, worker.rows, worker.device, workers_together()) for sae in saes]


def _write(worker: _Worker, saes: Sequence[Sae], counts: Sequence[Mapping[str, LatentCounts]]) -> dict[str, Any]:
    """Write every SAE's folder; returns the figures and history of the task's own SAE, of those `also` learnt, and the rejected rows."""
    task, rows, device = worker.task, worker.rows, worker.device
    chat = ActivationStore(task.activations["chat"]) if "chat" in task.activations else None
    about = ActivationStore(next(iter(task.activations.values()))).metadata
    results = []
    trained = zip(saes, counts, task.members(), worker.figures, worker.histories, strict=True)
    for sae, found, member, figures, history in trained:
        figures |= write_sae_folder(
            sae=sae,
            config=member.sae,
            folder=member.folder,
            rows=rows,
            counts=found,
            chat=chat,
            activations=about,
            seed=task.run.seed,
            device=device,
        )
        if task.corpus is not None and member.sae.cross_entropy_texts:
            # Seconds of imports, for a language model that is rarely asked for.
            from sarm.stages.train_sae_cross_entropy import cross_entropy_figures

            figures |= cross_entropy_figures(
                sae=sae,
                corpus=task.corpus,
                activations=about,
                num_texts=member.sae.cross_entropy_texts,
                heldout_share=member.sae.heldout_share,
                device=device,
            )
        results.append({"figures": figures, "history": history})
    return {**results[0], "rejected": rows.rejected, "also": results[1:]}


def _shared_state(checkpoint: Checkpoint, sae: SaeSettings, world: int) -> Any:
    saved = checkpoint.read("shared")
    split, num_workers = saved["split"]
    if "latents" in (split, sae.split) and (split, num_workers) != (sae.split, world):
        raise UserError(
            f"the training state in {checkpoint.folder} is split by {split} over {num_workers} workers, asked for {sae.split} over {world}. Pass --sae.split {split} --num-workers {num_workers}, or delete it to start over."
        )
    return saved

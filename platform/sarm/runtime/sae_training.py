"""SAE training on Ray Train: what each worker runs, and the trainer that starts them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from sarm import config as configs
from sarm import schema
from sarm.config import Run, UserError
from sarm.data.activations import ActivationStore
from sarm.data.artifacts import save_sae
from sarm.data.checkpoints import Checkpoint, Checkpoints
from sarm.data.shuffled_rows import ShuffledRows, memory_for_rows
from sarm.nn.architectures import BatchTopKSae, build_sae
from sarm.nn.sae import Sae, standardise
from sarm.runtime.cluster import Cluster
from sarm.runtime.sae_cross_entropy import cross_entropy_figures
from sarm.runtime.tracking import StageRun
from sarm.runtime.trainer import Progress, run_workers, worker_device, workers_on_device
from sarm.runtime.training_states import WorkerStates
from sarm.train.sae import Phase, SaeTraining
from sarm.train.sae_quality import LatentCounts, measure

_SAMPLE_ROWS = 16 * 1024
_OF_THE_SAE = ("architecture", "d_sae", "k", "signed", "prefixes", "bandwidth", "l0_penalty")


@dataclass(frozen=True)
class SaeTask:
    """What a worker needs to know; picklable. A phase whose folder is None is left out."""

    run: Run
    sae: configs.Sae
    text: Path | None
    chat: Path | None
    folder: Path
    tracking: StageRun
    states: Checkpoints
    corpus: Path | None = None


def train_on_cluster(task: SaeTask, cluster: Cluster) -> dict[str, Any]:
    """Train on the cluster's workers and leave the SAE in `task.folder`; returns its figures and history.

    Goes on from the newest of `task.states` if there is one.
    """
    threads = cluster.cpus_each(task.run, task.run.num_workers)
    return run_workers("sae", sae_worker, task, task.run, task.folder, cluster, threads)


def check_activations(sae: configs.Sae, stores: dict[str, ActivationStore]) -> None:
    """Raise UserError unless the folders hold activations of one model and layer, with enough rows to train and measure on."""
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


def sae_worker(task: SaeTask) -> dict[str, Any] | None:
    """One Ray Train worker: both phases, then the latents' statistics; rank 0 writes the folder and returns the figures."""
    device, rank = worker_device(), dist.get_rank() if dist.is_initialized() else 0
    states = WorkerStates(task.states, task.sae.checkpoint_every_steps, task.sae.checkpoint_every_seconds)
    found = states.latest()
    stores = {
        name: ActivationStore(path) for name, path in (("text", task.text), ("chat", task.chat)) if path is not None
    }
    rows = {name: _training_rows(store, task.sae, device) for name, store in stores.items()}
    settings = {"text": (task.sae.text_epochs, task.sae.lr), "chat": (task.sae.chat_epochs, task.sae.chat_lr)}
    samples = {name: standardise(source.sample(task.run.seed, _SAMPLE_ROWS)) for name, source in rows.items()}
    names = list(rows)
    sae = build_sae(d_in=stores[names[0]].d_in, **{name: getattr(task.sae, name) for name in _OF_THE_SAE})
    saved: Any = None if found is None else _shared_state(found, task.sae, states.world)
    history: dict[str, Any] = {} if saved is None else saved["history"]
    figures: dict[str, Any] = {} if saved is None else saved["figures"]
    first_step = 0
    if saved is None:
        sae.initialise_(samples[names[0]], torch.Generator().manual_seed(task.run.seed), task.sae.b_dec_init)
    for number, name in enumerate(names):
        if saved is not None and number < saved["phase"]:
            continue
        is_resumed = saved is not None and number == saved["phase"]
        if number > 0 and not is_resumed:
            unused = int(_fired(sae, samples[names[number - 1]].to(device)).argmin())
            sae.absorb_shift_(samples[name].to(device), unused)
            if isinstance(sae, BatchTopKSae):
                # A threshold that follows a hundredth of the way each step would spend a short phase on getting there.
                sae.calibrate_(samples[name].to(device))
        epochs, lr = settings[name]
        progress = Progress(f"sae_{name}", task.tracking, ("loss", "fvu", "alive_share"))
        phase = Phase(name, rows[name], rows[name].heldout, epochs, lr)
        training = SaeTraining([sae], phase, [task.sae], task.run.seed + number, device, first_step, task.sae.split)
        if found is not None and is_resumed:
            training.load_state_dict(states.own_state(found) if task.sae.split == "latents" else saved["training"])
            progress.history = history[name]
            if rank == 0:
                print(f"sae_{name} goes on after step {training.num_steps}", flush=True)
        history[name] = progress.history

        def save_if_due(training: SaeTraining = training, number: int = number) -> None:
            if states.is_due(training.num_steps):
                state, is_own = training.state_dict(), task.sae.split == "latents"
                shared = {
                    "phase": number,
                    "history": history,
                    "figures": figures,
                    "split": [task.sae.split, states.world],
                }
                shared["training"] = None if is_own else state
                states.save(training.num_steps, shared, state if is_own else None)

        training.run([progress], after_step=save_if_due)
        sae = training.learners[0].whole()
        first_step = training.num_steps
        figures[f"fvu_{name}_after_its_phase"] = measure(sae, rows[name].heldout, device).fvu
    if rank != 0:
        return None
    counts = {name: _count_latents(sae, store, device) for name, store in stores.items()}
    figures |= {f"fvu_{name}": measure(sae, rows[name].heldout, device).fvu for name in names}
    figures |= {f"l0_{name}": counts[name].l0() for name in names}
    fired = torch.stack([counts[name].fired for name in names]).sum(0)
    figures["dead_share"] = float((fired == 0).double().mean())
    if "chat" in counts:
        figures["alive_at_reward"] = counts["chat"].alive_share()
    if task.corpus is not None and task.sae.cross_entropy_texts:
        metadata, share = stores[names[0]].metadata, task.sae.heldout_share
        figures |= cross_entropy_figures(sae, task.corpus, metadata, task.sae.cross_entropy_texts, share, device)
    save_sae(sae, task.folder, {"activations": stores[names[0]].metadata, "phases": names})
    histograms = {
        name: dict(zip(("log10_density", "latents"), c.density_histogram(), strict=True)) for name, c in counts.items()
    }
    (task.folder / "density.json").write_text(json.dumps(histograms))
    pq.write_table(
        _latent_stats(counts, task.sae.d_sae), task.folder / "latent_stats.parquet", write_page_checksum=True
    )
    rejected = {name: source.rejected for name, source in rows.items() if source.rejected}
    return {"figures": figures, "history": history, "rejected": rejected}


def _shared_state(found: Checkpoint, sae: configs.Sae, world: int) -> Any:
    saved = found.read("shared")
    split, num_workers = saved["split"]
    if "latents" in (split, sae.split) and (split, num_workers) != (sae.split, world):
        raise UserError(
            f"the training state in {found.folder} is split by {split} over {num_workers} workers, asked for {sae.split} over {world}. Pass --sae.split {split} --num-workers {num_workers}, or delete it to start over."
        )
    return saved


def _training_rows(store: ActivationStore, sae: configs.Sae, device: torch.device) -> ShuffledRows:
    rows = ShuffledRows(
        store, sae.heldout_share, memory_bytes=memory_for_rows(device, workers_on_device(device)), device=device
    )
    if rows.num_rows < sae.batch_size:
        raise UserError(
            f"{store.folder} has {rows.num_rows} rows to train on ({rows.num_rejected} are constant, NaN or infinite), fewer than a batch of {sae.batch_size}. Add sources, or pass a smaller --sae.batch-size."
        )
    return rows


def _fired(sae: Sae, x_ND: torch.Tensor) -> torch.Tensor:
    counts = LatentCounts(sae.d_sae)
    with torch.no_grad():
        for part in x_ND.split(4096):
            counts.add(sae(part))
    return counts.fired


def _count_latents(sae: Sae, store: ActivationStore, device: torch.device) -> LatentCounts:
    counts = LatentCounts(sae.d_sae)
    with torch.no_grad():
        for h_ND in store.usable_vectors():
            counts.add(sae(standardise(h_ND.to(device))))
    return counts


def _latent_stats(counts: dict[str, LatentCounts], d_sae: int) -> pa.Table:
    """schema.LATENT_STATS; frequencies are shares of rows, the mean is over rows where the latent fires."""

    def frequency(name: str) -> torch.Tensor:
        return counts[name].fired / counts[name].num_rows if name in counts else torch.zeros(d_sae)

    fired = torch.stack([c.fired for c in counts.values()]).sum(0)
    total = torch.stack([c.total for c in counts.values()]).sum(0)
    columns = {
        "latent": torch.arange(d_sae),
        "frequency_text": frequency("text"),
        "frequency_chat": frequency("chat"),
        "mean_value": total / fired.clamp_min(1),
        "max_value": torch.stack([c.peak for c in counts.values()]).amax(0),
    }
    return pa.table({name: value.numpy() for name, value in columns.items()}).cast(schema.LATENT_STATS)

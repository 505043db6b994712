"""Reward-model training on Ray Train with DeepSpeed ZeRO: what each worker runs, and the trainer that starts them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sarm.data.formats.sarm_folder import save_sarm
from sarm.data.store.checkpoints import Checkpoint, Checkpoints
from sarm.data.store.pairs import load_pairs
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.data.tokens.groups import PromptGroup
from sarm.data.tokens.packing import token_batches
from sarm.engine.deepspeed.zero import ZeroEngine
from sarm.engine.deepspeed.zero_shards import Shards, load_moments_, load_weights_, reshard, shards, weights
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.ray.stall import StallGuard
from sarm.engine.ray.trainer import (
    preemption_notice,
    worker_device,
    worker_storage,
)
from sarm.engine.ray.training_progress import Progress, report_progress
from sarm.engine.ray.training_states import WorkerStates
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.nn.precision import allow_tf32_
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RewardSettings
from sarm.settings.run import RunSettings
from sarm.stages.reward_models import build_model, merge_adapters_
from sarm.stages.reward_pairs import RewardPairs, shared_reward_pairs, split_off_validation
from sarm.training.head_start import start_head_
from sarm.training.reward import RewardTraining, parameter_groups
from sarm.training.reward_batches import who_waits

# Prompts, and responses of each, that the reward's moments are taken over.
_MOMENT_PROMPTS, _MOMENT_RESPONSES = 16, 4


# The workers agree after every step on whether to save or stop: a message is small beside a step.
_STEPS_BETWEEN_LOOKS = 1


@dataclass(frozen=True)
class RewardTask:
    """What a worker needs to know; picklable. `sae` None trains the scalar head; the head starts at a probe of `head_start`, else at 0.

    `chat_ends` are the activations that a random encoder is matched on.
    """

    run: RunSettings
    model: ModelSettings
    model_folder: str
    reward: RewardSettings
    pairs: Path
    sae: Path | None
    head_start: Path | None
    folder: Path
    tracking: StageRun
    states: Checkpoints
    report_steps: int = 0
    chat_ends: Path | None = None

    @property
    def name(self) -> str:
        """What its metrics' names begin with, and messages call it."""
        return self.folder.name


class _Training(NamedTuple):
    """A training on this worker: what it reads, its engine, its share of the best weights so far, and its lines of progress."""

    pairs: RewardPairs
    loop: RewardTraining
    engine: ZeroEngine
    best: Shards
    progress: Progress


def reward_worker(task: RewardTask) -> dict[str, Any] | None:
    """One Ray Train worker: build, train, gather, and on rank 0 write the folder and return the figures."""
    device, rank = worker_device(), dist.get_rank()
    allow_tf32_()
    guard = StallGuard(worker_storage(), rank)
    states = WorkerStates(
        checkpoints=task.states,
        every_steps=task.reward.checkpoint_every_steps,
        every_seconds=task.reward.checkpoint_every_seconds,
        steps_between_looks=_STEPS_BETWEEN_LOOKS,
        notice=preemption_notice,
        beat=guard.beat,
    )
    checkpoint = states.latest()
    chat = load_chat_tokenizer(task.model, task.model_folder)
    pairs = shared_reward_pairs(
        task.pairs, chat, task.reward.validation_share, model=task.model.name, states=task.states
    )
    model = _build(task, chat)
    to_train = parameter_groups(model, task.reward)
    if rank == 0:
        # DeepSpeed hands these weights to the other ranks.
        _start_(model, task, pairs, checkpoint, device)
    if task.reward.gradient_checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    torch.manual_seed(task.run.seed + rank)
    engine = ZeroEngine(model=model, parameter_groups=to_train, config=task.reward, device=device, beat=guard.beat)
    best: Shards = {}
    loop = RewardTraining(
        engine=engine,
        groups=pairs.groups,
        config=task.reward,
        seed=task.run.seed,
        row_tokens=task.model.max_length,
        pad_id=chat.pad_id,
        validation=pairs.validation,
        on_best=lambda: best.update(weights(engine)),
        d_sae=model.config.d_sae,
    )
    if rank == 0 and (said := who_waits(pairs.groups, task.reward, task.run.seed, loop.world, task.model.max_length)):
        print(f"{task.name}: {said}", flush=True)
    shown = ("loss", "accuracy", "margin", "validation_loss", "tokens_per_second")
    training = _Training(pairs, loop, engine, best, Progress(task.name, task.tracking, shown))
    if checkpoint is not None:
        _go_on_(training, task.name, checkpoint, states)
    _run(training, task.report_steps, states, guard)
    states.finish()
    whole = engine.whole_state()
    # The model that is written takes the device's memory in turn.
    engine.free_()
    if rank != 0:
        return None
    moments = _write_model(task=task, chat=chat, pairs=pairs, whole=whole, device=device)
    history = training.progress.history
    return {"figures": {**moments, **_figures(pairs, loop, history)}, "history": history}


def _start_(
    model: SarmForSequenceClassification,
    task: RewardTask,
    pairs: RewardPairs,
    checkpoint: Checkpoint | None,
    device: torch.device,
) -> None:
    """Give a model the weights that training starts from: a checkpoint's, or a head that is a probe."""
    if checkpoint is not None:
        load_weights_(model, checkpoint, "shards")
    elif task.head_start is not None:
        start_head_(
            model=model,
            activations=task.head_start,
            pairs=split_off_validation(load_pairs(task.pairs, "train"), task.reward.validation_share)[0],
            seed=task.run.seed,
            groups=pairs.groups,
            encoder=task.reward.encoder,
            device=device,
        )


def _go_on_(training: _Training, name: str, checkpoint: Checkpoint, states: WorkerStates) -> None:
    """Bring all but the weights to where a checkpoint left them; random generators last."""
    saved = checkpoint.read("shared")
    training.loop.load_state_dict(saved["training"])
    training.progress.history = saved["history"]
    load_moments_(training.engine, checkpoint, "shards", training.loop.num_steps)
    if training.pairs.validation:
        training.best.update(reshard(training.engine, checkpoint, "best"))
    states.restore_random(checkpoint)
    if states.rank == 0:
        print(f"{name} goes on after step {training.loop.num_steps}", flush=True)


def _run(training: _Training, report_steps: int, states: WorkerStates, guard: StallGuard) -> None:
    """Train to the end, with checkpoints when they are due."""
    loop, progress = training.loop, training.progress

    def state() -> tuple[Any, Any]:
        shared = {"training": loop.state_dict(), "history": progress.history}
        return shared, {"shards": shards(training.engine), "best": training.best}

    def after_step() -> None:
        report_progress(report_steps, loop.num_steps, progress.history)
        states.after_step(loop.num_steps, state)

    with guard:
        loop.run(
            lambda step, metrics: progress(step, {**metrics, "seconds_checkpoints": states.seconds}),
            after_step,
        )
    if training.pairs.validation:
        # The best weights are gathered as a state is read: from the disk.
        states.save(loop.num_steps, state)


def _write_model(
    task: RewardTask, chat: ChatTokenizer, pairs: RewardPairs, whole: dict[str, Any], device: torch.device
) -> dict[str, float]:
    """Write the folder of the trained weights, the best ones where there is a validation; returns the moments of the reward."""
    trained = _build(task, chat)
    # Buffers (thresholds) are as they were built.
    trained.load_state_dict({**trained.state_dict(), **whole})
    if pairs.validation:
        parameter_groups(trained, task.reward)
        last = task.states.latest()
        assert last is not None
        load_weights_(trained, last, "best")
    merge_adapters_(trained)
    trained.to(device).eval()  # type: ignore[arg-type]
    mean, std = reward_moments(
        model=trained,
        groups=pairs.groups,
        batch_tokens=task.reward.batch_tokens,
        row_tokens=task.model.max_length,
        pad_id=chat.pad_id,
        device=device,
    )
    trained.config.reward_mean, trained.config.reward_std = mean, std
    save_sarm(trained.cpu(), chat, task.folder)
    return {"reward_mean": mean, "reward_std": std}


def _figures(pairs: RewardPairs, training: RewardTraining, history: list[dict[str, Any]]) -> dict[str, Any]:
    figures = {
        "train_accuracy_last_epoch": last_epoch_accuracy(history),
        "epochs_trained": history[-1]["epoch"] if history else 0.0,
        **pairs.counts,
        "num_pairs": sum(pairs.groups.num_pairs),
        "num_prompts": len(pairs.groups),
        "num_steps": len(history),
        "protocol_version": PROTOCOL_VERSION,
        "rejected_pairs": len(pairs.refused),
        **{f"rejected_{reason}": count for reason, count in sorted(Counter(pairs.refused.values()).items())},
    }
    if pairs.validation:
        figures |= {
            "best_step": training.validation.best_step,
            "validation_loss": training.validation.best_loss,
            "validation_prompts": len(pairs.validation),
        }
    return figures


def _build(task: RewardTask, chat: ChatTokenizer) -> SarmForSequenceClassification:
    return build_model(
        model=task.model, model_folder=task.model_folder, sae_folder=task.sae, chat=chat, reward=task.reward, seed=task.run.seed, chat_ends=task.chat_ends
    )  # fmt: skip


def reward_moments(
    model: SarmForSequenceClassification,
    groups: Sequence[PromptGroup],
    batch_tokens: int,
    row_tokens: int,
    pad_id: int,
    device: torch.device,
) -> tuple[float, float]:
    """Mean and standard deviation of the reward over a sample of training responses, for users who want a unit scale."""
    sample = groups[:: max(1, len(groups) // _MOMENT_PROMPTS)]
    rows = [row for group in sample for row in group._replace(tokens=group.tokens[:_MOMENT_RESPONSES]).rows(row_tokens)]
    rewards = []
    with torch.inference_mode():
        for batch in token_batches(rows, batch_tokens, pad_id):
            rewards.append(model(**batch.model_inputs(device)).logits.squeeze(-1).cpu())
    values = torch.cat(rewards)
    return float(values.mean()), float(values.std()) if len(values) > 1 else 1.0


def last_epoch_accuracy(history: Sequence[Mapping[str, float]]) -> float | None:
    """Share of the pairs of the last epoch that was begun which were in the right order when they were trained on; None without a step.

    Every pair counts once. After early stopping it is what was trained of the epoch in which training stopped.
    """
    if not history:
        return None
    begun = math.ceil(history[-1]["epoch"])
    last = [entry for entry in history if entry["epoch"] > begun - 1]
    return sum(entry["accuracy"] * entry["pairs"] for entry in last) / sum(entry["pairs"] for entry in last)

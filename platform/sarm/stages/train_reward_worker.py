"""Reward-model training on Ray Train with DeepSpeed ZeRO: what each worker runs, and the trainer that starts them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import torch
import torch.distributed as dist

from sarm.contracts.ids import hash_share
from sarm.contracts.passes import Spelled
from sarm.data.formats.sarm_folder import save_sarm
from sarm.data.store.checkpoints import Checkpoints
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.data.tokens.packing import token_batches
from sarm.engine.deepspeed.zero import ZeroEngine
from sarm.engine.deepspeed.zero_shards import Shards, load_moments_, load_weights_, reshard, shards, weights
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.ray.cluster import Cluster
from sarm.engine.ray.stall import StallGuard
from sarm.engine.ray.trainer import (
    Progress,
    preemption_notice,
    report_progress,
    run_workers,
    worker_device,
    worker_storage,
)
from sarm.engine.ray.training_states import WorkerStates
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RewardSettings
from sarm.settings.run import RunSettings
from sarm.stages.reward_models import build_model, merge_adapters_
from sarm.train.head_start import start_head_
from sarm.train.reward import RewardTraining, parameter_groups

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
        """What its metrics' names begin with."""
        return self.folder.name


def train_on_cluster(task: RewardTask, cluster: Cluster, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train on the cluster's workers and leave the model in `task.folder`; returns its figures and history.

    Goes on from the newest of `task.states` if there is one.
    """
    threads = cluster.cpus_each(task.run, task.run.num_workers)
    trained: dict[str, Any] = run_workers(
        name=task.name,
        worker=reward_worker,
        task=task,
        run=task.run,
        folder=task.folder,
        cluster=cluster,
        threads=threads,
        states=task.states,
        callbacks=callbacks,
    )
    return trained


def load_pairs(folder: Path, split: str) -> pa.Table:
    """The pairs of one split."""
    table = ds.dataset([str(path) for path in sorted(folder.glob("*.parquet"))]).to_table()
    return table.filter(pc.equal(table.column("split"), split))


def split_off_validation(pairs: pa.Table, share: float) -> tuple[pa.Table, pa.Table]:
    """(pairs to train on, pairs to measure on during training): whole prompts, by a hash of their own.

    Raises UserError if either is empty though asked for.
    """
    is_measured = [hash_share(f"validation {prompt}") < share for prompt in pairs.column("prompt_id").to_pylist()]
    mask = pa.array(is_measured, pa.bool_())
    training, validation = pairs.filter(pc.invert(mask)), pairs.filter(mask)
    if training.num_rows == 0 or (share > 0 and validation.num_rows == 0):
        raise UserError(
            f"--reward.validation-share {share} leaves {training.num_rows} pairs to train on and {validation.num_rows} to measure. Pass another share, or more pairs."
        )
    return training, validation


class _Data(NamedTuple):
    """What a training reads: its pairs, the same as prompts with tokens, those that it is measured on, and why pairs are left out."""

    pairs: pa.Table
    groups: list[PromptGroup]
    validation: list[PromptGroup]
    refused: dict[str, str]


def reward_worker(task: RewardTask) -> dict[str, Any] | None:
    """One Ray Train worker: build, train, gather, and on rank 0 write the folder and return the figures."""
    device, rank = worker_device(), dist.get_rank()
    guard = StallGuard(worker_storage(), rank)
    states = WorkerStates(
        checkpoints=task.states,
        every_steps=task.reward.checkpoint_every_steps,
        every_seconds=task.reward.checkpoint_every_seconds,
        steps_between_looks=_STEPS_BETWEEN_LOOKS,
        notice=preemption_notice,
        beat=guard.beat,
    )
    found = states.latest()
    chat = load_chat_tokenizer(task.model, task.model_folder)
    data = _read(task, chat)
    model = _build(task, chat)
    to_train = parameter_groups(model, task.reward)
    # DeepSpeed hands rank 0's weights to the others.
    if rank == 0 and found is not None:
        load_weights_(model, found, "shards")
    elif rank == 0 and task.head_start is not None:
        start_head_(
            model=model,
            activations=task.head_start,
            pairs=data.pairs,
            seed=task.run.seed,
            groups=data.groups,
            encoder=task.reward.encoder,
        )
    if task.reward.gradient_checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    torch.manual_seed(task.run.seed + rank)
    engine = ZeroEngine(model=model, parameter_groups=to_train, config=task.reward, device=device, beat=guard.beat)
    best: Shards = {}
    training = RewardTraining(
        engine=engine,
        groups=data.groups,
        config=task.reward,
        seed=task.run.seed,
        row_tokens=task.model.max_length,
        pad_id=chat.pad_id,
        validation=data.validation,
        on_best=lambda: best.update(weights(engine)),
    )
    progress = Progress(
        task.name, task.tracking, ("loss", "accuracy", "margin", "validation_loss", "tokens_per_second")
    )
    if found is not None:
        saved = found.read("shared")
        training.load_state_dict(saved["training"])
        progress.history = saved["history"]
        load_moments_(engine, found, "shards", training.num_steps)
        if data.validation:
            best.update(reshard(engine, found, "best"))
        states.restore_random(found)
        if rank == 0:
            print(f"{task.name} goes on after step {training.num_steps}", flush=True)

    def state() -> tuple[Any, Any]:
        shared = {"training": training.state_dict(), "history": progress.history}
        return shared, {"shards": shards(engine), "best": best}

    def after_step() -> None:
        report_progress(task.report_steps, training.num_steps, progress.history)
        states.after_step(training.num_steps, state)

    with guard:
        training.run(
            lambda step, metrics: progress(step, {**metrics, "seconds_checkpoints": states.seconds}),
            after_step,
        )
    if data.validation:
        # The best weights are gathered as a state is read: from the disk.
        states.save(training.num_steps, state)
    states.finish()
    whole = engine.whole_state()
    if rank != 0:
        return None
    moments = _write_model(task=task, chat=chat, data=data, whole=whole, device=device)
    return {"figures": {**moments, **_figures(data, training, progress.history)}, "history": progress.history}


def _read(task: RewardTask, chat: ChatTokenizer) -> _Data:
    pairs, validation_pairs = split_off_validation(load_pairs(task.pairs, "train"), task.reward.validation_share)
    refused: dict[str, str] = {}
    groups = list(prompt_groups(pairs, chat, refused=refused))
    validation = list(prompt_groups(validation_pairs, chat, refused=refused))
    if not groups or (validation_pairs.num_rows and not validation):
        raise UserError(
            f"no pair can be encoded: {dict(Counter(refused.values()))} of {len(refused):,}. Pass pairs whose roles the template of {task.model.name} takes."
        )
    return _Data(pairs, groups, validation, refused)


def _write_model(
    task: RewardTask, chat: ChatTokenizer, data: _Data, whole: dict[str, Any], device: torch.device
) -> dict[str, float]:
    """Write the folder of the trained weights, the best ones where there is a validation; returns the moments of the reward."""
    trained = _build(task, chat)
    # Buffers (thresholds) are as they were built.
    trained.load_state_dict({**trained.state_dict(), **whole})
    if data.validation:
        parameter_groups(trained, task.reward)
        last = task.states.latest()
        assert last is not None
        load_weights_(trained, last, "best")
    merge_adapters_(trained)
    trained.to(device).eval()  # type: ignore[arg-type]
    mean, std = reward_moments(
        model=trained,
        groups=data.groups,
        batch_tokens=task.reward.batch_tokens,
        row_tokens=task.model.max_length,
        pad_id=chat.pad_id,
        device=device,
    )
    trained.config.reward_mean, trained.config.reward_std = mean, std
    save_sarm(trained.cpu(), chat, task.folder)
    return {"reward_mean": mean, "reward_std": std}


def _figures(data: _Data, training: RewardTraining, history: list[dict[str, Any]]) -> dict[str, Any]:
    figures = {
        "train_accuracy_last_epoch": last_epoch_accuracy(history),
        "epochs_trained": history[-1]["epoch"] if history else 0.0,
        "truncated_responses": sum(tokens.num_truncated > 0 for group in data.groups for tokens in group.tokens),
        "num_pairs": sum(len(group.pairs) for group in data.groups),
        "num_prompts": len(data.groups),
        "num_steps": len(history),
        "protocol_version": PROTOCOL_VERSION,
        "rejected_pairs": len(data.refused),
        **{f"rejected_{reason}": count for reason, count in sorted(Counter(data.refused.values()).items())},
        **_contents(data.groups + data.validation),
    }
    if data.validation:
        figures |= {
            "best_step": training.validation.best_step,
            "validation_loss": training.validation.best_loss,
            "validation_prompts": len(data.validation),
        }
    return figures


def _build(task: RewardTask, chat: ChatTokenizer) -> SarmForSequenceClassification:
    return build_model(
        model=task.model, model_folder=task.model_folder, sae_folder=task.sae, chat=chat, reward=task.reward, seed=task.run.seed, chat_ends=task.chat_ends
    )  # fmt: skip


def reward_moments(
    model: SarmForSequenceClassification,
    groups: list[PromptGroup],
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


def _contents(groups: Sequence[PromptGroup]) -> dict[str, int]:
    """Contents that spell control tokens or turns, which were trained on as text."""
    spelled = sum((group.spelled for group in groups), Spelled())
    return {
        "contents_with_control_tokens": spelled.control_tokens,
        "contents_already_templated": spelled.templated,
    }

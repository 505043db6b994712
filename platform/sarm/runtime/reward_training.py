"""Reward-model training on Ray Train with DeepSpeed ZeRO: what each worker runs, and the trainer that starts them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import torch
import torch.distributed as dist

from sarm.config import Model, Reward, Run
from sarm.data.artifacts import save_sarm
from sarm.data.chat import load_chat_tokenizer
from sarm.data.groups import PromptGroup, prompt_groups
from sarm.data.packing import token_batches
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.runtime.cluster import Cluster
from sarm.runtime.head_start import start_head_
from sarm.runtime.reward_models import build_model, merge_adapters_
from sarm.runtime.tracking import StageRun
from sarm.runtime.trainer import Progress, run_workers, worker_device
from sarm.runtime.zero import ZeroEngine
from sarm.train.reward import parameter_groups, train_reward

# Prompts, and responses of each, that the reward's moments are taken over.
_MOMENT_PROMPTS, _MOMENT_RESPONSES = 16, 4


@dataclass(frozen=True)
class RewardTask:
    """What a worker needs to know; picklable. `sae` None trains the scalar head; the head starts at a probe of `head_start`, else at 0."""

    run: Run
    model: Model
    model_folder: str
    reward: Reward
    pairs: Path
    sae: Path | None
    head_start: Path | None
    folder: Path
    tracking: StageRun


def train_on_cluster(task: RewardTask, cluster: Cluster) -> dict[str, Any]:
    """Train on the cluster's workers and leave the model in `task.folder`; returns its figures and history."""
    threads = cluster.cpus_each(task.run, task.run.num_workers)
    return run_workers(task.folder.name, reward_worker, task, task.run, task.folder, cluster, threads)


def load_pairs(folder: Path, split: str) -> pa.Table:
    """The pairs of one split."""
    table = ds.dataset([str(path) for path in sorted(folder.glob("*.parquet"))]).to_table()
    return table.filter(pc.equal(table.column("split"), split))


def reward_worker(task: RewardTask) -> dict[str, Any] | None:
    """One Ray Train worker: build, train, gather, and on rank 0 write the folder and return the figures."""
    device, rank = worker_device(), dist.get_rank()
    chat = load_chat_tokenizer(task.model, task.model_folder)
    pairs = load_pairs(task.pairs, "train")
    groups = list(prompt_groups(pairs, chat))
    model = build_model(task.model, task.model_folder, task.sae, chat, task.reward, task.run.seed)
    # DeepSpeed hands rank 0's weights to the others.
    if task.head_start is not None and rank == 0:
        start_head_(model, task.head_start, pairs, task.run.seed, groups)
    if task.reward.gradient_checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    engine = ZeroEngine(model, parameter_groups(model, task.reward), task.reward, device)
    progress = Progress(task.folder.name, task.tracking, ("loss", "accuracy", "margin", "tokens_per_second"))
    train_reward(engine, groups, task.reward, task.run.seed, task.model.max_length, chat.pad_id, progress)
    state = engine.whole_state(model)
    if rank != 0:
        return None
    trained = build_model(task.model, task.model_folder, task.sae, chat, task.reward, task.run.seed)
    # Buffers (thresholds) are as they were built.
    trained.load_state_dict({**trained.state_dict(), **state})
    merge_adapters_(trained)
    trained.to(device).eval()  # type: ignore[arg-type]
    mean, std = reward_moments(trained, groups, task.reward.batch_tokens, task.model.max_length, chat.pad_id, device)
    trained.config.reward_mean, trained.config.reward_std = mean, std
    save_sarm(trained.cpu(), chat, task.folder)
    figures = {
        "reward_mean": mean,
        "reward_std": std,
        "train_accuracy_last_epoch": _weighted_tail(progress.history, "accuracy", task.reward.epochs),
        "truncated_responses": sum(tokens.num_truncated > 0 for group in groups for tokens in group.tokens),
        "num_pairs": sum(len(group.pairs) for group in groups),
        "num_prompts": len(groups),
        "num_steps": len(progress.history),
    }
    return {"figures": figures, "history": progress.history}


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


def _weighted_tail(history: list[dict[str, float]], key: str, epochs: int) -> float:
    last = [entry for entry in history if entry["epoch"] > epochs - 1]
    return sum(entry[key] for entry in last) / max(1, len(last))

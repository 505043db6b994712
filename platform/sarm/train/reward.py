"""Bradley-Terry training loop over prompt groups; plain torch around an engine that hides how parameters are sharded.

P pairs of a step over all ranks. A step takes whole prompts, in an order that (seed, epoch) decides, until `batch_pairs` is
full; all ranks plan the same step and take their share, so a step's gradient does not depend on how many ranks there are.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sarm.config import Reward
from sarm.data.groups import PromptGroup, split_group
from sarm.data.packing import Row, collate, padded_tokens
from sarm.train.objective import Objective, objective_of
from sarm.train.schedule import warmup_cosine

Log = Callable[[int, dict[str, float]], None]


class Engine(Protocol):
    """A model with its optimizer: `sarm.runtime.zero.ZeroEngine`, or `LocalEngine` in one process without DeepSpeed."""

    device: torch.device

    def __call__(self, **inputs: Tensor) -> Any: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...
    def step(self, rate_factor: float) -> float: ...


class LocalEngine:
    """AdamW in one process: the reference that sharded engines are compared with."""

    def __init__(self, model: torch.nn.Module, parameter_groups: list[dict[str, Any]], max_grad_norm: float):
        self.model, self.device = model, next(model.parameters()).device
        self._optimizer = torch.optim.AdamW(parameter_groups)
        self._rates = [group["lr"] for group in parameter_groups]
        self._parameters = [p for group in parameter_groups for p in group["params"]]
        self._max_grad_norm = max_grad_norm

    def __call__(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, rate_factor: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)


class MicroBatch(NamedTuple):
    """Whole groups whose rows fit one forward and backward pass."""

    groups: list[PromptGroup]
    rows: list[Row]


def train_reward(
    engine: Engine, groups: Sequence[PromptGroup], config: Reward, seed: int, row_tokens: int, pad_id: int, log: Log
) -> None:
    """Train the engine's model for `config.epochs` passes over the pairs of `groups`.

    Raises RuntimeError naming the prompts if a loss is not finite, before the weights take a step with it.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    num_pairs = sum(len(group.pairs) for group in groups)
    seen, total, step = 0, num_pairs * config.epochs, 0
    objective = objective_of(config)
    for epoch in range(config.epochs):
        for chosen_groups in cut_into_steps(groups, config.batch_pairs, seed, epoch):
            started = time.monotonic()
            size = sum(len(group.pairs) for group in chosen_groups)
            shares = deal(chosen_groups, world, row_tokens, config.batch_tokens)
            sums = torch.zeros(4, dtype=torch.float64)
            for number, micro in enumerate(shares[rank]):
                last = number == len(shares[rank]) - 1
                sums += _backward(engine, micro, world / size, pad_id, objective, last=last)
            if world > 1:
                sums = sums.to(engine.device)
                dist.all_reduce(sums)
            loss_sum, correct, margin_sum, tokens = sums.tolist()
            if not np.isfinite(loss_sum):
                names = ", ".join(group.prompt_id for group in chosen_groups)
                raise RuntimeError(
                    f"the loss of step {step + 1} is {loss_sum}; its prompts are {names}. Lower --reward.lr, or look at these prompts."
                )
            # The rate is that of the step's middle, so that neither the first nor the last step is wasted at 0.
            factor = warmup_cosine((seen + size / 2) / total, config.warmup_share)
            grad_norm = engine.step(factor)
            step, seen = step + 1, seen + size
            if rank == 0:
                log(
                    step,
                    {
                        "epoch": seen / num_pairs,
                        "progress": seen / total,
                        "loss": loss_sum / size,
                        "accuracy": correct / size,
                        "margin": margin_sum / size,
                        "grad_norm": grad_norm,
                        "lr": config.lr * factor,
                        "head_lr": config.head_lr * factor,
                        "tokens_per_second": tokens / (time.monotonic() - started),
                    },
                )


def parameter_groups(model: torch.nn.Module, config: Reward) -> list[dict[str, Any]]:
    """Freeze what is not trained and return AdamW's groups: the blocks (or their adapters), the SAE, and the head, each with its own rate.

    The SAE stays as it was pretrained, unless asked otherwise, so that its latents keep their meaning; token embeddings stay because
    a demo's worth of pairs touches few of them.
    """
    named = list(model.named_parameters())
    # The decoder is no part of the reward, and thresholds learn by gradients of their own.
    unused = {"sae.threshold"} | (set() if config.recon_weight else {"sae.W_dec"})
    adapters = [p for name, p in named if ".lora_" in name]
    blocks = adapters or [p for name, p in named if ".layers." in name]
    sae = [p for name, p in named if name.startswith("sae.") and name not in unused]
    head = [p for name, p in named if name.startswith("score.")]
    parts = [
        (blocks, config.lr if config.train_backbone else 0.0, config.weight_decay),
        (sae, config.sae_lr if config.train_sae else 0.0, 0.0),
        (head, config.head_lr, 0.0),
    ]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    groups = []
    for parameters, rate, decay in parts:
        if parameters and rate > 0:
            groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
            for parameter in parameters:
                parameter.requires_grad_(True)
    return groups


def cut_into_steps(groups: Sequence[PromptGroup], batch_pairs: int, seed: int, epoch: int) -> list[list[PromptGroup]]:
    """Groups in random order, cut so that a step holds at most `batch_pairs` pairs (more only if one prompt has more)."""
    steps: list[list[PromptGroup]] = []
    room = 0
    for index in np.random.default_rng([seed, epoch]).permutation(len(groups)):
        group = groups[index]
        if not steps or len(group.pairs) > room:
            steps.append([])
            room = batch_pairs
        steps[-1].append(group)
        room -= len(group.pairs)
    return steps


def deal(step: Sequence[PromptGroup], world: int, row_tokens: int, batch_tokens: int) -> list[list[MicroBatch]]:
    """The step as micro-batches of at most `batch_tokens` tokens for each rank, as many on every rank: collectives must meet.

    Ranks that run out of work repeat a micro-batch with its pairs left out, which adds nothing to the gradient.
    """
    parts = [part for group in step for part in split_group(group, row_tokens, batch_tokens)]
    packed = [MicroBatch([part], part.rows(row_tokens)) for part in parts]
    micros: list[MicroBatch] = []
    for item in sorted(packed, key=lambda m: sum(len(row.ids) for row in m.rows), reverse=True):
        for i, micro in enumerate(micros):
            if padded_tokens(micro.rows + item.rows) <= batch_tokens:
                micros[i] = MicroBatch(micro.groups + item.groups, micro.rows + item.rows)
                break
        else:
            micros.append(item)
    idle = MicroBatch([g._replace(pairs=[]) for g in micros[-1].groups], micros[-1].rows)
    micros += [idle] * (-len(micros) % world)
    return [micros[rank::world] for rank in range(world)]


def _backward(
    engine: Engine, micro: MicroBatch, weight: float, pad_id: int, objective: Objective, *, last: bool
) -> Tensor:
    """Backward pass of one micro-batch; [sum of losses, pairs ordered rightly, sum of margins, tokens]."""
    batch = collate(micro.rows, pad_id)
    output = engine(**batch.model_inputs(engine.device), **objective.model_options())
    place = {key: i for i, key in enumerate(batch.keys)}
    pairs = [(group.prompt_id, pair) for group in micro.groups for pair in group.pairs]
    losses, margins = objective(
        output,
        [place[prompt, pair.chosen] for prompt, pair in pairs],
        [place[prompt, pair.rejected] for prompt, pair in pairs],
        [pair.margin for _, pair in pairs],
    )
    engine.backward(losses.sum() * weight + 0.0 * output.logits.sum(), last=last)
    margins = margins.detach()
    tokens = torch.tensor(float((batch.segment_ids >= 0).sum()))
    return (
        torch.stack([losses.detach().sum(), (margins > 0).float().sum(), margins.sum(), tokens.to(margins)])
        .double()
        .cpu()
    )

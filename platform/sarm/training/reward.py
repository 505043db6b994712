"""Bradley-Terry training over prompt groups; plain torch around an engine that hides how parameters are sharded.

P pairs of a step over all ranks. The gradient of a step is

    sum over its pairs of  d loss / batch_pairs      (`pair_weights="equal"`)        or of  d loss / P      ("step")

A step takes whole prompts, in an order that (seed, epoch) decides, until `batch_pairs` is
full; all ranks plan the same step and take their share, so a step's gradient does not depend on how many ranks there are.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from sarm.data.ahead import ahead
from sarm.data.tokens.groups import PromptGroup
from sarm.data.tokens.packing import collate
from sarm.data.tokens.stored_groups import pair_counts
from sarm.settings.reward import RewardSettings
from sarm.training.dense_latents import RecentFiring
from sarm.training.objective import Objective, objective_of
from sarm.training.reward_batches import MicroBatch, cut_into_steps, deal, step_places
from sarm.training.reward_checks import LossGuard, Outcome, Sums, Validation
from sarm.training.reward_engine import Engine
from sarm.training.schedule import warmup_cosine

Log = Callable[[int, dict[str, float]], None]


class PlannedStep(NamedTuple):
    """This rank's share of a step, and how many pairs the step has over all ranks."""

    share: list[MicroBatch]
    num_pairs: int


class RewardTraining:
    """A model on its way through `config.epochs` passes over the pairs of `groups`.

    With `validation` groups, which must not be among `groups`, their loss is measured every `validate_every` steps; `on_best` is
    called when it is the lowest so far, and training stops early after `patience` measurements that are not.
    """

    def __init__(
        self,
        engine: Engine,
        groups: Sequence[PromptGroup],
        config: RewardSettings,
        seed: int,
        row_tokens: int,
        pad_id: int,
        validation: Sequence[PromptGroup] = (),
        on_best: Callable[[], None] = lambda: None,
        d_sae: int = 0,
    ):
        self.epoch, self.step_of_epoch, self.num_steps, self.num_seen = 0, 0, 0, 0
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._engine, self._groups, self._config, self._seed = engine, groups, config, seed
        self._row_tokens, self._pad_id, self._on_best = row_tokens, pad_id, on_best
        self._guard = LossGuard(config.max_loss_rise)
        self._objective = objective_of(config)
        self._firing = RecentFiring(d_sae) if d_sae and config.dense_weight else None
        self.validation = Validation(config.patience)
        self._validation_batches = cut_into_steps(validation, config.batch_pairs, seed, 0) if validation else []
        self._pair_counts = pair_counts(groups)
        self._num_pairs = sum(self._pair_counts)
        self._data_seconds = self._validation_seconds = 0.0

    def run(self, log: Log, after_step: Callable[[], None] = lambda: None) -> None:
        """Train from where it stands to the end; `after_step` is where a caller saves the state.

        `log(step, metrics)` is called on rank 0 after every step. Raises UserError naming pairs if a loss or a gradient is not
        finite, or a loss far above those before, on all ranks and before the weights take a step with it.
        """
        while self.epoch < self._config.epochs and not self.validation.is_over:
            steps = step_places(self._pair_counts, self._config.batch_pairs, self._seed, self.epoch)
            planned = ahead(map(self._planned, steps[self.step_of_epoch :]))
            for step in self._waited_for(planned):
                metrics = self._step(step)
                self.step_of_epoch += 1
                is_last = self.num_seen == self._num_pairs * self._config.epochs
                if self._validation_batches and (is_last or self.num_steps % self._config.validate_every == 0):
                    metrics |= self._validate()
                if self.rank == 0:
                    log(self.num_steps, metrics)
                after_step()
                if self.validation.is_over:
                    return
            self.epoch, self.step_of_epoch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, the same on all ranks; weights, moments and random generators are the caller's to save.

        The order of prompts is a function of (seed, epoch), so the place stands for the random generator's state.
        """
        return {
            "seed": self._seed,
            "place": [self.epoch, self.step_of_epoch, self.num_steps, self.num_seen],
            "recent_losses": self._guard.state(),
            "validation": self.validation.state(),
            "seconds": [self._data_seconds, self._validation_seconds],
            "firing": None if self._firing is None else self._firing.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; raises ValueError if that was with another seed."""
        if state["seed"] != self._seed:
            raise ValueError(f"the training state is of seed {state['seed']}, this training's is {self._seed}.")
        self.epoch, self.step_of_epoch, self.num_steps, self.num_seen = state["place"]
        self._guard.load(state["recent_losses"])
        self.validation.load(state["validation"])
        self._data_seconds, self._validation_seconds = state["seconds"]
        if self._firing is not None:
            self._firing.load(state["firing"])

    def _dealt(self, groups: Sequence[PromptGroup]) -> list[list[MicroBatch]]:
        return deal(groups, self.world, self._row_tokens, self._config.batch_tokens)

    def _planned(self, places: Sequence[int]) -> PlannedStep:
        groups = [self._groups[place] for place in places]
        return PlannedStep(self._dealt(groups)[self.rank], sum(len(group.pairs) for group in groups))

    def _waited_for(self, planned: Iterator[PlannedStep]) -> Iterator[PlannedStep]:
        """The steps, of which the next is planned while this one runs; what is waited for it counts as time for data."""
        started = time.monotonic()
        for step in planned:
            self._data_seconds += time.monotonic() - started
            yield step
            started = time.monotonic()

    def _step(self, step: PlannedStep) -> dict[str, float]:
        started, config = time.monotonic(), self._config
        share, size = step
        # The limit of the norm grows with a step as its gradient does: clipping would else take from its pairs what they weigh.
        norm_factor = size / config.batch_pairs if config.pair_weights == "equal" else 1.0
        # Engines average over ranks.
        weight = self.world * norm_factor / size
        outcomes = [
            _backward(
                self._engine,
                micro,
                weight,
                self._pad_id,
                self._objective,
                last=number == len(share) - 1,
                firing=self._firing,
            )
            for number, micro in enumerate(share)
        ]
        self._data_seconds += sum(outcome.data_seconds for outcome in outcomes)
        sums = Sums.of(outcomes).over_ranks(self._engine.device)
        losses = [(i, float(x)) for o in outcomes for i, x in zip(o.pair_ids, o.losses, strict=True)]
        self._guard.check_loss(self.num_steps + 1, sums.loss / size, losses)
        # The rate is that of the step's middle, so that neither the first nor the last step is wasted at 0.
        total = self._num_pairs * config.epochs
        factor = warmup_cosine((self.num_seen + size / 2) / total, config.warmup_share)
        grad_norm = self._engine.step(factor, norm_factor) / norm_factor
        self._guard.check_gradient(self.num_steps + 1, grad_norm, losses)
        if self._firing is not None:
            self._firing.end_step(self._engine.device)
        self.num_steps, self.num_seen = self.num_steps + 1, self.num_seen + size
        return {
            "epoch": self.num_seen / self._num_pairs,
            "progress": self.num_seen / total,
            "pairs": size,
            **sums.metrics(),
            "grad_norm": grad_norm,
            "lr": config.lr * factor,
            "head_lr": config.head_lr * factor,
            "tokens_per_second": sums.tokens / (time.monotonic() - started),
            "seconds_data": self._data_seconds,
            "seconds_validation": self._validation_seconds,
        }

    def _validate(self) -> dict[str, float]:
        """Loss and accuracy over all validation pairs, each counted once, whatever the number of ranks."""
        started, outcomes = time.monotonic(), []
        self._engine.train(False)
        with torch.no_grad():
            for groups in self._validation_batches:
                share = self._dealt(groups)[self.rank]
                outcomes += [_forward(self._engine, micro, self._pad_id, self._objective)[0] for micro in share]
        self._engine.train(True)
        sums = Sums.of(outcomes).over_ranks(self._engine.device)
        measured = sums.metrics()
        if self.validation.add(self.num_steps, measured["loss"]):
            self._on_best()
        self._validation_seconds += time.monotonic() - started
        return {f"validation_{name}": measured[name] for name in ("loss", "accuracy", "margin")}


def train_reward(
    engine: Engine,
    groups: Sequence[PromptGroup],
    config: RewardSettings,
    seed: int,
    row_tokens: int,
    pad_id: int,
    log: Log,
) -> None:
    """Train the engine's model through all epochs; see `RewardTraining`."""
    RewardTraining(engine, groups, config, seed, row_tokens, pad_id).run(log)


def parameter_groups(model: torch.nn.Module, config: RewardSettings) -> list[dict[str, Any]]:
    """Freeze what is not trained and return AdamW's groups: the blocks (or their adapters), the SAE, and the head, each with its own rate.

    The SAE stays as it was pretrained, unless asked otherwise, so that its latents keep their meaning; token embeddings stay because
    a demo's worth of pairs touches few of them.
    """
    named = list(model.named_parameters())
    # A decoder is no part of the reward unless it is the encoder too, and thresholds learn by gradients of their own.
    is_tied = all(name != "sae.W_enc" for name, _ in named)
    unused = {"sae.threshold"} | (set() if config.recon_weight or is_tied else {"sae.W_dec"})
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
            # A scalar head reads dimensions of the residual stream: it has no latents to be few.
            l1 = config.head_l1 if parameters is head and any(name.startswith("sae.") for name, _ in named) else 0.0
            groups.append({"params": parameters, "lr": rate, "weight_decay": decay, **({"l1": l1} if l1 else {})})
            for parameter in parameters:
                parameter.requires_grad_(True)
    return groups


def _backward(
    engine: Engine,
    micro: MicroBatch,
    weight: float,
    pad_id: int,
    objective: Objective,
    *,
    last: bool,
    firing: RecentFiring | None = None,
) -> Outcome:
    """Backward pass of one micro-batch's summed losses times `weight`."""
    outcome, loss = _forward(engine, micro, pad_id, objective, firing)
    engine.backward(loss * weight, last=last)
    return outcome


def _forward(
    engine: Engine, micro: MicroBatch, pad_id: int, objective: Objective, firing: RecentFiring | None = None
) -> tuple[Outcome, Float[Tensor, ""]]:
    """One micro-batch's outcome, and the sum of its losses to differentiate; `firing` counts what it sees."""
    started = time.monotonic()
    batch = collate(micro.rows, pad_id)
    inputs = batch.model_inputs(engine.device)
    place = {key: i for i, key in enumerate(batch.keys)}
    pairs = [(group.prompt_id, pair) for group in micro.groups for pair in group.pairs]
    chosen = [place[prompt_id, pair.chosen] for prompt_id, pair in pairs]
    rejected = [place[prompt_id, pair.rejected] for prompt_id, pair in pairs]
    data_seconds = time.monotonic() - started
    output = engine(**inputs, **objective.model_options())
    losses_P = objective(output, chosen, rejected, [pair.margin for _, pair in pairs], firing)
    # A row that a rank without work repeats is seen, and counted, where its pairs are.
    if firing is not None and pairs and output.latent_values is not None:
        firing.see(output.latent_values, output.latent_indices)
    seen = output.logits.detach().squeeze(-1)
    outcome = Outcome(
        [pair.pair_id for _, pair in pairs],
        losses_P.detach().double().cpu(),
        seen[chosen].double().cpu(),
        seen[rejected].double().cpu(),
        int((batch.segment_ids >= 0).sum()) if pairs else 0,
        batch.segment_ids.numel() if pairs else 0,
        data_seconds,
    )
    # A micro-batch without pairs still has to meet the other ranks' backward passes.
    return outcome, losses_P.sum() + 0.0 * output.logits.sum()

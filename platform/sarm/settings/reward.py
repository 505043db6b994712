"""Settings of reward training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from sarm.settings.checks import OPERATIONAL, check, check_least, check_rate, check_tokens
from sarm.settings.results_root import READ, place_paths

PAIRS_A_WORKER = 8
"""A step with fewer pairs for each worker lets workers wait for the one with the longest."""
Baseline = Literal["scalar", "scalar_full", "random_encoder", "random_directions", "random_linear", "token_sae"]
Encoder = Literal["pretrained", "random_matched", "random", "random_linear"]
# What encodes in the baselines that have a random encoder.
RANDOM_ENCODERS: dict[str, Encoder] = {
    "random_encoder": "random_matched",
    "random_directions": "random",
    "random_linear": "random_linear",
}


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Bradley-Terry training of the reward model."""

    common: ClassVar[tuple[str, ...]] = ("lr", "epochs", "batch_pairs", "baselines", "lora_rank")
    lr: float = 4e-6
    """AdamW's peak learning rate for the backbone's blocks."""
    head_lr: float = 1e-3
    """AdamW's peak learning rate for the linear head."""
    head_init: Literal["zero", "probe"] = "zero"
    """Where the head starts: at zero as in the papers, or at a logistic probe of the training pairs' frozen activations, read through the decoder."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the blocks; the head has none."""
    epochs: int = 1
    """Passes over the training pairs."""
    batch_pairs: int = 64
    """Pairs of one optimizer step over all workers; a prompt's pairs stay together."""
    pair_weights: Literal["equal", "step"] = "equal"
    """What a pair weighs in its step's gradient: 1 / batch_pairs, the same in every step; or 1 / the pairs of the step, so that a pair in a
    small step weighs more."""
    batch_tokens: int = field(default=2048, metadata=OPERATIONAL)
    """Tokens of one forward and backward pass of one worker, padding included. 0: as many as the device has memory for."""
    warmup_share: float = 0.1
    """Share of the pairs over which the learning rates rise from 0; afterwards they fall to 0 by a cosine."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm. Where pairs weigh alike, the limit of a step of n pairs is n / batch_pairs times this norm."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage; a higher one is taken where this does not fit a GPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Dtype of the blocks' forward and backward; weights, SAE, head and loss stay float32. `auto`: bfloat16 on GPUs that multiply it, else float32."""
    gradient_checkpointing: bool = field(default=False, metadata=OPERATIONAL)
    """Recompute the blocks in the backward pass to save memory. It is done, too, where they do not fit a GPU otherwise."""
    baselines: tuple[Baseline, ...] = field(default=("scalar",), metadata=OPERATIONAL)
    """Also train, for comparison: `scalar` (a linear head on the same truncated backbone), `scalar_full` (on the whole backbone),
    `random_encoder` (SARM whose directions are drawn anew and treated as pretrained ones are: the shift to chat ends absorbed, the head
    started at a reading of its codes), `random_directions` (directions drawn anew, and neither of these), `random_linear` (the papers'
    variant: raw activations, a trained random linear map with a bias, no TopK), `token_sae` (SARM on the SAE of --reward.token-sae)."""
    token_sae: Path | None = field(default=None, metadata=OPERATIONAL | READ)
    """Finished SAE folder of another run, trained on all tokens (`--extraction.units token`), for the `token_sae` baseline."""
    encoder: Encoder = "pretrained"
    """What encodes: the SAE as it was pretrained, or one of the random encoders of `baselines`."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be labelled the wrong way round."""
    use_margin: bool = True
    """Subtract the pairs' annotated `margin` from the difference of rewards, where there is one."""
    centre_weight: float = 0.0
    """Weight of (chosen + rejected)^2, which keeps rewards centred; 0.01 is usual."""
    topk: bool = True
    """Keep the SAE's few active latents; without it the head reads all pre-activations, and the reward is linear in the activation."""
    train_backbone: bool = True
    """Train the blocks."""
    train_sae: bool = False
    """Train the SAE too: its latents then change their meaning."""
    sae_lr: float = 4e-6
    """AdamW's peak learning rate for the SAE, where it is trained."""
    recon_weight: float = 0.0
    """Weight of the SAE's reconstruction loss at the rewarded tokens."""
    recon_detached: bool = True
    """The reconstruction loss trains the SAE alone, not the blocks beneath it."""
    dense_weight: float = 0.0
    """Weight of a penalty on latents that come to fire on over half of the responses: the share of a response's activation that they carry;
    untried on whole trainings, 0.1 is where to begin."""
    head_l1: float = 0.0
    """Weight of an L1 penalty on the head, by proximal steps that set weights to exactly zero: the reward is then a sum of fewer latents.
    A latent is read if the mean gradient of its weight is above this; untried on whole trainings, 0.001 to 0.02 are where to begin."""
    lora_rank: int = 0
    """Train low-rank adapters of the blocks instead of their weights (needs `pip install peft`), merged when training ends; 0: train the weights."""

    checkpoint_every_seconds: float = field(default=300.0, metadata=OPERATIONAL)
    """Time between two training states on disk; a stopped job that is run again goes on from the last one."""
    checkpoint_every_steps: int = field(default=0, metadata=OPERATIONAL)
    """Steps between two training states instead; 0: by time."""
    validation_share: float = 0.0
    """Share of the training prompts, chosen by hash, that are kept out of training and measured during it; 0: none."""
    validate_every: int = 50
    """Steps between two measurements of the validation prompts; the model with the lowest loss on them is kept."""
    patience: int = 0
    """Measurements without a lower loss after which training stops early; 0: never."""
    max_loss_rise: float = 10.0
    """Stop before a step whose loss exceeds this times the mean of the last 32 (or that of chance, ln 2, if that is higher)."""
    offload: Literal["none", "optimizer", "all"] = field(default="none", metadata=OPERATIONAL)
    """What ZeRO keeps in host memory: nothing, AdamW's part (stages 1 to 3), or the weights as well (stage 3)."""

    def __post_init__(self) -> None:
        place_paths(self)
        check_rate(self, "reward.lr", zero_allowed=True)
        check_rate(self, "reward.head_lr")
        check_least(self, "reward.", weight_decay=0, epochs=1, batch_pairs=1)
        check_tokens(self, "reward.batch_tokens")
        check(self, "reward.warmup_share", 0 <= self.warmup_share < 1, "between 0 and 1")
        # 0 would mean "no gradient" to torch and "no limit" to DeepSpeed.
        check(self, "reward.max_grad_norm", self.max_grad_norm > 0, "above 0")
        check_rate(self, "reward.sae_lr")
        check_least(self, "reward.", centre_weight=0, recon_weight=0, dense_weight=0, head_l1=0, lora_rank=0)
        check(self, "reward.label_smoothing", 0 <= self.label_smoothing < 0.5, "at least 0 and below 0.5")
        trains_blocks = self.train_backbone and self.lr > 0
        check(
            self,
            "reward.recon_weight",
            not self.recon_weight or self.train_sae or (trains_blocks and not self.recon_detached),
            "0 where nothing learns from it (--reward.train-sae, or --reward.no-recon-detached, lets something)",
        )
        check(
            self,
            "reward.token_sae",
            (self.token_sae is None) != ("token_sae" in self.baselines),
            "given with the token_sae baseline, and only then",
        )
        check(self, "reward.lora_rank", not self.lora_rank or trains_blocks, "0 where the blocks are not trained")
        check_rate(self, "reward.checkpoint_every_seconds")
        check_least(self, "reward.", checkpoint_every_steps=0, validate_every=1, patience=0)
        check(self, "reward.validation_share", 0 <= self.validation_share < 1, "at least 0 and below 1")
        check(self, "reward.max_loss_rise", self.max_loss_rise > 1, "above 1")
        least_stage = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        check(
            self, "reward.offload", self.zero_stage >= least_stage, f"none unless --reward.zero-stage >= {least_stage}"
        )


def too_few_pairs(batch_pairs: int, workers: int) -> str:
    """How what is said of a step begins that has fewer than about PAIRS_A_WORKER pairs a worker; '' if it has them."""
    if workers == 1 or batch_pairs >= PAIRS_A_WORKER * workers:
        return ""
    return f"A step of {batch_pairs} pairs for {workers} workers is fewer than about {PAIRS_A_WORKER} pairs a worker"

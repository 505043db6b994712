"""Settings of reward training."""

from dataclasses import dataclass, field
from typing import Literal

from sarm.checks import OPERATIONAL, check, check_least, check_rate


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Bradley-Terry training of the reward model."""

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
    batch_tokens: int = field(default=2048, metadata=OPERATIONAL)
    """Tokens of one forward and backward pass of one worker, padding included."""
    warmup_share: float = 0.1
    """Share of the pairs over which the rates rise from 0; they fall to 0 by a cosine afterwards."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the blocks' forward and backward; weights, SAE, head and loss stay float32."""
    gradient_checkpointing: bool = field(default=False, metadata=OPERATIONAL)
    """Recompute the blocks in the backward pass to save memory."""
    scalar_baseline: bool = True
    """Also train a scalar head on the same truncated backbone, for comparison."""

    def __post_init__(self) -> None:
        check_rate(self, "reward.lr", zero_allowed=True)
        check_rate(self, "reward.head_lr")
        check_least(self, "reward.", weight_decay=0, epochs=1, batch_pairs=1, batch_tokens=64)
        check(self, "reward.warmup_share", 0 <= self.warmup_share < 1, "between 0 and 1")
        # 0 would mean "no gradient" to torch and "no limit" to DeepSpeed.
        check(self, "reward.max_grad_norm", self.max_grad_norm > 0, "above 0")

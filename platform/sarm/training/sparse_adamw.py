"""AdamW that can set weights to exactly zero, for heads that are to read few latents."""

from collections.abc import Iterable
from typing import Any

import torch


def adamw(parameter_groups: Iterable[dict[str, Any]]) -> torch.optim.AdamW:
    """torch's fused AdamW, and behind each step the proximal step of `l1` |w|_1 for groups that have an `l1`, in that step's metric (Yun et al. 2021):

        w <- sign(w) max(|w| - rate * l1 / (sqrt(v) + eps), 0),      v the bias-corrected mean of squared gradients

    Adam divides gradients by sqrt(v). Divided alike, the penalty rests where the penalised loss has its minimum: a weight stays at zero while
    the mean gradient there is below `l1`. It acts on each weight alone, so it is the same on the flat shards that ZeRO makes of a group.
    """
    optimizer = torch.optim.AdamW(parameter_groups, fused=True)
    optimizer.register_step_post_hook(_shrink)
    return optimizer


@torch.no_grad()
def _shrink(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if not (l1 := group.get("l1", 0.0)):
            continue
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                seen = 1 - group["betas"][1] ** float(state["step"])
                scale = (state["exp_avg_sq"] / seen).sqrt() + group["eps"]
                left = parameter.abs() - float(group["lr"]) * l1 / scale
                parameter.copy_(parameter.sign() * left.clamp_min(0))

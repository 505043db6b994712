"""DeepSpeed ZeRO as the training loop's engine: stages 0-3, gloo on CPU, nccl on GPU, fp32 master weights."""

import os
from typing import Any

import torch
from torch import Tensor

from sarm.config import Reward
from sarm.nn.modeling_sarm import SarmForSequenceClassification


class ZeroEngine:
    """A DeepSpeed engine whose accumulation boundary and rates are set by the loop, step by step."""

    def __init__(
        self,
        model: SarmForSequenceClassification,
        parameter_groups: list[dict[str, Any]],
        config: Reward,
        device: torch.device,
    ):
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        # A C++ all-reduce for inference that DeepSpeed would compile here, on machines that may have no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.device = device
        self._rates = [group["lr"] for group in parameter_groups]
        self._engine, *_ = deepspeed.initialize(
            model=model.to(device),  # type: ignore[arg-type]  # its wrapper hides `to`
            model_parameters=parameter_groups,
            config=deepspeed_config(config),
            dist_init_required=False,
        )

    def __call__(self, **inputs: Tensor) -> Any:
        return self._engine(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, rate_factor: float) -> float:
        for group, rate in zip(self._engine.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_factor
        self._engine.step()
        return float(self._engine.get_global_grad_norm() or 0.0)

    def whole_state(self, model: SarmForSequenceClassification) -> dict[str, Tensor]:
        """The unsharded fp32 weights, on rank 0 (an empty dict elsewhere); every rank must call it."""
        import deepspeed

        state: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters(
                [parameter], modifier_rank=None, enabled=self._engine.zero_optimization_stage() == 3
            ):
                if torch.distributed.get_rank() == 0:
                    state[name] = parameter.detach().float().cpu().clone()
        return state


def deepspeed_config(config: Reward) -> dict[str, Any]:
    """DeepSpeed's settings. The loop owns batches and rates: one micro-batch a call, boundaries set by hand."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "optimizer": {"type": "AdamW", "params": {"lr": config.head_lr, "torch_adam": True}},
        # Autocast keeps fp32 masters, and the SAE and head out of 16 bits; DeepSpeed's `bf16` would cast every module.
        "torch_autocast": {"enabled": config.precision == "bfloat16", "dtype": "bfloat16"},
        "zero_optimization": {"stage": config.zero_stage},
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }

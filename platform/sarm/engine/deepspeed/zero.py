"""DeepSpeed ZeRO as the training loop's engine: stages 0-3, gloo on CPU, nccl on GPU, fp32 master weights."""

import gc
import math
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.settings.reward import RewardSettings
from sarm.training.sparse_adamw import adamw


class _NotFiniteError(Exception):
    """Raised between the gradient's norm and the optimizer's step."""


class ZeroEngine:
    """A DeepSpeed engine whose accumulation boundary and rates are set by the loop, step by step.

    DeepSpeed copies the first rank's weights to the other ranks. `beat` is called at every call of the loop.
    """

    def __init__(
        self,
        model: SarmForSequenceClassification,
        parameter_groups: list[dict[str, Any]],
        config: RewardSettings,
        device: torch.device,
        beat: Callable[[], None] = lambda: None,
    ):
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        deepspeed = _imported()
        # DeepSpeed would compile its C++ all-reduce for inference here, and a machine may have no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.device, self.model, self.stage = device, model, config.zero_stage
        self._beat = beat
        self._rates = [group["lr"] for group in parameter_groups]
        self._parameters = [p for group in parameter_groups for p in group["params"]]
        self._max_grad_norm = self._norm_limit = config.max_grad_norm
        self._grad_norm = 0.0
        settings = deepspeed_config(config)
        if config.head_l1:
            # DeepSpeed knows no proximal step: the optimizer is made here, and sharded as its own would be.
            settings.pop("optimizer")
        self.deepspeed, *_ = deepspeed.initialize(
            model=model.to(device),  # type: ignore[arg-type]  # its wrapper hides `to`
            model_parameters=parameter_groups,
            optimizer=adamw(parameter_groups) if config.head_l1 else None,
            config=settings,
            dist_init_required=False,
        )
        # Stage 0 neither reports the gradient's norm nor checks it before the step; the other stages do both.
        self.deepspeed.clip_fp32_gradients = self._clip

    def __call__(self, **inputs: Any) -> Any:
        self._beat()
        return self.deepspeed(**inputs)

    def train(self, mode: bool) -> None:
        self.deepspeed.train(mode)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._beat()
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss)

    def step(self, rate_factor: float, norm_factor: float = 1.0) -> float:
        self._beat()
        self._norm_limit = self._max_grad_norm * norm_factor
        if self.stage > 0:
            self.deepspeed.optimizer.clip_grad = self._norm_limit
        for group, rate in zip(self.deepspeed.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_factor
        try:
            self.deepspeed.step()
        except _NotFiniteError:
            return math.inf
        return self._grad_norm if self.stage == 0 else float(self.deepspeed.get_global_grad_norm())

    def whole_state(self) -> dict[str, Tensor]:
        """The unsharded weights and buffers, on rank 0 (an empty dict elsewhere); every rank must call it."""
        deepspeed = _imported()
        is_first = torch.distributed.get_rank() == 0
        kept = self.model.state_dict().keys()
        buffers = self.model.named_buffers() if is_first else ()
        state = {name: buffer.detach().cpu().clone() for name, buffer in buffers if name in kept}
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None, enabled=self.stage == 3):
                if is_first:
                    state[name] = parameter.detach().float().cpu().clone()
        return state

    def free_(self) -> None:
        """Give back the memory of weights, gradients and moments, on whichever device they are; nothing can be run afterwards."""
        optimizer = self.deepspeed.optimizer
        self.deepspeed.destroy()
        # DeepSpeed's hooks refer to its optimizer, so that its buffers would outlive all other names.
        for inner in (getattr(optimizer, "optimizer", None), optimizer):
            if inner is not None:
                vars(inner).clear()
        for parameter in self.model.parameters():
            parameter.grad, parameter.data = None, torch.empty(0)
            vars(parameter).clear()
        self._parameters.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _clip(self) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._norm_limit)
        self._grad_norm = float(norm)
        if not math.isfinite(self._grad_norm):
            raise _NotFiniteError


def _imported() -> Any:
    """DeepSpeed without its autotuner, which nothing here uses and which imports all of MLflow: seconds of every worker's start."""
    autotuner = ModuleType("deepspeed.autotuning.autotuner")
    autotuner.Autotuner = None  # type: ignore[attr-defined]
    sys.modules.setdefault(autotuner.__name__, autotuner)
    import deepspeed

    return deepspeed


def deepspeed_config(config: RewardSettings) -> dict[str, Any]:
    """DeepSpeed's settings. The loop owns batches and rates: one micro-batch a call, boundaries set by hand."""
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload != "none":
        zero["offload_optimizer"] = offload
    if config.offload == "all":
        zero["offload_param"] = offload
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "optimizer": {"type": "AdamW", "params": {"lr": config.head_lr, "torch_adam": True, "fused": True}},
        # DeepSpeed's own AdamW for the host is compiled on first use, which needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        # Autocast keeps fp32 masters, and the SAE and head out of 16 bits; DeepSpeed's `bf16` would cast every module.
        "torch_autocast": {"enabled": config.precision == "bfloat16", "dtype": "bfloat16"},
        "zero_optimization": zero,
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }

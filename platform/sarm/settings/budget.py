"""What fits a device: tokens a pass, dtype, checkpointing and ZeRO stage, from its memory and the model's size.

Sizes are estimates of the tensors that are held at once. A share of the memory stays free, for what allocators and libraries take.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

Dtype = Literal["float32", "bfloat16"]
ZeroStage = Literal[0, 1, 2, 3]

_GB = 1e9
# Of a GPU's memory: CUDA's context, NCCL's buffers, what the allocator cannot join, and what an estimate misses.
USABLE_SHARE = 0.85
# More tokens a pass fill a GPU no better, and fewer leave it idle between kernels.
_MOST_TOKENS, _MOST_TRAINED_TOKENS = 65536, 16384
# On cores a pass of this many tokens is as fast as any.
CORE_TOKENS = 2048


class Device(NamedTuple):
    """One GPU, or the cores of a machine."""

    gpu_memory_gb: float = 0.0
    """0 for cores, whose memory other processes use too."""
    has_bfloat16: bool = True
    """Whether it multiplies bfloat16 natively (GPUs since compute capability 8.0)."""

    @property
    def is_gpu(self) -> bool:
        return self.gpu_memory_gb > 0

    @property
    def usable_gb(self) -> float:
        return self.gpu_memory_gb * USABLE_SHARE


class Size(NamedTuple):
    """A truncated model: all its weights, the widths that activations have, and its blocks."""

    weights: int
    d_in: int
    d_ff: int
    depth: int
    beside: int = 0
    """Weights that are held in float32 and never sharded: the SAE's."""


class PassBudget(NamedTuple):
    """How a frozen model is run."""

    dtype: Dtype
    batch_tokens: int
    gb: float
    """That it takes by estimate."""


class TrainingBudget(NamedTuple):
    """How a reward model is trained."""

    precision: Dtype
    batch_tokens: int
    gradient_checkpointing: bool
    zero_stage: ZeroStage
    gb: float
    """That it takes of one worker's device by estimate."""
    fits: bool = True


def pass_gb(size: Size, dtype: str, batch_tokens: int) -> float:
    """Weights, and what one batch holds inside a block."""
    return (size.weights + batch_tokens * (8 * size.d_in + 3 * size.d_ff)) * _wide(dtype) / _GB + 4 * size.beside / _GB


def training_gb(
    size: Size,
    precision: str,
    batch_tokens: int,
    workers: int,
    zero_stage: int,
    *,
    checkpointing: bool,
    trains: bool = True,
) -> float:
    """Weights, gradients, AdamW's moments and activations of one worker; ZeRO shares out what its stage says.

    A trained weight takes 16 bytes: itself, its gradient, two moments. Stages 1 and 2 keep another copy of their share of the weights,
    which AdamW works on.
    """
    bytes_a_weight = {0: 16.0, 1: 8 + 12 / workers, 2: 4 + 16 / workers, 3: 16 / workers}[zero_stage]
    held = size.weights * (bytes_a_weight if trains else 4.0) + 4.0 * size.beside
    wide = _wide(precision)
    inside_a_block = batch_tokens * (14 * size.d_in + 4 * size.d_ff) * wide
    blocks = size.depth * batch_tokens * size.d_in * wide + inside_a_block
    return (held + (blocks if checkpointing or not trains else size.depth * inside_a_block)) / _GB


def dtype_of(device: Device) -> Dtype:
    """bfloat16 on GPUs that multiply it; cores compute in float32 unless they are asked for something else."""
    return "bfloat16" if device.is_gpu and device.has_bfloat16 else "float32"


def pass_budget(
    device: Device, size: Size, max_length: int, dtype: Dtype | None = None, batch_tokens: int = 0
) -> PassBudget:
    """The most tokens a pass that fit, as a power of two; `dtype` and `batch_tokens` where they are not to be chosen.

    A pass that does not fit is split where it is run, so one sequence of `max_length` is the least.
    """
    dtype = dtype or dtype_of(device)
    if not batch_tokens:
        batch_tokens = CORE_TOKENS
        if device.is_gpu:
            fitting = (n for n in _halves(_MOST_TOKENS, max_length) if pass_gb(size, dtype, n) <= device.usable_gb)
            batch_tokens = next(fitting, max(64, max_length))
    return PassBudget(dtype, batch_tokens, pass_gb(size, dtype, batch_tokens))


def training_budget(
    device: Device,
    size: Size,
    workers: int,
    max_length: int,
    *,
    precision: Dtype | None = None,
    batch_tokens: int = 0,
    least_stage: ZeroStage = 0,
    is_stage_given: bool = False,
    checkpointing: bool = False,
    trains: bool = True,
) -> TrainingBudget:
    """The fastest way to train that fits: first without recomputing the blocks, then with, then with a higher ZeRO stage, then with fewer tokens.

    What is given is kept: the dtype, the tokens of a pass, checkpointing where it is asked for, and a ZeRO stage that is only ever raised, or
    not even that with `is_stage_given`.
    One worker has nothing to share out, but stage 3 keeps no second copy of its weights. If nothing fits, the smallest is returned with `fits` false.
    """
    precision = precision or dtype_of(device)
    if not device.is_gpu:
        batch_tokens = batch_tokens or CORE_TOKENS
        gb = _training_gb(size, precision, batch_tokens, workers, least_stage, checkpointing, trains)
        return TrainingBudget(precision, batch_tokens, checkpointing, least_stage, gb)
    tried = []
    for tokens, recomputes, stage in _ways(
        workers, max_length, batch_tokens, least_stage, checkpointing, is_stage_given=is_stage_given
    ):
        gb = _training_gb(size, precision, tokens, workers, stage, recomputes, trains)
        if gb <= device.usable_gb:
            return TrainingBudget(precision, tokens, recomputes, stage, gb)
        tried.append(TrainingBudget(precision, tokens, recomputes, stage, gb, fits=False))
    return min(tried, key=lambda budget: budget.gb)


def _training_gb(
    size: Size, precision: str, tokens: int, workers: int, stage: int, recomputes: bool, trains: bool
) -> float:
    return training_gb(size, precision, tokens, workers, stage, checkpointing=recomputes, trains=trains)


def _ways(
    workers: int,
    max_length: int,
    batch_tokens: int,
    least_stage: ZeroStage,
    checkpointing: bool,
    *,
    is_stage_given: bool,
) -> Iterator[tuple[int, bool, ZeroStage]]:
    """(tokens, checkpointing, ZeRO stage), the fastest first: recomputing costs a third, gathering weights for every pass about as much
    between nodes, and short passes more than both."""
    whole = max(4096, max_length)
    enough = [batch_tokens] if batch_tokens else list(_halves(_MOST_TRAINED_TOKENS, whole))
    fewer = [] if batch_tokens else list(_halves(whole // 2, max_length))
    # Stages 1 and 2 hold no less than stage 0 for one worker.
    higher: tuple[ZeroStage, ...] = () if is_stage_given else (2, 3) if workers > 1 else (3,)
    stages: tuple[ZeroStage, ...] = (least_stage, *(stage for stage in higher if stage > least_stage))
    pairs = [(recomputes, stage) for recomputes in (False, True) for stage in stages if stage < 3]
    pairs += [(recomputes, 3) for recomputes in (False, True) if 3 in stages]
    for tokens_of in (enough, fewer):
        for recomputes, stage in pairs:
            if recomputes or not checkpointing:
                for tokens in tokens_of:
                    yield tokens, recomputes, stage


def _halves(most: int, least: int) -> Iterator[int]:
    """`most`, half of it and so on, down to `least`."""
    while most >= max(64, least):
        yield most
        most //= 2


def _wide(dtype: str) -> int:
    return 4 if dtype == "float32" else 2

"""Settings that are left to the device: dtype, tokens a pass, checkpointing and ZeRO stage, filled in from what the run's GPUs or cores have.

What is finished or begun keeps the dtype and the ZeRO stage that it has, so that a run can go on on another device.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sarm.contracts.folders import SWEEP_FILE, Folders
from sarm.contracts.manifest import MANIFEST
from sarm.contracts.untrusted import read_json
from sarm.data.formats.model_shapes import Shape, shape_of
from sarm.engine.ray.machine import Machine
from sarm.settings.budget import Device, Dtype, PassBudget, Size, dtype_of, pass_budget, training_budget
from sarm.settings.contexts import ContextsSettings
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RewardSettings
from sarm.stages.dry_run.formulas import reward_depths, size_of, trains_weights
from sarm.stages.dry_run.rounding import size

# Of a model whose dimensions are not known; a pass that does not fit is split.
_UNKNOWN_TOKENS = 8192


class Fit(NamedTuple):
    """A config without open settings, and what was chosen, a line each."""

    config: Any
    lines: tuple[str, ...]


def fitted(config: Any, machine: Machine) -> Fit:
    """The config of a chain or sweep with every setting that is left to the device filled in for one of the machine's GPUs, or for its cores."""
    model = getattr(config, "model", None)
    if not isinstance(model, ModelSettings):
        return Fit(config, ())
    device, shape = machine.device(config.run.use_gpu), shape_of(model)
    folders, lines = Folders(config.run.out), []
    if model.dtype == "auto":
        known = made_in(folders.chat_activations, "compute_dtype") or made_in(folders.sarm, "dtype")
        known = known or _swept_in(config.run.out, "model", "dtype")
        model = replace(model, dtype=known or dtype_of(device))
        config = replace(config, model=model)
    if (extraction := getattr(config, "extraction", None)) is not None:
        tokens, gb = _tokens(device, shape, model, extraction.batch_tokens, max(model.layer, *extraction.layers, 0))
        config = replace(config, extraction=replace(extraction, batch_tokens=tokens))
        lines.append(f"passes of {tokens:,} tokens in {model.dtype}{_taken(gb, device)}")
    if isinstance(contexts := getattr(config, "contexts", None), ContextsSettings):
        tokens, _ = _tokens(device, shape, model, contexts.batch_tokens, model.layer)
        config = replace(config, contexts=replace(contexts, batch_tokens=tokens))
    if isinstance(reward := getattr(config, "reward", None), RewardSettings):
        reward, line = _fit_reward(config, reward, shape, device, machine, folders)
        config = replace(config, reward=reward)
        lines.append(line)
    return Fit(config, tuple(lines))


def reading_budget(
    device: Device, folder: Path | None, max_length: int, batch_tokens: int, dtype: str = "auto"
) -> PassBudget:
    """How the model in a folder is read by a job outside the chain: what is 0 or `auto` is chosen for the device.

    A folder of a SARM or of another reward model; of one whose dimensions cannot be read (None: no folder), the tokens are those that any GPU
    holds.
    """
    chosen = dtype_of(device) if dtype == "auto" else "bfloat16" if dtype == "bfloat16" else "float32"
    if folder is None or (known := _size_in(folder)) is None:
        return PassBudget(chosen, batch_tokens or _unknown_tokens(device), 0.0)
    return pass_budget(device, known, max_length, chosen, batch_tokens)


def _fit_reward(
    config: Any, reward: RewardSettings, shape: Shape | None, device: Device, machine: Machine, folders: Folders
) -> tuple[RewardSettings, str]:
    precision = reward.precision
    if precision == "auto":
        known = _trained_with(folders, "precision") or _swept_in(config.run.out, "reward", "precision")
        precision = "bfloat16" if (known or dtype_of(device)) == "bfloat16" else "float32"
    if shape is None:
        tokens = reward.batch_tokens or min(_UNKNOWN_TOKENS, _unknown_tokens(device))
        return replace(reward, precision=precision, batch_tokens=tokens), f"training of {tokens:,} tokens a pass in {precision}"  # fmt: skip
    sae = getattr(config, "sae", None)
    depth = max(reward_depths(config.model, reward, shape))
    workers = machine.workers(config.run.num_workers)
    # It was raised to where the model fitted then: another one would be another training, whose states and folder are refused.
    made = _trained_with(folders, "zero_stage")
    made = _swept_in(config.run.out, "reward", "zero_stage") if made is None else made
    is_made = isinstance(made, int) and made >= reward.zero_stage
    budget = training_budget(
        device,
        size_of(shape, depth, sae.d_sae if sae else 0),
        min(workers, machine.num_gpus) if machine.num_gpus else workers,
        config.model.max_length,
        precision=precision,
        batch_tokens=reward.batch_tokens,
        least_stage=made if is_made else reward.zero_stage,
        is_stage_given=is_made,
        checkpointing=reward.gradient_checkpointing,
        trains=trains_weights(reward),
    )
    reward = replace(
        reward,
        precision=precision,
        batch_tokens=budget.batch_tokens,
        gradient_checkpointing=budget.gradient_checkpointing,
        zero_stage=budget.zero_stage,
    )
    recomputed = ", blocks recomputed" if budget.gradient_checkpointing else ""
    line = f"training of {budget.batch_tokens:,} tokens a pass in {precision}, ZeRO {budget.zero_stage}{recomputed}{_taken(budget.gb, device)}"
    if not budget.fits:
        line += (
            "; that does not fit: take more GPUs, a shallower --model.layer, --reward.lora-rank, or --reward.offload"
        )
    return reward, line


def _tokens(device: Device, shape: Shape | None, model: ModelSettings, asked: int, depth: int) -> tuple[int, float]:
    if shape is None:
        return asked or _unknown_tokens(device), 0.0
    dtype: Dtype = "bfloat16" if model.dtype == "bfloat16" else "float32"
    budget = pass_budget(device, size_of(shape, depth), model.max_length, dtype, asked)
    return budget.batch_tokens, budget.gb


def _unknown_tokens(device: Device) -> int:
    return _UNKNOWN_TOKENS if device.is_gpu else pass_budget(device, Size(0, 1, 1, 1), 8).batch_tokens


def _taken(gb: float, device: Device) -> str:
    return f", {size(gb)} of {size(device.gpu_memory_gb)}" if device.is_gpu and gb else ""


def made_in(folder: Path, name: str) -> Any:
    """A setting that a finished folder was made with; None if it is not there."""
    try:
        return read_json(folder / MANIFEST)["config"].get(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _trained_with(folders: Folders, name: str) -> Any:
    """A setting of the finished reward model, else of the newest state of a training that has begun; None if there is neither."""
    known = made_in(folders.sarm, name)
    if known is not None:
        return known
    states = sorted(folders.states(folders.sarm.name).glob(f"step-*/{MANIFEST}"), reverse=True)
    for path in states:
        try:
            return read_json(path)["identity"]["config"].get(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def _swept_in(out: Path, section: str, name: str) -> Any:
    """A setting that all cells of the sweep in a folder have; None if it is no sweep's."""
    try:
        return read_json(out / SWEEP_FILE)[section].get(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _size_in(folder: Path) -> Size | None:
    """The size of a model by its files: bytes of weights, as if in float32, and the widths of its config or of the backbone inside it."""
    try:
        about = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 4
    for widths in _sections(about):
        d_in, d_ff = widths.get("hidden_size"), widths.get("intermediate_size")
        if isinstance(d_in, int) and isinstance(d_ff, int) and weights:
            return Size(weights, d_in, d_ff, 1)
    return None


def _sections(about: Any) -> Iterator[dict[str, Any]]:
    """A config and those inside it: SARM's has its backbone's, a multimodal model's that of its language model."""
    if isinstance(about, dict):
        yield about
        yield from (about[name] for name in ("backbone", "text_config") if isinstance(about.get(name), dict))

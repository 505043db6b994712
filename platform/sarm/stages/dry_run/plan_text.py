"""What `--dry-run` prints of a job: what it would do, a line a stage, and what that is expected to take."""

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sarm.data.formats.model_shapes import shape_of
from sarm.engine.ray.machine import PEAK_SHARE, Machine, machine_of
from sarm.settings.model import ModelSettings
from sarm.settings.reward import too_few_pairs
from sarm.settings.run import STAGES
from sarm.stages.dry_run.costs import stage_costs
from sarm.stages.dry_run.rounding import count, duration, rounded, size
from sarm.stages.dry_run.scales import on_reference_gpus
from sarm.stages.dry_run.scaling import busy_share
from sarm.stages.dry_run.source_sizes import sizes_of
from sarm.stages.dry_run.stage_cost import StageCost
from sarm.stages.fitting import fitted

WIDTH = 80
_HEADS = ("stage", "state", "time", "GPU-h", "memory", "GPU mem", "disk")
_WIDTHS = (20, 8, 9, 8, 9, 9, 9)
DONE = "done"


def plan_text(
    config: Any,
    states: Sequence[tuple[str, str]] | None = None,
    costs: Sequence[StageCost] | None = None,
    machine: Machine | None = None,
    *,
    is_dry: bool = True,
) -> str:
    """The plan of a job of the chain, at most 80 columns wide.

    `states` are the job's stages in order, each with how it stands; a stage that is `done` costs nothing. Without them, every stage
    that the config has settings of is to do. `costs` and `machine` are worked out unless they are given. A job that begins
    (`is_dry` false) says the same without the details.
    Raises UserError for a source that cannot be opened.
    """
    machine = machine or planned_machine(config)
    costs = stage_costs(config, machine) if costs is None else costs
    if states is None:
        states = [(cost.stage, "to do") for cost in costs]
    by_stage = {cost.stage: cost for cost in costs}
    planned = [(by_stage.get(name) or _nothing(name), state) for name, state in states]
    todo = [cost for cost, state in planned if state != DONE]
    config, chosen = fitted(config, machine)
    lines = [
        *_about(config, machine),
        *(line for one in chosen for line in entry("budget", one)),
        "",
        *_table(planned),
        "",
    ]
    lines += _wrapped(
        f"GPU-h: hours of one {machine.planned_gpu} at {PEAK_SHARE:.0%} of its peak (assumed). Memory: of one process and of one GPU. "
        "Times and sizes are estimates, to a factor of 2."
    )
    if is_dry and any(cost.work for cost in todo):
        lines += ["", "what there is to do:"]
        for cost in todo:
            lines += textwrap.wrap(cost.work, WIDTH, initial_indent=f"  {cost.stage:<20}", subsequent_indent=" " * 22)
    if is_dry and (table := on_reference_gpus(config, {cost.stage for cost in todo})):
        lines += ["", *table]
    if notes := list(_notes(config, machine, todo)):
        lines += ["", *(line for note in notes for line in _wrapped(note))]
    return "\n".join([*lines, "", *_wrapped("All settings, for --config: add --json." if is_dry else "")])


def planned_machine(config: Any) -> Machine:
    """The machine or cluster of the config's run, with the rate of this machine if the config asks to measure it."""
    machine = machine_of(config.run)
    extraction, model = getattr(config, "extraction", None), getattr(config, "model", None)
    if extraction is None or not isinstance(model, ModelSettings) or not extraction.calibrate:
        return machine
    from sarm.stages.extract_calibration import tokens_per_second

    config = fitted(config, machine).config
    model, extraction = config.model, config.extraction
    tokens = tokens_per_second(model, extraction)
    # Asked this late because the model's config is in the cache by now.
    if (shape := shape_of(model)) is None:
        return machine._replace(
            note=f"Measured {tokens:,.0f} tokens a second, but the dimensions of {model.name} are not known."
        )
    depth = max(model.layer, *extraction.layers, 0)
    return machine._replace(
        measured_forward=2.0 * shape.weights_a_block * depth * tokens,
        note=f"Measured here: {rounded(tokens)} tokens a second of one actor through {depth} blocks.",
    )


def settings_text(config: Any) -> str:
    """The plan of a job outside the chain: where it writes, and the settings that are not at their defaults."""
    lines = [f"writes to    {config.run.out}"] if getattr(config, "run", None) is not None else []
    if isinstance(model := getattr(config, "model", None), str):
        lines.append(f"model        {model}")
    if asked := getattr(config, "questions_per_latent", None):
        lines += [f"judge        {name}: at most {num} questions a latent" for name, num in asked().items()]
    changed = [(name, value) for name, value in _changed(config) if name not in ("run.out", "run.dry_run", "model")]
    if changed:
        lines += ["", "settings that differ from the defaults:"]
        lines += [f"  {name} = {value}" for name, value in changed]
    return "\n".join([*lines, "", *_wrapped("All settings, for --config: add --json.")])


def _changed(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _changed(value, f"{prefix}{field.name}.")
        else:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            # `out` is made absolute, and so are paths like it: those that were given are told from their defaults by name alone.
            if value != default:
                yield prefix + field.name, " ".join(map(str, value)) if isinstance(value, tuple) else value


def _about(config: Any, machine: Machine) -> Iterator[str]:
    run = config.run
    yield from entry("writes to", str(run.out))
    model: ModelSettings | None = getattr(config, "model", None)
    if model is not None:
        shape = shape_of(model)
        of = f" of {shape.num_blocks}" if shape else ""
        yield from entry("model", f"{model.name}, first {model.layer}{of} blocks, {model.dtype}")
    if (sae := getattr(config, "sae", None)) is not None:
        yield from entry("dictionary", f"{sae.d_sae:,} latents, {sae.k} active")
    extraction = getattr(config, "extraction", None)
    sizes = sizes_of(run.out, getattr(config, "data", None), *([extraction] if extraction else []))
    if (texts := sizes.texts) is not None:
        yield from entry("texts", f"{count(texts.rows)}, {count(texts.tokens)} tokens ({texts.basis})")
    if (pairs := sizes.pairs) is not None:
        yield from entry(
            "pairs",
            f"{count(pairs.train)} to train on, {count(pairs.heldout)} held out, {rounded(pairs.tokens_a_pair)} tokens each ({pairs.basis})",
        )
    yield from entry("runs on", machine.describe())


def entry(name: str, text: str) -> list[str]:
    """The lines of one fact of a plan: its name, and what is said of it beside it."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{name:<13}",
        subsequent_indent=" " * 13,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(planned: Sequence[tuple[StageCost, str]]) -> Iterator[str]:
    yield _row(_HEADS)
    for cost, state in planned:
        if state == DONE:
            yield _row((cost.stage, state))
        else:
            yield _row((cost.stage, state, *_cells(cost)))
    todo = [cost for cost, state in planned if state != DONE]
    if len(planned) > 1:
        time, gpu_hours, disk = (
            _total([getattr(cost, name) for cost in todo]) for name in ("seconds", "gpu_hours", "disk_gb")
        )
        yield _row(("total", "", duration(time) if todo else "-", _hours(gpu_hours), "", "", size(disk)))


def _cells(cost: StageCost) -> tuple[str, ...]:
    gpu = "-" if cost.seconds is not None and cost.gpu_gb is None else size(cost.gpu_gb)
    return (duration(cost.seconds), _hours(cost.gpu_hours), size(cost.host_gb), gpu, size(cost.disk_gb))


def _hours(hours: float | None) -> str:
    return "unknown" if hours is None else "-" if hours == 0 else rounded(hours)


def _total(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _row(cells: Sequence[str]) -> str:
    first, *others = (f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=False))
    return " ".join([first, *others]).rstrip()


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _nothing(stage: str) -> StageCost:
    return StageCost(
        stage=stage,
        seconds=None,
        gpu_hours=None,
        host_gb=None,
        gpu_gb=None,
        disk_gb=None,
        work="" if stage in STAGES else "not a stage that is known here",
    )


def _notes(config: Any, machine: Machine, todo: Sequence[StageCost]) -> Iterator[str]:
    run, model = config.run, getattr(config, "model", None)
    if machine.note:
        yield machine.note
    if isinstance(model, ModelSettings) and ":" not in model.name and not Path(model.name).exists():
        if model.revision == "main":
            yield "The model's revision main may move: pin a commit with --model.revision"
        if shape_of(model) is None:
            yield f"{model.name} is not in the cache: its layers are not checked, and what depends on its dimensions is unknown."
    sizes = sizes_of(run.out, getattr(config, "data", None))
    for spec in sizes.unknown:
        yield f"The size of {spec} is not known before it is read: pass --data.max-texts or --data.max-pairs to bound it."
    reward, num_workers = getattr(config, "reward", None), machine.workers(run.num_workers)
    if reward is not None and (begin := too_few_pairs(reward.batch_pairs, num_workers)):
        yield (
            f"{begin}: with lengths as they are assumed, these are busy for {busy_share(reward.batch_pairs, num_workers):.0%} of the time, which is counted above. "
            "Larger steps (--reward.batch-pairs) fill them, and are another training."
        )
    if not machine.is_joined:
        yield from _room(run.out, machine, todo)


def _room(out: Path, machine: Machine, todo: Sequence[StageCost]) -> Iterator[str]:
    """What this machine lacks."""
    import psutil

    memory = psutil.virtual_memory().total / 1e9
    for cost in todo:
        if cost.host_gb is not None and cost.host_gb > memory:
            yield f"{cost.stage} needs about {size(cost.host_gb)} of memory; this machine has {size(memory)}."
    disk = sum(cost.disk_gb or 0.0 for cost in todo)
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    if disk > (free := shutil.disk_usage(there).free / 1e9):
        yield f"All stages need about {size(disk)} of disk; {there} has {size(free)} free."

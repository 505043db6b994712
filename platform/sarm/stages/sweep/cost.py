"""What an ablation costs, before it is paid for: cells, stages, GPU-hours, disk, and time on this machine or the cluster at hand.

The formulas of the stages are those of `sarm.stages.dry_run`, which a single run's plan has too.
"""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from sarm.data.formats.model_shapes import Shape, shape_of
from sarm.engine.ray.machine import PEAK_SHARE, Machine
from sarm.settings.axes import text_of
from sarm.settings.model import ModelSettings
from sarm.settings.sweep import FROZEN, Ablation
from sarm.stages.dry_run.formulas import extracted, reward_flops, sae_flops, sae_rows
from sarm.stages.dry_run.plan_text import WIDTH, entry, planned_machine
from sarm.stages.dry_run.rounding import about, count, duration, rounded, size
from sarm.stages.dry_run.source_sizes import Pairs, Texts, sizes_of
from sarm.stages.fitting import fitted
from sarm.stages.inputs import check_layers, check_sources
from sarm.stages.sweep.cells import check_sweep, sweep_plan
from sarm.stages.sweep.plan import SweepPlan
from sarm.stages.sweep.readings import Reading

# Starting the workers of a trial, loading its model, and reading it back to score; before that Ray, the passes of extraction, and
# the training of each layer's SAEs.
_SECONDS_A_CELL, _SECONDS_BEFORE, _SECONDS_A_LAYER = 40, 34, 15


def describe_sweep(config: Ablation) -> str:
    """`sweep_text`, and where the settings are."""
    machine = planned_machine(config)
    return f"{sweep_text(fitted(config, machine).config, machine)}\n\nAll settings, for --config: add --json."


def sweep_text(config: Ablation, machine: Machine) -> str:
    """Cells, GPU-hours, disk and time, one line each.

    Raises UserError as the sweep would for what it can tell: the grid, its layers and the sources.
    """
    cells, run, sweep = check_sweep(config), config.run, config.sweep
    if run.out.exists() or run.redo_from is not None:
        from sarm.stages.sweep.folder import refuse_other_sweep

        refuse_other_sweep(config)
    if not (run.out / "pairs" / "manifest.json").exists():
        check_sources(config.data)
    plan = SweepPlan(config, tuple(cells), {})
    for model in plan.models:
        check_layers(model, [model.layer], "--sweep.layers")
    shapes = {replace(model, layer=1): shape_of(model) for model in plan.models}
    known = {model: shape for model, shape in shapes.items() if shape is not None}
    if len(known) == len(shapes):
        plan = sweep_plan(config, cells, lambda model: known[model].d_in)
    names, passes = ", ".join(dict.fromkeys(model.name for model in shapes)), len(_layers_of_passes(plan))
    passes_text = "one forward pass for all" if passes == 1 else f"{passes} forward passes"
    lines = [
        *entry("writes to", str(run.out)),
        *entry("model", f"{names}, layers {', '.join(map(str, plan.layers))}, {passes_text}"),
        *entry("cells", f"{len(cells)} of {', '.join(sweep.components)}; {len(plan.saes)} SAEs; search {sweep.search}"),
    ]
    for axis in sweep.settings_axes:
        lines += entry("axis", f"{axis.name} {', '.join(map(text_of, axis.values))}")
    sizes = sizes_of(run.out, config.data, config.extraction)
    lacking = [model.name for model, shape in shapes.items() if shape is None] + list(sizes.unknown)
    if len(known) < len(shapes) or sizes.pairs is None or sizes.texts is None:
        said = ", ".join(dict.fromkeys(lacking)) or "a source"
        return "\n".join([*lines, *entry("cost", f"the size of {said} is not known here, so hours and disk are not")])
    return "\n".join([*lines, *_costs(plan=plan, shapes=known, texts=sizes.texts, pairs=sizes.pairs, machine=machine)])


def _costs(
    plan: SweepPlan, shapes: Mapping[ModelSettings, Shape], texts: Texts, pairs: Pairs, machine: Machine
) -> list[str]:
    work = _work_of(plan, shapes, texts, pairs)
    hours = work.by_stage(lambda stage, dtype: machine.gpu_rate(dtype) * 3600)
    total, disk = sum(hours.values()), work.disk
    shares = ", ".join(f"{name} {part / total:.0%}" for name, part in hours.items())
    parts = ", ".join(f"{name} {size(part / 1e9)}" for name, part in disk.items())
    return [
        *entry("texts", f"{count(texts.rows)}, {count(texts.tokens)} tokens ({texts.basis})"),
        *entry(
            "pairs", f"{count(pairs.train)} training pairs of {rounded(pairs.tokens_a_pair)} tokens ({pairs.basis})"
        ),
        *entry("compute", f"{sum(work.flops.values()):.2e} FLOPs"),
        *entry(
            "GPU-hours",
            f"{about(total)} of one {machine.planned_gpu} at {PEAK_SHARE:.0%} of its peak (assumed): {shares}",
        ),
        *entry("disk", f"about {size(sum(disk.values()) / 1e9)}: {parts}"),
        *entry("time", f"about {_time(plan, work, machine)}"),
        *(textwrap.wrap(machine.note, WIDTH) if machine.note else []),
    ]


class _Work(NamedTuple):
    """FLOPs by stage and the dtype that they are done in, and bytes on disk by what they hold."""

    flops: dict[tuple[str, str], float]
    disk: dict[str, float]

    def by_stage(self, rate: Callable[[str, str], float]) -> dict[str, float]:
        """FLOPs over a stage's rate in a dtype."""
        found: dict[str, float] = {}
        for (stage, dtype), flops in self.flops.items():
            found[stage] = found.get(stage, 0.0) + flops / rate(stage, dtype)
        return found


def _work_of(plan: SweepPlan, shapes: Mapping[ModelSettings, Shape], texts: Texts, pairs: Pairs) -> _Work:
    flops: dict[tuple[str, str], float] = {}
    disk = {"activations": 0.0, "SAEs": 0.0, "reward models": 0.0}
    rows: dict[Reading, float] = {}

    def add(stage: str, dtype: str, done: float) -> None:
        flops[stage, dtype] = flops.get((stage, dtype), 0.0) + done

    for reading, layers in plan.readings.items():
        shape, (unit,) = shapes[reading.model], reading.extraction.units
        read = sizes_of(plan.config.run.out, plan.config.data, reading.extraction).texts or texts
        rows[reading] = read.tokens if unit == "token" else read.sentences
        if unit == "token":
            # Its pass is short beside that of all texts, and the pairs' ends are there.
            disk["activations"] += rows[reading] * len(layers) * 2 * shape.d_in
        else:
            work = extracted(shape=shape, texts=read, pairs=pairs, units=(unit,), layers=set(layers))
            add("extraction", reading.model.dtype, work.flops)
            disk["activations"] += work.disk_bytes
    for key in plan.saes:
        d_in, sae = plan.d_in(key), plan.sae(key)
        add("SAEs", "bfloat16", sae_flops(d_in, sae, sae_rows(sae, rows[plan.reading(key)], 2 * pairs.train)))
        disk["SAEs"] += 8 * d_in * sae.d_sae
    # What is fitted on stored activations takes no pass and next to no room.
    for cell in (cell for cell in plan.cells if cell.component not in FROZEN):
        model, reward = plan.model(cell), plan.settings(cell).reward
        shape = shapes[replace(model, layer=1)]
        depth, tokens = cell.layer or shape.num_blocks, pairs.tokens_a_pair
        add("reward", reward.precision, reward_flops(shape, depth, reward, pairs.train * tokens))
        add("scoring", model.dtype, 2.0 * shape.weights_a_block * depth * pairs.heldout * tokens)
        disk["reward models"] += 4 * (shape.backbone(depth) + shape.d_in * cell.width * shape.d_in * 2)
    return _Work(flops, disk)


def _layers_of_passes(plan: SweepPlan) -> list[int]:
    """How many layers each pass reads; that of tokens goes over layers that another one has read, if any has."""
    readings = plan.readings
    of_texts = [len(layers) for reading, layers in readings.items() if reading.extraction.units != ("token",)]
    return of_texts or [len(layers) for layers in readings.values()]


def _time(plan: SweepPlan, work: _Work, machine: Machine) -> str:
    """Of all stages, with as many trials side by side as there is room for."""
    run, sweep = plan.config.run, plan.config.sweep
    each = max(1, run.num_workers, run.num_actors)
    if machine.num_gpus:
        at_once = max(1, machine.num_gpus // each)
        seconds = sum(work.by_stage(lambda stage, dtype: machine.gpu_rate(dtype)).values()) / machine.num_gpus
    else:
        cores = machine.cores
        at_once = max(1, cores // (each * (sweep.cpus_per_trial or run.cpus_per_worker or cores)))
        of_stage = work.by_stage(
            lambda stage, _: machine.core_rate(training=stage not in ("extraction", "scoring")) * cores
        )
        seconds = sum(of_stage.values())
    layers = sum(_layers_of_passes(plan))
    seconds += _SECONDS_BEFORE + _SECONDS_A_LAYER * layers + _SECONDS_A_CELL * len(plan.cells) / at_once
    side_by_side = f"{at_once} trial{'s' * (at_once > 1)} at a time"
    return f"{duration(seconds)}, {side_by_side}, on {machine.describe()}"

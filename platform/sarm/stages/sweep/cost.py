"""What an ablation costs, before it is paid for: cells, stages, GPU-hours, disk, and time on this machine or the cluster at hand.

The formulas of the stages are those of `sarm.stages.dry_run`, which a single run's plan has too.
"""

import textwrap
from collections.abc import Mapping, Sequence

from sarm.data.formats.model_shapes import Shape, shape_of
from sarm.engine.ray.machine import PEAK_SHARE, Machine
from sarm.settings.sweep import Ablation
from sarm.stages.dry_run.formulas import extracted, reward_flops, sae_flops
from sarm.stages.dry_run.plan_text import WIDTH, entry, planned_machine
from sarm.stages.dry_run.rounding import about, count, duration, rounded, size
from sarm.stages.dry_run.source_sizes import Pairs, Sizes, Texts, sizes_of
from sarm.stages.inputs import check_layers, check_sources
from sarm.stages.sweep.cells import Cell, check_sweep, layers_of, saes_of

# Starting the workers of a trial, loading its model, and reading it back to score; before that Ray, the passes of extraction, and
# the training of each layer's SAEs.
_SECONDS_A_CELL, _SECONDS_BEFORE, _SECONDS_A_LAYER = 40, 34, 15


def describe_sweep(config: Ablation) -> str:
    """`sweep_text`, and where the settings are."""
    return f"{sweep_text(config, planned_machine(config))}\n\nAll settings, for --config: add --json."


def sweep_text(config: Ablation, machine: Machine) -> str:
    """Cells, GPU-hours, disk and time, one line each.

    Raises UserError as the sweep would for what it can tell: the grid, its layers and the sources.
    """
    cells, run, sweep = check_sweep(config), config.run, config.sweep
    layers = layers_of(cells, config.model.layer)
    if run.out.exists() or run.redo_from is not None:
        from sarm.stages.sweep.plan import refuse_other_sweep

        refuse_other_sweep(config)
    if not (run.out / "pairs" / "manifest.json").exists():
        check_sources(config.data)
    check_layers(config.model, layers, "--sweep.layers")
    saes = saes_of(cells, config.extraction.units)
    lines = [
        *entry("writes to", str(run.out)),
        *entry("model", f"{config.model.name}, layers {', '.join(map(str, layers))}, one forward pass for all"),
        *entry("cells", f"{len(cells)} of {', '.join(sweep.components)}; {len(saes)} SAEs; search {sweep.search}"),
    ]
    shape, sizes = shape_of(config.model), sizes_of(run.out, config.data, config.extraction)
    lacking = [config.model.name] * (shape is None) + list(sizes.unknown)
    if shape is None or sizes.pairs is None or sizes.texts is None:
        said = ", ".join(lacking) or "a source"
        return "\n".join([*lines, *entry("cost", f"the size of {said} is not known here, so hours and disk are not")])
    return "\n".join([*lines, *_costs(config, cells, shape, sizes, sizes.texts, sizes.pairs, machine)])


def _costs(
    config: Ablation, cells: list[Cell], shape: Shape, sizes: Sizes, texts: Texts, pairs: Pairs, machine: Machine
) -> list[str]:
    layers = layers_of(cells, config.model.layer)
    saes = saes_of(cells, config.extraction.units)
    sae, reward, d_in = config.sae, config.reward, shape.d_in
    rows = {"token": min(texts.tokens, config.sweep.token_rows)}
    work = extracted(shape, texts, pairs, config.extraction.units, set(layers))
    trained = pairs.train * pairs.tokens_a_pair
    flops = {
        "extraction": work.flops,
        "SAEs": sum(
            sae_flops(
                d_in, sae, rows.get(key.unit, texts.sentences), 2 * pairs.train, width=key.width * d_in
            )
            for key in saes
        ),
        "reward": sum(reward_flops(shape, _depth(cell, shape), reward, trained) for cell in cells),
        "scoring": sum(
            2.0 * shape.weights_a_block * _depth(cell, shape) * pairs.heldout * pairs.tokens_a_pair for cell in cells
        ),
    }  # fmt: skip
    dtypes = {
        "extraction": config.model.dtype,
        "SAEs": "bfloat16",
        "reward": reward.precision,
        "scoring": config.model.dtype,
    }
    hours = {name: part / machine.gpu_rate(dtypes[name]) / 3600 for name, part in flops.items()}
    of_tokens = len({key.layer for key in saes if key.unit == "token"})
    activations = work.disk_bytes + rows["token"] * of_tokens * 2 * d_in
    dictionaries = sum(8 * d_in * key.width * d_in for key in saes)
    models = sum(4 * (shape.backbone(_depth(cell, shape)) + d_in * cell.width * d_in * 2) for cell in cells)
    total = sum(hours.values())
    shares = ", ".join(f"{name} {part / total:.0%}" for name, part in hours.items())
    parts = (
        f"activations {size(activations / 1e9)}, SAEs {size(dictionaries / 1e9)}, reward models {size(models / 1e9)}"
    )
    return [
        *entry("texts", f"{count(texts.rows)}, {count(texts.tokens)} tokens ({texts.basis})"),
        *entry(
            "pairs", f"{count(pairs.train)} training pairs of {rounded(pairs.tokens_a_pair)} tokens ({pairs.basis})"
        ),
        *entry("compute", f"{sum(flops.values()):.2e} FLOPs"),
        *entry(
            "GPU-hours",
            f"{about(total)} of one {machine.planned_gpu} at {PEAK_SHARE:.0%} of its peak (assumed): {shares}",
        ),
        *entry("disk", f"about {size((activations + dictionaries + models) / 1e9)}: {parts}"),
        *entry("time", f"about {_time(config, cells, flops, dtypes, machine)}"),
        *(textwrap.wrap(machine.note, WIDTH) if machine.note else []),
    ]


def _depth(cell: Cell, shape: Shape) -> int:
    # A cell without a layer has the whole backbone.
    return cell.layer or shape.num_blocks


def _time(
    config: Ablation, cells: Sequence[Cell], flops: Mapping[str, float], dtypes: Mapping[str, str], machine: Machine
) -> str:
    """Of all stages, with as many trials side by side as there is room for."""
    run = config.run
    each = max(run.num_workers, run.num_actors)
    if machine.num_gpus:
        at_once = max(1, machine.num_gpus // each)
        seconds = sum(part / machine.gpu_rate(dtypes[name]) for name, part in flops.items()) / machine.num_gpus
    else:
        cores = machine.cores
        at_once = max(1, cores // (each * (config.sweep.cpus_per_trial or run.cpus_per_worker or cores)))
        seconds = sum(
            part / machine.core_rate(training=name not in ("extraction", "scoring")) / cores
            for name, part in flops.items()
        )
    layers = layers_of(cells, config.model.layer)
    seconds += _SECONDS_BEFORE + _SECONDS_A_LAYER * len(layers) + _SECONDS_A_CELL * len(cells) / at_once
    side_by_side = f"{at_once} trial{'s' * (at_once > 1)} at a time"
    return f"{duration(seconds)}, {side_by_side}, on {machine.describe()}"

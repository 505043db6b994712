"""What a chain takes on one, eight and 32 H100: a table that a dry run shows below the plan for the machine that it found."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from sarm.engine.ray.machine import REFERENCE_GPU, Machine
from sarm.stages.dry_run.costs import stage_costs
from sarm.stages.dry_run.rounding import count, duration, size
from sarm.stages.dry_run.stage_cost import StageCost

GPUS = (1, 8, 32)
# Below this a chain needs no GPU, and the table is left out.
_LEAST_GPU_HOURS = 0.05
_CORES_A_GPU = 16
_WIDTHS = (19, 7, 6) + (7, 6) * len(GPUS)


def costs_on(config: Any, num_gpus: int) -> dict[str, StageCost]:
    """The cost of each stage on so many H100, all of them used."""
    machine = Machine(_CORES_A_GPU * num_gpus, num_gpus, REFERENCE_GPU)
    config = replace(config, run=replace(config.run, num_workers=0, num_actors=0))
    return {cost.stage: cost for cost in stage_costs(config, machine)}


def on_reference_gpus(config: Any, stages: Collection[str]) -> list[str]:
    """Rows, bytes on disk, and time and memory a GPU of the stages for each of `GPUS`; nothing where the stages take less than three GPU-minutes.

    At most 80 columns wide. Raises UserError for a source that cannot be opened.
    """
    costs = {num: costs_on(config, num) for num in GPUS}
    one = [cost for name, cost in costs[1].items() if name in stages]
    if sum(cost.gpu_hours or 0.0 for cost in one) < _LEAST_GPU_HOURS:
        return []
    heads = [part for num in GPUS for part in (f"{num} {REFERENCE_GPU}", "GPU")]
    lines = [_row(("on H100", "rows", "disk", *heads))]
    for cost in one:
        figures = [costs[num][cost.stage] for num in GPUS]
        cells = [part for of in figures for part in (_short(duration(of.seconds)), _memory(of.gpu_gb))]
        lines.append(_row((cost.stage, _short(_rows(cost.rows)), _short(size(cost.disk_gb)), *cells)))
    totals = [[costs[num][cost.stage].seconds for cost in one] for num in GPUS]
    sums = [part for times in totals for part in (_short(duration(_sum(times))), "")]
    lines.append(_row(("total", "", _short(size(_sum([cost.disk_gb for cost in one]))), *sums)))
    return lines


def _sum(parts: list[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _rows(rows: float | None) -> str:
    return "-" if rows is None else count(rows)


def _memory(gigabytes: float | None) -> str:
    return "-" if gigabytes is None else f"{gigabytes:.0f} GB" if gigabytes >= 1 else "< 1 GB"


def _short(text: str) -> str:
    """Figures in a narrow column: `50M`, `410GB`."""
    for long, short in ((" million", "M"), (" billion", "G"), (" TB", "TB"), (" GB", "GB"), (" MB", "MB"), ("unknown", "?")):  # fmt: skip
        text = text.replace(long, short)
    return text


def _row(cells: tuple[str, ...]) -> str:
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()

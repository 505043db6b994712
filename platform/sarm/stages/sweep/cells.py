"""Which cells an ablation has, each once, and what is refused before anything starts. Loads nothing heavy."""

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from sarm.settings.axes import text_of
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings
from sarm.settings.sweep import Ablation
from sarm.stages.sweep.plan import SweepPlan, without_idle
from sarm.stages.sweep.points import Cell, grid


def cells_of(config: Ablation) -> list[Cell]:
    """The distinct cells, in the order of the axes; for `random`, the drawn ones.

    Raises UserError for a draw larger than the grid, and for settings that do not go together.
    """
    points = grid(config)
    whole = SweepPlan(config, tuple(points), {})
    for settings in dict.fromkeys(cell.settings for cell in points):
        try:
            whole.settings(points[0]._replace(settings=settings))
        except UserError as error:
            said = ", ".join(f"{name}={text_of(value)}" for name, value in settings)
            raise UserError(f"a cell with {said} cannot be: {error}" if said else str(error)) from error
    cells = list(dict.fromkeys(without_idle(cell, whole.decides) for cell in points))
    sweep = config.sweep
    if sweep.search != "random":
        return cells
    if sweep.num_samples > len(cells):
        raise UserError(
            f"--sweep.num-samples {sweep.num_samples} is more than the grid's {len(cells)} cells. Pass at most {len(cells)}, or --sweep.search grid."
        )
    drawn = set(random.Random(0).sample(range(len(cells)), sweep.num_samples))
    return [cell for number, cell in enumerate(cells) if number in drawn]


def check_sweep(config: Ablation) -> list[Cell]:
    """The cells, after the checks that need neither the model nor a cluster.

    Raises UserError.
    """
    for axis_units in (config.extraction.units, *_units(config)):
        if len(axis_units) > 1 or axis_units[0] == "token":
            raise UserError(
                f"an ablation's SAEs learn from one unit, and token_sae from tokens besides, got --extraction.units {' '.join(axis_units)}. Pass document, sentence or turn_end."
            )
    if config.reward.baselines:
        raise UserError(
            "baselines are components of an ablation. Pass --reward.baselines with nothing and --sweep.components."
        )
    if config.sweep.search == "optuna" and config.sweep.design != "grid":
        raise UserError("Optuna proposes points of a grid. Pass --sweep.design grid, or another --sweep.search.")
    return cells_of(config)


def _units(config: Ablation) -> tuple[Any, ...]:
    return next((axis.values for axis in config.sweep.settings_axes if axis.name == "extraction.units"), ())


def sweep_plan(config: Ablation, cells: Iterable[Cell], width_of: Callable[[ModelSettings], int]) -> SweepPlan:
    """The plan, with each model's width looked up once; raises UserError for settings that its dictionaries do not hold."""
    unknown = SweepPlan(config, tuple(cells), {})
    backbones = dict.fromkeys(replace(model, layer=1) for model in unknown.models)
    found = unknown._replace(d_ins={model: width_of(model) for model in backbones})
    for cell in found.cells:
        d_in = found.d_in(cell)
        if cell.k > cell.width * d_in:
            raise UserError(
                f"k={cell.k} is more than the {cell.width} x {d_in} latents of the smallest dictionary. Pass a smaller --sweep.ks, or larger --sweep.widths."
            )
        found.settings(cell)
    return found

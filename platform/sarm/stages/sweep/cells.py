"""The cells of an ablation and the SAEs that they read. Loads nothing heavy.

A cell is (layer, width as a multiple of d_in, k, component, seed). What its component does not depend on is 0, so that cells
that would be one and the same are one.
"""

import random
from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

from sarm.settings.checks import UserError
from sarm.settings.sweep import WITHOUT_SAE, Ablation, Component, SweepSettings


class Cell(NamedTuple):
    """One point of the grid; width and k are 0 for a component without an SAE, the layer for the whole backbone."""

    layer: int
    width: int
    k: int
    component: Component
    seed: int


class SaeKey(NamedTuple):
    """Which SAE a cell reads; `unit` is what of a text it learnt from, the first of `extraction.units` or `token`."""

    layer: int
    width: int
    k: int
    unit: str
    seed: int


def cells_of(sweep: SweepSettings) -> list[Cell]:
    """The distinct cells, in the order of the axes; for `random`, the drawn ones.

    Raises UserError for a draw larger than the grid.
    """
    if sweep.design == "grid":
        points = list(product(sweep.layers, sweep.widths, sweep.ks))
    else:
        assert sweep.centre is not None
        layer, width, k = sweep.centre
        points = [(other, width, k) for other in sweep.layers]
        points += [(layer, other, k) for other in sweep.widths] + [(layer, width, other) for other in sweep.ks]
    compared = points if sweep.centre is None else [sweep.centre]
    found = [
        _cell(*point, component, seed)
        for component in sweep.components
        for point in (points if component == "sarm" else compared)
        for seed in (*sweep.seeds, *(sweep.centre_seeds if point == sweep.centre else ()))
    ]
    found = list(dict.fromkeys(found))
    if sweep.search != "random":
        return found
    if sweep.num_samples > len(found):
        raise UserError(
            f"--sweep.num-samples {sweep.num_samples} is more than the grid's {len(found)} cells. Pass at most {len(found)}, or --sweep.search grid."
        )
    drawn = set(random.Random(0).sample(range(len(found)), sweep.num_samples))
    return [cell for number, cell in enumerate(found) if number in drawn]


def _cell(layer: int, width: int, k: int, component: Component, seed: int) -> Cell:
    if component in WITHOUT_SAE:
        width, k, layer = 0, 0, 0 if component == "scalar_full" else layer
    return Cell(layer, width, k, component, seed)


def cell_at(sweep: SweepSettings, layer: int, width: int, k: int, component: Component, seed: int) -> Cell:
    """The grid's cell nearest to a point of the axes: components other than `sarm` are at the centre, where there is one."""
    point = (layer, width, k) if component == "sarm" or sweep.centre is None else sweep.centre
    return _cell(*point, component, seed)


def saes_of(cells: Iterable[Cell], units: Sequence[str]) -> list[SaeKey]:
    """The distinct SAEs that the cells read, those of one layer and unit together."""
    keys = [sae_key(cell, units) for cell in cells]
    return sorted({key for key in keys if key is not None}, key=lambda key: (key.layer, key.unit, key))


def layers_of(cells: Iterable[Cell], otherwise: int) -> list[int]:
    """All layers that activations are needed of, lowest first."""
    return sorted({cell.layer for cell in cells if cell.layer} or {otherwise})


def sae_key(cell: Cell, units: Sequence[str]) -> SaeKey | None:
    """The SAE that the cell reads, None for a scalar head."""
    if cell.component in WITHOUT_SAE:
        return None
    unit = "token" if cell.component == "token_sae" else units[0]
    return SaeKey(cell.layer, cell.width, cell.k, unit, cell.seed)


def check_sweep(config: Ablation) -> list[Cell]:
    """The cells, after the checks that need neither the model nor a cluster.

    Raises UserError.
    """
    if len(config.extraction.units) > 1 or "token" in config.extraction.units:
        raise UserError(
            f"an ablation's SAEs learn from one unit, and token_sae from tokens besides, got --extraction.units {' '.join(config.extraction.units)}. Pass document or sentence."
        )
    if config.reward.baselines:
        raise UserError(
            "baselines are components of an ablation. Pass --reward.baselines with nothing and --sweep.components."
        )
    if config.sweep.search == "optuna" and config.sweep.design != "grid":
        raise UserError("Optuna proposes points of a grid. Pass --sweep.design grid, or another --sweep.search.")
    return cells_of(config.sweep)

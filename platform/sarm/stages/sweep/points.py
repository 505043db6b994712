"""The points of an ablation's axes, and the SAEs that are read at them. Loads nothing heavy.

A cell is (layer, width as a multiple of d_in, k, component, seed, settings). What its component does not depend on is 0, so that cells
that would be one and the same are one; `cells.cells_of` leaves out the settings that make no difference.
"""

from itertools import product
from typing import Any, NamedTuple

from sarm.settings.sweep import WITHOUT_SAE, Ablation, Component

Settings = tuple[tuple[str, Any], ...]
"""Dotted names of settings with their values, by name."""


class Cell(NamedTuple):
    """One point of the grid; width and k are 0 for a component without an SAE, the layer for the whole backbone."""

    layer: int
    width: int
    k: int
    component: Component
    seed: int
    settings: Settings = ()
    """What differs from the sweep's own settings."""


class SaeKey(NamedTuple):
    """Which SAE a cell reads; `unit` is what of a text it learnt from, the first of `extraction.units` or `token`."""

    layer: int
    width: int
    k: int
    unit: str
    seed: int
    settings: Settings = ()
    """What differs from the sweep's own settings and decides the SAE."""


def grid(config: Ablation) -> list[Cell]:
    """A cell for every point of the axes, in their order."""
    sweep = config.sweep
    axes: list[tuple[Any, ...]] = [sweep.layers, sweep.widths, sweep.ks, *(axis.values for axis in sweep.settings_axes)]
    centre = centre_of(config)
    if sweep.design == "grid":
        points = list(product(*axes))
    else:
        assert centre is not None
        points = [
            (*centre[:place], value, *centre[place + 1 :]) for place, values in enumerate(axes) for value in values
        ]
    compared = points if centre is None else [centre]
    return [
        _cell(config, point, component, seed)
        for component in sweep.components
        for point in (points if component == "sarm" else compared)
        for seed in (*sweep.seeds, *(sweep.centre_seeds if point == centre else ()))
    ]


def centre_of(config: Ablation) -> tuple[Any, ...] | None:
    """The centre's value on every axis: layer, width, k, and each of `sweep.axes`; None without a centre."""
    if config.sweep.centre is None:
        return None
    own = [(axis.of(config), axis.values) for axis in config.sweep.settings_axes]
    return (*config.sweep.centre, *(value if value in values else values[0] for value, values in own))


def _cell(config: Ablation, point: tuple[Any, ...], component: Component, seed: int) -> Cell:
    layer, width, k, *values = point
    if component in WITHOUT_SAE:
        width, k, layer = 0, 0, 0 if component == "scalar_full" else layer
    names = [axis.name for axis in config.sweep.settings_axes]
    return Cell(
        layer=layer,
        width=width,
        k=k,
        component=component,
        seed=seed,
        settings=tuple(sorted(zip(names, values, strict=True))),
    )


def cell_at(config: Ablation, point: tuple[Any, ...], component: Component, seed: int) -> Cell:
    """The grid's cell nearest to a point of the axes: components other than `sarm` are at the centre, where there is one."""
    centre = centre_of(config)
    return _cell(config, point if component == "sarm" or centre is None else centre, component, seed)

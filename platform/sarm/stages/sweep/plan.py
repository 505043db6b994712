"""An ablation with its models' widths: the cells, and the settings, names and folders of every SAE and cell."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sarm.settings.axes import SECTIONS, text_of
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RANDOM_ENCODERS, RewardSettings
from sarm.settings.run import RunSettings
from sarm.settings.sae import SaeSettings
from sarm.settings.sweep import FROZEN, WITHOUT_SAE, Ablation, Component
from sarm.stages import plan
from sarm.stages.sweep.points import Cell, SaeKey, Settings, cell_at
from sarm.stages.sweep.readings import Reading, contents_of, digest, reading_of

# Stands for a width that is not known yet: any k and any prefix fit.
_WIDE = 1 << 20
_SUFFIX_LENGTH = 100
Point = TypeVar("Point", Cell, SaeKey)
Section = TypeVar("Section")


class SweepPlan(NamedTuple):
    """An ablation with its cells and the width that the dictionaries of each model (at layer 1) are multiples of; picklable."""

    config: Ablation
    cells: tuple[Cell, ...]
    d_ins: Mapping[ModelSettings, int]
    mlflow_uri: str = ""
    parent_run_id: str = ""

    def settings(self, point: Cell | SaeKey) -> Ablation:
        """The sweep's settings with those of the cell or SAE put in.

        Raises UserError for settings that do not go together.
        """
        changed = self._changed(point)
        if point.width:
            changed["sae"] |= {"d_sae": point.width * self.d_in(point), "k": point.k}
        parts: dict[str, Any] = {name: _put_in(getattr(self.config, name), own) for name, own in changed.items()}
        return replace(self.config, **parts)

    def model(self, point: Cell | SaeKey) -> ModelSettings:
        """The point's model, cut at its layer; the whole backbone's cut is the component's own affair."""
        return _put_in(self.config.model, self._changed(point)["model"])

    def d_in(self, point: Cell | SaeKey) -> int:
        """The width of the point's model."""
        return self.d_ins.get(replace(self.model(point), layer=1), _WIDE)

    def _changed(self, point: Cell | SaeKey) -> dict[str, dict[str, Any]]:
        changed: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        changed["model"]["layer"] = point.layer or self.layers[0]
        for name, value in point.settings:
            section, _, field = name.partition(".")
            changed[section][field] = value
        return changed

    @property
    def layers(self) -> list[int]:
        """All layers of the cells, lowest first."""
        return sorted({cell.layer for cell in self.cells if cell.layer} or {self.config.model.layer})

    @property
    def models(self) -> list[ModelSettings]:
        """The distinct models, each at each of its layers."""
        return list(dict.fromkeys(self.model(cell) for cell in self.cells))

    @property
    def saes(self) -> list[SaeKey]:
        """The distinct SAEs, those of one layer and unit together."""
        keys = {key for cell in self.cells if (key := self.sae_key(cell))}
        return sorted(
            keys, key=lambda key: (key.layer, key.unit, *key[:3], key.seed, len(key.settings), str(key.settings))
        )

    @property
    def readings(self) -> dict[Reading, list[int]]:
        """Every pass that an SAE or a head learns from, with its layers, lowest first; that of all cells if none does."""
        probed = [cell for cell in self.cells if cell.component in WITHOUT_SAE and self._read(cell)]
        layers: dict[Reading, set[int]] = {}
        points: list[Cell | SaeKey] = [*self.saes, *probed]
        for point in points or self.cells:
            layers.setdefault(self.reading(point), set()).add(point.layer or self.layers[0])
        return {reading: sorted(own) for reading, own in layers.items()}

    def reading(self, point: Cell | SaeKey) -> Reading:
        """The pass that the point's activations come from; of a cell, without the tokens that its SAE may read."""
        settings = self.settings(point)
        return reading_of(settings, point.unit if isinstance(point, SaeKey) else settings.extraction.units[0])

    def sae_key(self, cell: Cell) -> SaeKey | None:
        """The SAE that the cell reads, None for a scalar head."""
        if cell.component in WITHOUT_SAE:
            return None
        unit = "token" if cell.component == "token_sae" else self.settings(cell).extraction.units[0]
        key = SaeKey(layer=cell.layer, width=cell.width, k=cell.k, unit=unit, seed=cell.seed, settings=cell.settings)
        return without_idle(key, self._decides_sae)

    def sae(self, key: SaeKey) -> SaeSettings:
        """Its settings."""
        return self.settings(key).sae

    def sae_settings(self, key: SaeKey) -> dict[str, Any]:
        """What decides it: the rows of all SAEs come in the order of the sweep's seed, so that they can learn from one read."""
        return plan.sae_settings(self.sae(key), self.config.run.seed, key.seed)

    def _decides_sae(self, key: SaeKey) -> dict[str, Any]:
        settings = {**self.sae_settings(key), "layer": key.layer, "unit": key.unit}
        read = contents_of(self.reading(key))
        return settings if read == contents_of(reading_of(self.config, key.unit)) else {**settings, "activations": read}

    def sae_folder(self, key: SaeKey) -> Path:
        name = f"layer{key.layer}-x{key.width}-k{key.k}{_suffix(key)}-s{key.seed}{'-token' * (key.unit == 'token')}"
        return self.config.run.out / "sae" / f"{name}-{digest(self._decides_sae(key))}"

    def reward(self, cell: Cell) -> RewardSettings:
        """How the cell's reward model is trained; of one that trains nothing, the settings that it does not read."""
        reward = self.settings(cell).reward
        if cell.component == "sarm" or cell.component == "sparse_rm":  # one by one, so that types follow
            return reward
        key = self.sae_key(cell)
        token_sae = self.sae_folder(key) if cell.component == "token_sae" and key is not None else None
        return replace(reward, baselines=(cell.component,), token_sae=token_sae)

    def name(self, cell: Cell) -> str:
        """What a reader calls the cell; unique within the sweep."""
        parts = [cell.component.replace("_", "-")]
        parts += [f"layer{cell.layer}"] * bool(cell.layer) + [f"x{cell.width}-k{cell.k}"] * bool(cell.width)
        return f"{'-'.join(parts)}{_suffix(cell)}-s{cell.seed}"

    def cell_folder(self, cell: Cell) -> Path:
        """Where the cell's reward model and figures are: found by everything that decides them."""
        return self.config.run.out / "cells" / f"{self.name(cell)}-{digest(self.decides(cell))}"

    def decides(self, cell: Cell) -> dict[str, Any]:
        """All that decides the cell's results: two cells with equal ones are one."""
        key, settings = self.sae_key(cell), self.settings(cell)
        # What a component's name means decides the folder too: a cell of an older meaning is not found.
        reward = replace(settings.reward, encoder=RANDOM_ENCODERS.get(cell.component, settings.reward.encoder))
        decides = {
            "cell": list(cell[:5]),
            "sae": None if key is None else self.sae_settings(key),
            "reward": None if cell.component in FROZEN else plan.reward_settings(settings.model, reward, cell.seed),
            "evaluation": plan.evaluation_settings(settings.evaluation, cell.seed),
        }
        # A sweep's own activations are in its sweep.json.
        read = self._read(cell)
        return decides if read == self._read(cell._replace(settings=())) else {**decides, "activations": read}

    def _read(self, cell: Cell) -> dict[str, Any]:
        """What decides the activations that the cell's SAE and head learn from and are measured on."""
        key = self.sae_key(cell)
        if key is not None:
            return contents_of(self.reading(key))
        settings = self.settings(cell)
        return {"chat": contents_of(self.reading(cell))["chat"]} if settings.reward.head_init == "probe" else {}

    def cell_at(self, point: tuple[Any, ...], component: Component, seed: int) -> Cell:
        """The cell nearest to a point of the axes."""
        return without_idle(cell_at(self.config, point, component, seed), self.decides)

    def run(self, cell: Cell) -> RunSettings:
        """The run settings of the cell's stages."""
        run = self.config.run
        return replace(run, out=self.cell_folder(cell), seed=cell.seed, mlflow_uri=self.mlflow_uri)

    def axes(self, cell: Cell) -> dict[str, Any]:
        """The cell's place on every axis, with the dictionary's size; None on an axis that makes no difference to it."""
        named = {name: value for name, value in cell._asdict().items() if name != "settings"}
        found = {**named, "d_sae": cell.width * self.d_in(cell)}
        for axis in self.config.sweep.settings_axes:
            own = dict(cell.settings).get(axis.name, axis.of(self.config))
            others = [cell._replace(settings=_with(cell, axis.name, value)) for value in axis.values]
            depends = (
                (own,) == axis.values
                or axis.name in dict(cell.settings)
                or any(self._differs(cell, other) for other in others)
            )
            found[axis.name] = axis.shown(own) if depends else None
        return found

    def _differs(self, cell: Cell, other: Cell) -> bool:
        try:
            return self.decides(cell) != self.decides(other)
        except UserError:
            return True


def _put_in(section: Section, changed: Mapping[str, Any]) -> Section:
    return _replaced(section, tuple(changed.items())) if changed else section


@functools.lru_cache(maxsize=1024)
def _replaced(section: Any, changed: Settings) -> Any:
    # Thousands of cells have few distinct settings, each checked once.
    return replace(section, **dict(changed))


def without_idle(point: Point, decides: Callable[[Point], Any]) -> Point:
    """The point without the settings that decide nothing of it, or are the sweep's own."""
    for name, _ in point.settings:
        other = point._replace(settings=tuple(setting for setting in point.settings if setting[0] != name))
        try:
            is_idle = decides(other) == decides(point)
        except UserError:
            # Without this setting the others would not go together.
            is_idle = False
        if is_idle:
            point = other
    return point


def _with(cell: Cell, name: str, value: Any) -> Settings:
    return tuple(sorted({**dict(cell.settings), name: value}.items()))


def _suffix(point: Cell | SaeKey) -> str:
    """Its settings as part of a folder's name, which no value makes too long or another path."""
    text = "".join(f"-{name}-{text_of(value)}" for name, value in point.settings)
    plain = re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII)[:_SUFFIX_LENGTH]
    return plain if plain == text else f"{plain}-{digest(text)}"

"""The one place that names every SAE architecture. Each is a file of its own: its rule, its options, what training needs, how it is exported."""

from typing import Any

from .abs_topk import AbsTopKSae
from .batch_topk import BatchTopKSae, MatryoshkaSae
from .dense import DenseSae
from .jumprelu import JumpReluSae
from .matching_pursuit import MatchingPursuitSae
from .sae import Sae
from .topk import TopKSae

ARCHITECTURES: dict[str, type[Sae]] = {
    c.architecture: c for c in (TopKSae, BatchTopKSae, MatryoshkaSae, JumpReluSae, AbsTopKSae, MatchingPursuitSae)
}
"""Those that are trained as dictionaries, by their names in settings and in `cfg.json`."""
OPTIONS = tuple(dict.fromkeys(name for c in ARCHITECTURES.values() for name in c.options))
"""Hyperparameters of one architecture or another, beside d_sae and k: fields of `sarm.settings.sae.SaeSettings`."""
_ALL: dict[str, type[Sae]] = {**ARCHITECTURES, DenseSae.architecture: DenseSae}
ARCHITECTURE_FILES = tuple(
    dict.fromkeys(
        f"{c.__module__.rpartition('.')[2]}.py" for kind in _ALL.values() for c in kind.__mro__ if issubclass(c, Sae)
    )
)
"""Files that the architectures are made of, beside those that all of them share; an exported model carries them."""


def build_sae(architecture: str, d_in: int, d_sae: int, k: int, **options: Any) -> Sae:
    """An SAE of the named architecture; options that it does not have are ignored.

    Raises ValueError for an architecture that is not known, and for sizes or options that cannot be.
    """
    if architecture not in _ALL:
        raise ValueError(f"there is no SAE architecture {architecture!r}, known are {', '.join(_ALL)}.")
    kind = _ALL[architecture]
    return kind(d_in, d_sae, k, **{name: value for name, value in options.items() if name in kind.options})

"""Names of latents for explanations and the drift page: of the explanations, else the terms of the contexts.

Terms of a large dictionary take a minute, so they are made in a thread of their own; until it is done, latents have no names.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Bool
from numpy.typing import NDArray

from sarm.data.sources.shown_text import clean_text
from sarm.interpret.context_store import ContextStore, load_contexts
from sarm.interpret.feature_data import feature_names
from sarm.passes.name_folders import name_folders

_CONTEXT_CHARACTERS = 200


class Names:
    """What is known of a model's latents beside their weights; without folders, nothing."""

    def __init__(self, store: ContextStore | None = None, explanations: Path | None = None):
        self._store, self._explanations = store, explanations
        self._names: dict[int, str] = {}
        self._thread = threading.Thread(target=self._read, name="names", daemon=True)
        self._thread.start()

    def of(self, latent: int) -> str | None:
        """The name of a latent, None for one that has none."""
        return self._names.get(latent)

    def wait(self) -> None:
        """Until all names are there."""
        self._thread.join()

    def contexts(self, latent: int, num: int) -> list[str]:
        """The ends of the texts at which it is strongest, where the reward is read."""
        if self._store is None:
            return []
        rows = self._store.of(latent, "rewarded").to_pylist() or self._store.of(latent, "sentence").to_pylist()
        return [clean_text(row["text"], _CONTEXT_CHARACTERS) for row in rows if row["kind"] == "top"][:num]

    def silent(self, num_latents: int) -> Bool[NDArray[np.bool_], " d_sae"] | None:
        """Which latents never fired where training read a reward; None where that is not known."""
        if self._store is None:
            return None
        table = self._store.latents
        rewarded = table.filter(pc.equal(table["place"], "rewarded"))
        if not rewarded.num_rows:
            return None
        silent_S = np.ones(num_latents, bool)
        silent_S[rewarded.filter(pc.greater(rewarded["count"], 0))["latent"].to_numpy()] = False
        return silent_S

    def _read(self) -> None:
        latents: Sequence[int] = self._store.latents["latent"].unique().to_pylist() if self._store is not None else []
        if self._explanations is not None and self._store is None:
            latents = range(1 << 24)
        self._names = feature_names(self._store, latents, self._explanations)


def load_names(model: Path, contexts: Path | None, explanations: Path | None) -> Names:
    """The names that two folders hold, those that are given or those beside the model, of which either may be missing.

    Raises UserError for a folder that is torn, and as `name_folders`.
    """
    found = name_folders(model, contexts, explanations)
    store = load_contexts(found.contexts) if found.contexts is not None else None
    if found.explanations is not None:
        # Read once here, so that what is wrong with it is said before anything is served.
        feature_names(None, [], found.explanations)
    return Names(store, found.explanations)


def named(features: Sequence[dict[str, Any]], names: Names) -> list[dict[str, Any]]:
    """The features of an explanation with their names."""
    return [{"id": one["id"], "name": names.of(one["id"]), **one} for one in features]

"""The heads of one reward model: its own, `base`, and edited ones, its variants. S d_sae, A active latents.

A reward under any of them, and its explanation, is a sum over the latents that one forward pass has found.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from sarm.audit.steering import Edit
from sarm.contracts.untrusted import read_json
from sarm.passes.reader import Reading
from sarm.settings.checks import UserError
from sarm.settings.started import called

BASE = "base"
VARIANT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Heads:
    """The head of a model and its variants, which are edits of it."""

    def __init__(self, weight_S: Float32[NDArray[np.float32], " d_sae"]):
        self._weights: dict[str, Float32[NDArray[np.float32], " d_sae"]] = {BASE: weight_S}

    @property
    def names(self) -> list[str]:
        """`base` first."""
        return list(self._weights)

    def add(self, name: str, edit: Edit) -> None:
        """Add a variant. Raises UserError for a name that is taken or none, and for an edit of another head."""
        if not re.fullmatch(VARIANT_NAME, name) or name in self._weights:
            raise UserError(f"{name[:64]!r} cannot name a variant: it is taken, or no letters, digits, dots and dashes. Pass another NAME=FILE.")  # fmt: skip
        if len(edit.latent) and not 0 <= edit.latent.min() <= edit.latent.max() < self.num_latents:
            raise UserError(f"the edit {name} is of latents that this model with {self.num_latents} does not have. Pass the SARM that it names.")  # fmt: skip
        with np.errstate(over="ignore"):
            weight_S = edit.applied(self._weights[BASE]).astype(np.float32)
        if not np.isfinite(weight_S).all():
            raise UserError(f"the edit {name} has weights that float32 cannot hold. Pass smaller ones.")
        self._weights[name] = weight_S

    def remove(self, name: str) -> None:
        """Forget a variant."""
        del self._weights[name]

    def num_edited(self, name: str) -> int:
        """How many latents have another weight than in the model's own head."""
        return int(np.count_nonzero(self._weights[name] != self._weights[BASE]))

    def reward(self, name: str, reading: Reading) -> float:
        """The raw reward of a reading under a head."""
        if name == BASE:
            return reading.reward
        return float(self.terms(name, reading).sum(dtype=np.float32))

    def explanation(self, name: str, reading: Reading, top: int, features: Sequence[int]) -> dict[str, Any]:
        """The `top` latents by the size of their contribution, and those asked for, in raw reward; what others add is `rest`."""
        terms_A = self.terms(name, reading)
        order = np.argsort(-np.abs(terms_A), kind="stable")[:top].tolist()
        place_of = {int(latent): place for place, latent in enumerate(reading.latents)}
        asked = [latent for latent in dict.fromkeys(features) if latent not in {int(reading.latents[n]) for n in order}]
        weight_S = self._weights[name]
        shown = [(int(reading.latents[n]), n) for n in order] + [(latent, place_of.get(latent)) for latent in asked]
        records = [
            {
                "id": latent,
                "weight": float(weight_S[latent]),
                "activation": 0.0 if place is None else float(reading.values[place]),
                "contribution": 0.0 if place is None else float(terms_A[place]),
            }
            for latent, place in shown
        ]
        total = float(terms_A.sum(dtype=np.float64))
        return {"features": records, "rest": total - sum(one["contribution"] for one in records), "sum": total}

    @property
    def num_latents(self) -> int:
        """d_sae."""
        return len(self._weights[BASE])

    def weights(self, name: str) -> Float32[NDArray[np.float32], " d_sae"]:
        """A head's weights, which are not to be changed."""
        return self._weights[name]

    def terms(self, name: str, reading: Reading) -> Float32[NDArray[np.float32], " active"]:
        """What each of a reading's latents adds to the raw reward under a head."""
        return self._weights[name][reading.latents] * reading.values


def read_edit(path: Path) -> Edit:
    """The edit of a file: the `edit.json` that `jobs/steer.py` writes beside an edited model, or a list of latents with their weights.

    Raises UserError if it is none.
    """
    try:
        found = read_json(path)
        records: Sequence[Mapping[str, Any]] = found["weights"] if isinstance(found, dict) else found
        return Edit.from_json(records)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no edit of a head ({type(error).__name__}: {error}). Pass --variants NAME=FILE with one of {called('steer')}.") from error  # fmt: skip

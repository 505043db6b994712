"""The sentence that every page of a reward model has where its dictionary has seen labels."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sarm.report.numbers import share


def dictionary_note(provenance: Mapping[str, Any]) -> list[str]:
    """What a reader of features must know of how their dictionary was trained, and of what its weights are; nothing of a SARM whose dictionary saw activations alone."""
    if about := provenance.get("attached"):
        return [
            f"The model is a classifier with a dictionary at layer {about['layer']}: its reward is no sum over latents. A latent's weight w is the mean gradient of the reward by it at the rewarded token, over {about['responses']:,} training responses, so w z is what the latent adds to first order. What it does in the model is measured by patching, in the audit."
        ]
    dictionary = provenance.get("dictionary") or {}
    if not dictionary.get("reward_share"):
        return []
    part = share(dictionary["reward_share"])
    if dictionary.get("reward_direction") == "random":
        return [
            f"Control: the dictionary learnt with a random direction stretched to {part} of all variance, as others with the reward's."
        ]
    return [
        f"The dictionary learnt with the direction of the reward stretched to {part} of all variance, by a probe of the training pairs: it is no unsupervised one. It saw no held-out label."
    ]


def dictionary_note_of(sarm: Path) -> list[str]:
    """The same for an exported model's folder."""
    return dictionary_note(json.loads((sarm / "config.json").read_text()).get("provenance") or {})

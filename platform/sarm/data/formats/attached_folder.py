"""A reward model that others trained with a dictionary attached at one of its layers, as a folder that the jobs read where they read a SARM.

S d_sae, D d_in. `config.json` says which model, which layer, and which bytes the model had; `model.safetensors` has the SAE under `sae.` and a
linear head `score.weight` [1, S]. The reward of such a model is no sum over the dictionary's latents. `score.weight` is its linear
approximation at the rewarded token, the mean gradient of the reward by each latent (`sarm.passes.reward_gradients`); the tokenizer lies beside it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from sarm.contracts.manifest import write_atomically
from sarm.contracts.untrusted import read_json
from sarm.data.formats.reward_classes import ATTACHED
from sarm.data.formats.tensor_files import tensors_in
from sarm.data.store.finite import not_finite
from sarm.nn.architectures import build_sae
from sarm.nn.sae import Sae
from sarm.settings.checks import UserError


@dataclass(frozen=True)
class Attached:
    """A dictionary, and the layer of a classifier that it reads: `hidden_states[layer]`."""

    classifier: Path
    identity: str
    """Hash of the classifier's files."""
    head: str
    """Where the reward is, as `jobs/evaluate.py --head` takes it."""
    layer: int
    sae: Sae
    weight: Float[Tensor, " d_sae"]
    """The linear head."""
    provenance: dict[str, Any]


def save_attached(attached: Attached, architectures: list[str], folder: Path) -> None:
    """Write `config.json` and `model.safetensors`; `architectures` are those of the classifier's config."""
    sae = attached.sae
    content = {
        "model_type": ATTACHED,
        "classifier": str(attached.classifier),
        "classifier_hash": attached.identity,
        "classifier_head": attached.head,
        "architectures": architectures,
        "layer": attached.layer,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "sae": sae.describe(),
        "standardise": sae.standardises,
        "provenance": attached.provenance,
    }
    tensors = {f"sae.{name}": tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    save_file(tensors | {"score.weight": attached.weight[None].contiguous()}, folder / "model.safetensors")
    write_atomically(folder / "config.json", json.dumps(content, indent=2))


@torch.no_grad()
def load_attached(folder: Path) -> Attached:
    """The dictionary of a folder, and what it is attached to.

    Raises UserError if the folder holds none, is torn, or its weights are of other shapes than it says, or no numbers.
    """
    try:
        content = dict(read_json(folder / "config.json"))
        if content.get("model_type") != ATTACHED:
            raise ValueError(f"its model type is {content.get('model_type')}")
        sae = build_sae(d_in=content["d_in"], d_sae=content["d_sae"], k=content["k"], **content["sae"])
        tensors = dict(tensors_in(folder))
        expected = {f"sae.{name}": tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
        expected |= {"score.weight": (1, sae.d_sae)}
        if wrong := sorted(name for name in expected.keys() | tensors.keys() if name not in tensors or tuple(tensors[name].shape) != expected.get(name)):  # fmt: skip
            raise ValueError(f"{wrong[0]} is not of the shape that config.json says")
        if broken := not_finite(tensors.items()):
            raise ValueError(f"it holds NaN or infinite values in {broken}")
        attached = Attached(
            classifier=Path(content["classifier"]),
            identity=str(content["classifier_hash"]),
            head=str(content["classifier_head"]),
            layer=int(content["layer"]),
            sae=sae,
            weight=tensors["score.weight"][0].float(),
            provenance=dict(content["provenance"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{folder} is no readable model with a dictionary: {error}. Attach it again.") from error
    for name, tensor in sae.state_dict().items():
        tensor.copy_(tensors[f"sae.{name}"])
    sae.standardises = bool(content["standardise"])
    return attached

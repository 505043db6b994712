"""Edit folders: which features of which SAEs are edited inside a model's forward pass, and the rows of the SAEs that this needs.

`edit.json` says the model, the positions, and for each layer its latents; `rows.safetensors` has for each layer the encoder (of an SAE with
thresholds the edited columns alone), and the decoder rows of the edited latents. Nothing else of the SAE is needed to apply the edit.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sarm.contracts.folders import FEATURE_EDIT_FOLDER
from sarm.contracts.manifest import sha256_of, write_atomically
from sarm.contracts.untrusted import read_json
from sarm.data.formats.sae_lens_layout import WEIGHTS
from sarm.data.store.finite import not_finite
from sarm.nn.architectures import build_sae
from sarm.nn.sae import Sae
from sarm.nn.splice import POSITIONS, LatentEdit, Positions, Splice
from sarm.settings.checks import UserError
from sarm.settings.started import called

EDIT, ROWS = "edit.json", "rows.safetensors"


@dataclass(frozen=True)
class FeatureEdit:
    """What is edited: the splices, the tokens that they are applied to, and the hash of the model that they are of."""

    splices: tuple[Splice, ...]
    positions: Positions
    model: str
    origins: tuple[str, ...] = ()
    """Hash of the SAE's weights, for each splice."""


def sae_identity(folder: Path) -> str:
    """A hash of an SAE folder's weights."""
    return sha256_of(folder / WEIGHTS)[:32]


def save_edit(edit: FeatureEdit, folder: Path) -> None:
    """Write `edit.json` and `rows.safetensors` into an existing folder."""
    layers, tensors = [], {}
    for splice, origin in zip(edit.splices, edit.origins, strict=True):
        rows = splice.own_latents
        layers.append(
            {
                "layer": splice.layer,
                "sae": {"weights": origin, "standardises": splice.sae.standardises, "d_in": splice.sae.d_in, "d_sae": splice.sae.d_sae, "k": splice.sae.k, **splice.sae.describe()},
                "edits": [one._asdict() for one in splice.edits],
            }
        )  # fmt: skip
        for name, tensor in splice.sae.state_dict().items():
            needed = tensor[rows] if name == "W_dec" and not splice.sae.is_tied else tensor
            tensors[f"{splice.layer}.{name}"] = needed.detach().cpu().contiguous().clone()
    save_file(tensors, folder / ROWS)
    content = {"schema": FEATURE_EDIT_FOLDER, "model": edit.model, "positions": edit.positions, "layers": layers}
    write_atomically(folder / EDIT, json.dumps(content, indent=2))


def load_edit(folder: Path) -> FeatureEdit:
    """The edit of a folder.

    Raises UserError for a folder that holds none, is torn, or whose rows are of other shapes than `edit.json` says, or no numbers.
    """
    try:
        content = read_json(folder / EDIT)
        if content["schema"] != FEATURE_EDIT_FOLDER:
            raise ValueError(f"its schema is {content['schema']}, expected {FEATURE_EDIT_FOLDER}")
        if content["positions"] not in POSITIONS:
            raise ValueError(f"its positions are {content['positions']!r}, expected one of {', '.join(POSITIONS)}")
        tensors = load_file(folder / ROWS)
        if broken := not_finite(tensors.items()):
            raise ValueError(f"{ROWS} holds NaN or infinite values in {broken}")
        splices = tuple(_splice(layer, tensors) for layer in content["layers"])
        origins = tuple(str(layer["sae"]["weights"]) for layer in content["layers"])
        return FeatureEdit(splices, content["positions"], str(content["model"]), origins)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{folder} is no feature edit: {reason}. Pass a folder that {called('debias')} wrote."
        ) from error


def digest_of(folder: Path) -> str:
    """A hash of what an edit folder does to a model: two folders of equal digests give equal rewards."""
    return hashlib.sha256(f"{sha256_of(folder / EDIT)}{sha256_of(folder / ROWS)}".encode()).hexdigest()[:32]


@torch.no_grad()
def _splice(layer: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Splice:
    said = dict(layer["sae"])
    said.pop("weights")
    standardises = said.pop("standardises")
    if not isinstance(standardises, bool):
        raise ValueError(f"standardises is {standardises!r}, expected true or false")
    edits = [LatentEdit(int(one["latent"]), one["kind"], float(one["value"])) for one in layer["edits"]]
    number = int(layer["layer"])
    sae = build_sae(**said)
    sae.standardises = standardises
    own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{number}.")}
    splice = Splice.of_rows(sae, number, edits)
    _fill(sae, own, splice.own_latents)
    return splice


def _fill(sae: Sae, tensors: Mapping[str, Tensor], rows: Sequence[int]) -> None:
    for name, tensor in sae.state_dict().items():
        is_cut = name == "W_dec" and not sae.is_tied
        shape = (len(rows), *tensor.shape[1:]) if is_cut else tuple(tensor.shape)
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ValueError(f"{ROWS} holds {found} for {name}, expected {shape}")
        if is_cut:
            tensor.zero_()
            tensor[list(rows)] = tensors[name].to(tensor.dtype)
        else:
            tensor.copy_(tensors[name])

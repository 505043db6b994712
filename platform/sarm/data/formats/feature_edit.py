"""Edit folders: which features of which SAEs are edited inside a model's forward pass, and the rows of the SAEs that this needs.

`edit.json` says the model, the positions, and for each layer its latents; `rows.safetensors` has for each layer the encoder (of an SAE with
thresholds the edited columns alone), and the decoder rows of the edited latents. Nothing else of the SAE is needed to apply the edit.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sarm.contracts.folders import FEATURE_EDIT_FOLDER
from sarm.contracts.manifest import sha256_of, write_atomically
from sarm.contracts.untrusted import read_json
from sarm.data.formats.sae_lens_layout import WEIGHTS
from sarm.data.store.finite import not_finite
from sarm.nn.carried_edits import Record, needed_of, record_of, splice_of
from sarm.nn.splice import POSITIONS, Positions, Splice
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
    layers = [record_of(splice, origin) for splice, origin in zip(edit.splices, edit.origins, strict=True)]
    tensors = {f"{one.layer}.{name}": tensor for one in edit.splices for name, tensor in needed_of(one).items()}
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


def _splice(record: Record, tensors: Mapping[str, Tensor]) -> Splice:
    own = {
        name.partition(".")[2]: tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{int(record['layer'])}.")
    }
    return splice_of(record, own)

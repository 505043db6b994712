"""SAE folders: SAELens' layout (`cfg.json`, `sae_weights.safetensors`), with everything needed to use the SAE again."""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sarm.contracts.untrusted import read_json
from sarm.data.formats.sae_lens_layout import CONFIG, WEIGHTS, write_sae_lens
from sarm.data.formats.sae_weights import RESIDUAL, STANDARDISED, weights_of
from sarm.data.store.finite import not_finite, not_floats
from sarm.nn.architectures import ARCHITECTURES, build_sae
from sarm.nn.sae import Sae
from sarm.settings.checks import UserError


def save_sae(sae: Sae, folder: Path, metadata: dict[str, Any]) -> None:
    """Write the SAE; `metadata` (model, layer, ...) goes into `cfg.json`, and which rows the SAE takes.

    `architecture` in it is the rule out of training (`Sae.exported_as`), by SAELens' name where SAELens has it; `metadata.sae` says how the
    SAE was trained.
    """
    write_sae_lens(weights_of(sae, metadata), folder)


def load_sae(folder: Path) -> tuple[Sae, dict[str, Any]]:
    """The SAE of a folder and its metadata.

    Raises UserError if files are missing or torn, or the weights are of another shape than `cfg.json` says. Warns where it does not say
    which rows the SAE takes.
    """
    try:
        config = read_json(folder / CONFIG)
        weights = load_file(folder / WEIGHTS)
        kind = dict(config.get("metadata", {}).get("sae", {"architecture": config["architecture"]}))
        known = kind["architecture"] in ARCHITECTURES
        # A jumprelu SAE from elsewhere has no k, and none is needed unless it is trained on.
        if known and "k" not in kind:
            kind["k"] = 1 if kind["architecture"] == "jumprelu" else config["k"]
        sae = build_sae(d_in=config["d_in"], d_sae=config["d_sae"], **kind) if known else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder} is not a readable SAE: {error}. Train it again, or pass another --out.") from error
    if sae is None:
        raise UserError(f"{folder} holds a {kind['architecture']} SAE, expected one of {', '.join(ARCHITECTURES)}.")
    expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        raise UserError(f"{folder / WEIGHTS} holds shapes {found}, cfg.json says {expected}.")
    if whole := not_floats(weights.items()):
        raise UserError(
            f"{folder / WEIGHTS} holds whole numbers in {whole}: it was quantised. Pass the SAE as it was trained."
        )
    if broken := not_finite(weights.items()):
        raise UserError(
            f"{folder / WEIGHTS} holds NaN or infinite values in {broken}. The SAE is broken; train it again."
        )
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            tensor.copy_(weights[name])
    metadata = config.get("metadata", {})
    sae.standardises = _standardises(metadata, folder)
    return sae, metadata


def _standardises(metadata: dict[str, Any], folder: Path) -> bool:
    if "input" not in metadata:
        warnings.warn(f"{folder / CONFIG} does not say which rows its SAE takes (metadata.input), as the first folders did not. It gets standardised ones, as theirs do.", stacklevel=3)  # fmt: skip
    said = metadata.get("input", STANDARDISED)
    if said not in (STANDARDISED, RESIDUAL):
        raise UserError(f"{folder / CONFIG} says that its SAE takes {said!r}, expected {STANDARDISED!r} or {RESIDUAL!r}. Convert it again.")  # fmt: skip
    return bool(said == STANDARDISED)

"""SAELens' `cfg.json` of every version, as its version 6 has it.

The rules for files from before version 6 are the library's own (`handle_pre_6_0_config` and `read_sae_components_from_disk` in release 6.54):
names that changed, what a field means that is missing, TopK as an activation function of the `standard` architecture, and scaling factors.
Where the library goes on with a warning, or ignores a field of an old file that its version 5 applied, the file is refused here.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sarm.settings.checks import UserError

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
OF_THE_MODEL = ("model_name", "hook_name", "hook_head_index", "hook_name_out")
"""Fields that say where the SAE reads; version 6 has them under `metadata`."""
_FACTORS = ("scaling_factor", "finetuning_scaling_factor")


def present_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of `cfg.json` by the names and with the meanings of version 6; those of the language model are under `metadata`.

    Raises UserError for an activation function without an equal, and for fields that contradict each other.
    """
    if not isinstance(config.get("metadata") or {}, dict):
        raise UserError(f"cfg.json in {folder} has metadata that are no object. Get another copy.")
    if not _is_before_6(config):
        if config.get("activation_fn", "relu") != "relu" or config.get("activation_fn_str", "relu") != "relu":
            raise UserError(f"cfg.json in {folder} says version 6, whose files have no activation function of their own. Get another copy.")  # fmt: skip
        return config
    new = _renamed(config, folder)
    kind = new.get("architecture") or "standard"
    function, options = new.get("activation_fn") or "relu", new.get("activation_fn_kwargs") or {}
    if function == "topk" and kind in ("standard", "topk"):
        kind = "topk"
        if options.keys() - {"k"}:
            raise UserError(f"{folder} holds a TopK SAE with {options}. Supported is its k alone.")
    elif function != "relu" or (kind == "topk" and new.get("activation_fn")):
        raise UserError(f"{folder} holds a {kind} SAE with the activation function {function}. Supported are relu, and topk for standard ones.")  # fmt: skip
    hook = new.get("hook_name") or ""
    norm = new.get("normalize_activations")
    new |= {
        "architecture": kind,
        "normalize_activations": {None: "none", False: "none", True: "expected_average_only_in"}.get(norm, norm),
        "reshape_activations": new.get("reshape_activations") or ("hook_z" if "hook_z" in hook else "none"),
        "apply_b_dec_to_input": new.get("apply_b_dec_to_input", True),
        "metadata": {name: new[name] for name in OF_THE_MODEL if new.get(name) is not None}
        | (new.get("metadata") or {}),
    }
    if kind == "topk":
        new["k"] = options.get("k", new.get("k"))
    return new


def _renamed(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for name, value in config.items():
        own = _RENAMED.get(name, name)
        if None not in (value, new.get(own)) and new[own] != value:
            raise UserError(f"cfg.json in {folder} says both {new[own]!r} and {value!r} for {own}. Get another copy.")
        new[own] = new.get(own) if value is None else value
    return new


def _is_before_6(config: dict[str, Any]) -> bool:
    said = config.get("sae_lens_version") or (config.get("metadata") or {}).get("sae_lens_version")
    # This platform's own folders name the version, and those of old releases of it have metadata of their own.
    return not (said and str(said).partition(".")[0].isdigit() and int(str(said).partition(".")[0]) >= 6)


def without_factor(tensors: dict[str, Tensor], config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The tensors with a finetuning's factor folded into the decoder, whose rows it scales; one of ones is dropped.

    Raises UserError where the config does not speak of a factor that is there and not 1.
    """
    kept = {name: tensor for name, tensor in tensors.items() if name not in _FACTORS}
    factors = [tensors[name] for name in _FACTORS if name in tensors]
    if not factors or all(bool(torch.allclose(one, torch.ones_like(one))) for one in factors):
        return kept
    if len(factors) > 1 or not config.get("finetuning_scaling_factor"):
        raise UserError(f"{folder} has a scaling factor that is not 1, and cfg.json does not say what it is for. Get another copy.")  # fmt: skip
    return kept | {"W_dec": (factors[0].double()[:, None] * kept["W_dec"].double()).float()}

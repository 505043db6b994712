"""SAELens' files: `cfg.json` and `sae_weights.safetensors`. The SAE folders of this platform are such files, as version 6 writes them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sarm.contracts.untrusted import read_json
from sarm.data.formats.sae_lens_config import OF_THE_MODEL, present_config, without_factor
from sarm.data.formats.sae_place import made_for
from sarm.data.formats.sae_weights import (
    RESIDUAL,
    STANDARDISED,
    SaeWeights,
    with_input_bias,
    with_unit_decoder,
    without_gate,
)
from sarm.nn.architectures import ARCHITECTURES
from sarm.settings.checks import UserError

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# SAELens drops the metadata of files that do not name a version of its layout from 6 on.
_LAYOUT = "6.0.0"
HELD = ("topk", "jumprelu", "matching_pursuit")
"""Rules that SAELens knows, by its names."""
_OF_KIND = {"jumprelu": ("threshold",), "gated": ("r_mag", "b_mag", "b_gate")}
# Matching pursuit ends after `max_iterations` steps, as ours does, unless something else ends it before.
_ENDS_BEFORE = {"residual_threshold": 0.0, "stop_on_duplicate_support": False}


def read_sae_lens(folder: Path, k: int | None) -> SaeWeights:
    """SAEs of the residual stream of every version of the library, by its rules or by one of this platform's own.

    Raises UserError for others, for normalisations without an equal, and for files that contradict themselves.
    """
    config = present_config(read_json(folder / CONFIG), folder)
    tensors = without_factor(load_file(folder / WEIGHTS), config, folder)
    kind, metadata = _rule_of(config, folder), config.get("metadata") or {}
    _refuse_surplus(tensors, kind, folder)
    metadata = {**_place(config, metadata, folder), **metadata}
    norm = config.get("normalize_activations", "none")
    trained, threshold, rule, k_said = metadata.get("sae") or {}, None, kind, None
    if kind == "matching_pursuit":
        tensors |= {"W_enc": tensors["W_dec"].T, "b_enc": torch.zeros(len(tensors["W_dec"]))}
        # Without a number of steps, as many as the rows are wide.
        k_said = config["max_iterations"] or len(tensors["b_dec"])
    elif kind in ("jumprelu", "standard", "gated"):
        tensors = without_gate(tensors) if kind == "gated" else tensors
        # ReLU is a threshold of 0 for every latent; and a ReLU stands before the threshold, so negative ones count as 0.
        threshold = (tensors["threshold"] if kind != "standard" else torch.zeros_like(tensors["b_enc"])).clamp_min(0.0)
        rule, k_said = "jumprelu", k or trained.get("k")
    else:
        rule, k_said = "signed_topk" if kind == "topk" and trained.get("signed") else kind, config["k"]
    b_enc = tensors["b_enc"]
    if not config.get("apply_b_dec_to_input", True):
        b_enc = with_input_bias(b_enc, tensors["b_dec"], tensors["W_enc"])
    weights = SaeWeights(
        W_enc=tensors["W_enc"].float(),
        b_enc=b_enc,
        W_dec=tensors["W_dec"].float(),
        b_dec=tensors["b_dec"],
        k=k_said,
        threshold=threshold,
        rule=rule,
        input=STANDARDISED if norm == "layer_norm" else metadata.get("input", RESIDUAL),
        metadata=metadata,
    )
    if said := {
        (name, config[name])
        for name in ("d_in", "d_sae")
        if config.get(name, getattr(weights, name)) != getattr(weights, name)
    }:
        raise UserError(f"cfg.json in {folder} says {dict(said)}, its weights are {weights.d_in} x {weights.d_sae}. Get another copy.")  # fmt: skip
    return with_unit_decoder(weights) if config.get("rescale_acts_by_decoder_norm") else weights


def _rule_of(config: dict[str, Any], folder: Path) -> str:
    """The name of the rule; raises UserError for what has no equal here, with what it is."""
    kind, norm = config["architecture"], config.get("normalize_activations", "none")
    if "transcoder" in kind or config.get("d_out", config.get("d_in")) != config.get("d_in"):
        raise UserError(f"{folder} holds a {kind}, which maps one place of a model to another. Only SAEs of one place have an equal here.")  # fmt: skip
    known = {"standard", "gated", "abstopk", *HELD, *(c.exported_as for c in ARCHITECTURES.values())}
    if kind not in known or norm not in ("none", "layer_norm"):
        scaled = ", by a factor that is not in the file" if norm == "expected_average_only_in" else ""
        raise UserError(
            f"{folder} holds a {kind} SAE with normalize_activations {norm}{scaled}. Supported are {', '.join(sorted(known))}, with none or layer_norm."
        )
    if config.get("reshape_activations", "none") != "none":
        raise UserError(f"{folder} holds an SAE of attention heads, expected one of the residual stream.")
    if config.get("rescale_acts_by_decoder_norm") and kind not in ("topk", "abstopk"):
        raise UserError(f"{folder} holds a {kind} SAE that rescales by the decoder's norms, which only topk and abstopk do. Get another copy.")  # fmt: skip
    if kind == "matching_pursuit" and any(config.get(name) != value for name, value in _ENDS_BEFORE.items()):
        raise UserError(
            f"{folder} holds a matching pursuit SAE that ends by another rule than its number of steps. Supported are {_ENDS_BEFORE}."
        )
    return "abs_topk" if kind == "abstopk" else str(kind)


def _refuse_surplus(tensors: Mapping[str, Tensor], kind: str, folder: Path) -> None:
    """Raises UserError for tensors that this rule does not compute with: the file is of another rule than its config says."""
    known = {"W_enc", "b_enc", "W_dec", "b_dec", *_OF_KIND.get(kind, ())}
    if surplus := sorted(tensors.keys() - known):
        raise UserError(f"{folder} holds {', '.join(surplus[:4])}, for which a {kind} SAE has no use. cfg.json may be of another file; get another copy.")  # fmt: skip


def _place(config: dict[str, Any], metadata: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Model and layer, as far as the file says them; what this platform has written says them itself."""
    if "activations" in metadata:
        return {}
    # Configs that the library has made of other files have these fields beside the others.
    said = {name: metadata[name] if metadata.get(name) is not None else config.get(name) for name in OF_THE_MODEL}
    if said["hook_head_index"] is not None:
        raise UserError(f"{folder} holds an SAE of attention head {said['hook_head_index']}, expected one of the residual stream.")  # fmt: skip
    if said["hook_name_out"] not in (None, said["hook_name"]):
        raise UserError(f"{folder} holds a transcoder from {said['hook_name']} to {said['hook_name_out']}. Only SAEs of one place have an equal here.")  # fmt: skip
    return {"imported_from": "saelens"} | made_for(str(folder), said["model_name"], said["hook_name"])


def write_sae_lens(weights: SaeWeights, folder: Path) -> None:
    """What `SAE.load_from_disk` takes, or refuses by the name of a rule that it does not know; `metadata.sae` says how the SAE was trained."""
    made_for = weights.metadata.get("activations", {})
    origin = {}
    if "layer" in made_for:
        origin = {
            "model_name": made_for.get("model"),
            "hook_name": f"blocks.{made_for['layer'] - 1}.hook_resid_post",
            "hf_hook_name": f"model.layers.{made_for['layer'] - 1}",
        }
    config = {
        **_rule(weights),
        "d_in": weights.d_in,
        "d_sae": weights.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        # Standardising per token is the reader's job (`sarm.nn.sae.standardise`), the same before training and scoring.
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**origin, **weights.metadata, "sae_lens_version": _LAYOUT, "input": weights.input},
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    tensors = weights.tensors()
    if weights.rule == "matching_pursuit":
        del tensors["W_enc"], tensors["b_enc"]
    save_file(tensors, folder / WEIGHTS)


def _rule(weights: SaeWeights) -> dict[str, Any]:
    if weights.rule == "jumprelu":
        return {"architecture": "jumprelu"}
    if weights.rule == "matching_pursuit":
        return {"architecture": "matching_pursuit", "max_iterations": weights.k, **_ENDS_BEFORE}
    kind = {"architecture": weights.rule.removeprefix("signed_"), "k": weights.k}
    return kind | {"rescale_acts_by_decoder_norm": False}


def write_sae_lens_on_residuals(weights: SaeWeights, folder: Path) -> None:
    """SAELens' files for raw residuals: its `layer_norm` standardises, with 1e-5 where `standardise` has 1e-6.

    Codes differ from ours by a factor within 1 +- 9e-6 / std(h).
    """
    if weights.input != STANDARDISED:
        raise UserError("the SAE takes raw residuals as it is. Pass --format saelens.")
    write_sae_lens(weights, folder)
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalize_activations": "layer_norm"}, indent=2))

"""SAELens' files, from its version 6 on: `cfg.json` and `sae_weights.safetensors`. The SAE folders of this platform are such files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sarm.data.formats.sae_weights import RESIDUAL, STANDARDISED, SaeWeights, with_input_bias, with_unit_decoder
from sarm.nn.architectures import ARCHITECTURES
from sarm.settings.checks import UserError

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# SAELens drops the metadata of files that do not name a version of its layout from 6 on.
_LAYOUT = "6.0.0"
HELD = ("topk", "jumprelu", "matching_pursuit")
"""Rules that SAELens knows, by its names."""
# Matching pursuit ends after `max_iterations` steps, as ours does, unless something else ends it before.
_ENDS_BEFORE = {"residual_threshold": 0.0, "stop_on_duplicate_support": False}


def read_sae_lens(folder: Path, k: int | None) -> SaeWeights:
    """SAEs of the residual stream, by SAELens' rules or by one of this platform's own.

    Raises UserError for others and for normalisations without an equal.
    """
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    kind, metadata = config["architecture"], config.get("metadata", {})
    known = {"standard", *HELD, *(c.exported_as for c in ARCHITECTURES.values())}
    norm = config.get("normalize_activations", "none")
    if kind not in known or norm in ("constant_norm_rescale", "covariance_whitening"):
        raise UserError(
            f"{folder} holds a {kind} SAE with normalize_activations {norm}. Supported are {', '.join(sorted(known))}, with none or layer_norm."
        )
    if config.get("reshape_activations", "none") != "none" or config.get("finetuning_scaling_factor"):
        raise UserError(
            f"{folder} holds an SAE of attention heads or with a finetuning scale, expected one of the residual stream."
        )
    if kind == "matching_pursuit":
        if any(config.get(name) != value for name, value in _ENDS_BEFORE.items()):
            raise UserError(
                f"{folder} holds a matching pursuit SAE that ends by another rule than its number of steps. Supported are {_ENDS_BEFORE}."
            )
        tensors |= {"W_enc": tensors["W_dec"].T, "b_enc": torch.zeros(len(tensors["W_dec"]))}
    b_enc = tensors["b_enc"]
    if not config.get("apply_b_dec_to_input", True):
        b_enc = with_input_bias(b_enc, tensors["b_dec"], tensors["W_enc"])
    trained, threshold, rule = metadata.get("sae") or {}, None, kind
    if kind in ("jumprelu", "standard"):
        # ReLU is a threshold of 0 for every latent; and a ReLU stands before the threshold, so negative ones count as 0.
        threshold = tensors.get("threshold", torch.zeros_like(b_enc)).clamp_min(0.0)
        rule, k_said = "jumprelu", k or trained.get("k")
    elif kind == "matching_pursuit":
        # Without a number of steps, as many as the rows are wide.
        k_said = config["max_iterations"] or len(tensors["b_dec"])
    else:
        rule, k_said = "signed_topk" if kind == "topk" and trained.get("signed") else kind, config["k"]
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
    return with_unit_decoder(weights) if config.get("rescale_acts_by_decoder_norm") else weights


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

"""Published suites with files of their own: Gemma Scope 1 and 2, and Llama Scope. All are read, and none is written.

Gemma Scope: z = pre H(pre - threshold) with pre = x W_enc + b_enc.
Llama Scope: rows are scaled by s = sqrt(d_in) / (their mean norm) first: z = pre H(pre - s jump_relu_threshold) with pre = s x W_enc + b_enc,
x_hat = (z W_dec + b_dec) / s (the rule of SAELens' loader, `llama_scope`).
"""

import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sarm.contracts.untrusted import read_json
from sarm.data.formats.sae_place import made_for
from sarm.data.formats.sae_weights import RESIDUAL, SaeWeights, with_input_bias
from sarm.settings.checks import UserError

GEMMA_1, GEMMA_2 = "params.npz", "params.safetensors"
LLAMA, LLAMA_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_GEMMA_1 = re.compile(r"gemma-scope-(\d+b)-(pt|it)-([a-z]+)")
_LAYER = re.compile(r"layer_(\d+)")
_KINDS_2 = re.compile(r"(resid_post|attn_out|mlp_out|transcoder|clt|crosscoder)(?:_all)?(?:/|$)")
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def read_gemma_scope(folder: Path, k: int | None) -> SaeWeights:
    """`params.npz`, whose path tells model, layer and place; or `params.safetensors`, whose `config.json` does.

    Raises UserError for SAEs of other places than the residual stream, transcoders and crosscoders.
    """
    first = (folder / GEMMA_1).is_file()
    place = _gemma_scope_1(folder) if first else _gemma_scope_2(folder)
    found = _npz(folder / GEMMA_1) if first else load_file(folder / GEMMA_2)
    tensors = {name: found[name if name in found else name.lower()].float() for name in _NAMES}
    if tensors["W_dec"].dim() != 2 or len(found) > len(_NAMES):
        raise UserError(f"{folder} holds {', '.join(sorted(found))}: a transcoder or crosscoder. Only SAEs of one place have an equal here.")  # fmt: skip
    return SaeWeights(
        W_enc=tensors["W_enc"],
        b_enc=with_input_bias(tensors["b_enc"], tensors["b_dec"], tensors["W_enc"]),
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        k=k,
        # A ReLU stands before the threshold, so negative ones count as 0.
        threshold=tensors["threshold"].clamp_min(0.0),
        rule="jumprelu",
        input=RESIDUAL,
        metadata={"imported_from": "gemma_scope", **place},
    )


def read_llama_scope(folder: Path, k: int | None) -> SaeWeights:
    """`hyperparams.json` and `checkpoints/final.safetensors`; raises UserError for transcoders and other activation functions than JumpReLU."""
    config, tensors = read_json(folder / LLAMA), load_file(folder / LLAMA_WEIGHTS)
    hook, out = config["hook_point_in"], config.get("hook_point_out", config["hook_point_in"])
    if hook != out:
        raise UserError(f"{folder} holds a transcoder from {hook} to {out}. Only SAEs of one place have an equal here.")
    other = {
        name: config[name]
        for name, wanted in (("act_fn", "jumprelu"), ("norm_activation", "dataset-wise"), ("use_glu_encoder", False), ("apply_decoder_bias_to_pre_encoder", False))
        if config.get(name, wanted) != wanted
    }  # fmt: skip
    if other:
        raise UserError(f"{folder} holds a Llama Scope SAE with {other}. Supported are jumprelu ones whose rows are scaled by one factor.")  # fmt: skip
    scale = math.sqrt(config["d_model"]) / config["dataset_average_activation_norm"]["in"]
    W_enc = (tensors["encoder.weight"].double() * scale).float().T
    b_dec = (tensors["decoder.bias"].double() / scale).float()
    return SaeWeights(
        W_enc=W_enc,
        b_enc=with_input_bias(tensors["encoder.bias"].float(), b_dec, W_enc),
        W_dec=(tensors["decoder.weight"].double() / scale).float().T,
        b_dec=b_dec,
        k=k,
        threshold=torch.full((W_enc.shape[1],), float(config["jump_relu_threshold"]) * scale).clamp_min(0.0),
        rule="jumprelu",
        input=RESIDUAL,
        metadata={"imported_from": "llama_scope", **made_for(str(folder), "meta-llama/Llama-3.1-8B", hook)},
    )


def _gemma_scope_1(folder: Path) -> dict[str, Any]:
    path = folder.absolute().as_posix()
    suite, layer = _GEMMA_1.search(path), _LAYER.search(path)
    if suite is None:
        raise UserError(f"{folder} does not say of which Gemma Scope it is: residual streams, attention, MLPs and transcoders have equal files. Keep the folder's published names, such as gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71.")  # fmt: skip
    size, tuning, place = suite.groups()
    hook = f"blocks.{layer[1]}.hook_resid_post" if place == "res" and layer else f"{place} of Gemma Scope"
    return made_for(str(folder), f"google/gemma-2-{size}{'-it' if tuning == 'it' else ''}", hook)


def _gemma_scope_2(folder: Path) -> dict[str, Any]:
    path = folder.absolute().as_posix()
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    kind, layer = _KINDS_2.search(path), _LAYER.search(folder.name)
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise UserError(f"{folder} holds a {config['architecture']} SAE, expected jump_relu.")
    hook, out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if hook is None:
        if kind is None or layer is None:
            raise UserError(f"{folder} has no config.json, and its name does not say what it is of. Keep the published names, such as resid_post/layer_12_width_16k_l0_medium.")  # fmt: skip
        hook = f"model.layers.{layer[1]}.output" if kind[1] == "resid_post" else f"{kind[1]} of Gemma Scope 2"
    if out not in (None, hook):
        raise UserError(f"{folder} holds a transcoder from {hook} to {out}. Only SAEs of one place have an equal here.")
    # The configs call the third generation of models v3, and the pretrained ones pt.
    model = str(config.get("model_name", "")).removeprefix("google/").replace("-v3", "-3")
    return made_for(str(folder), f"google/{model}" if model else None, hook)


def _npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.asarray(arrays[name], dtype=np.float32)) for name in arrays.files}
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from None

"""Files of sparsify and dictionary_learning: a reader and a writer each.

What these files have no field for stands beside them in `origin.json`. A reader's `k` is for files that do not say it.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sarm.contracts.untrusted import read_json
from sarm.data.formats.sae_origin import ORIGIN, read_origin, write_origin
from sarm.data.formats.sae_place import made_for
from sarm.data.formats.sae_pt import tensors_of_pt
from sarm.data.formats.sae_weights import RESIDUAL, SaeWeights, with_input_bias, with_unit_decoder, without_gate
from sarm.settings.checks import UserError


def read_sparsify(folder: Path, k: int | None) -> SaeWeights:
    """`cfg.json` and `sae.safetensors` in a folder named as its hook; raises UserError for transcoders, other activations than topk and other hooks."""
    config = read_json(folder / "cfg.json")
    tensors = load_file(folder / "sae.safetensors")
    if config.get("activation", "topk") != "topk" or config.get("transcode") or config.get("skip_connection") or "W_skip" in tensors:  # fmt: skip
        raise UserError(
            f"{folder} holds a transcoder, or another activation than topk: {config}. Only TopK SAEs of one layer have an equal here."
        )
    W_enc = tensors["encoder.weight"].float().T
    if config.get("d_in", W_enc.shape[0]) != W_enc.shape[0] or (config.get("num_latents") or W_enc.shape[1]) != W_enc.shape[1]:  # fmt: skip
        raise UserError(f"cfg.json in {folder} is of another SAE than the weights, {W_enc.shape[0]} x {W_enc.shape[1]}. Get another copy.")  # fmt: skip
    return SaeWeights(
        W_enc,
        tensors["encoder.bias"],
        tensors["W_dec"].float(),
        tensors["b_dec"],
        config["k"],
        # Of the library's first releases, which could leave out the ReLU.
        rule="signed_topk" if config.get("signed") else "topk",
        **read_origin(folder, RESIDUAL, {"imported_from": "sparsify", **_sparsify_place(folder)}),
    )


def _sparsify_place(folder: Path) -> dict[str, Any]:
    """The hook is the folder's name, and the run's config beside the folders names the model; another name says nothing."""
    name = folder.absolute().name
    if not re.match(r"(?:\w+\.)*(?:layers|h)\.\d+|embed_tokens", name) or (folder / ORIGIN).is_file():
        return {}
    run = folder.parent / "config.json"
    about = read_json(run) if run.is_file() else {}
    return made_for(str(folder), about.get("model") if isinstance(about, dict) else None, name)


def write_sparsify(weights: SaeWeights, folder: Path) -> None:
    """What `SparseCoder.load_from_disk` takes."""
    config = {
        "activation": "topk",
        "expansion_factor": max(1, weights.d_sae // weights.d_in),
        "normalize_decoder": True,
        "num_latents": weights.d_sae,
        "k": weights.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": weights.d_in,
    }
    tensors = weights.tensors()
    renamed = {"encoder.weight": tensors["W_enc"].T.contiguous(), "encoder.bias": tensors["b_enc"]}
    save_file(renamed | {name: tensors[name] for name in ("W_dec", "b_dec")}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config, indent=2))
    write_origin(weights, folder)


def read_dictionary_learning(folder: Path, k: int | None) -> SaeWeights:
    """`config.json` and `ae.pt` of any of the library's autoencoders; raises UserError for other classes, hooks and transcoders.

    A ReLU dictionary comes with unit decoder rows and codes scaled by their lengths, as the library's `load_dictionary` has it.
    """
    whole = read_json(folder / "config.json")
    config, buffer = whole["trainer"], whole.get("buffer") or {}
    tensors = tensors_of_pt(folder / "ae.pt")
    kind = config["dict_class"]
    if kind not in _READ:
        raise UserError(f"{folder} holds a {kind}. Supported are {', '.join(_READ)}.")
    named: dict[str, Any] = dict(_READ[kind](tensors))
    if "threshold" in named:
        # -1 stands for "not set yet", and then the ReLU before it decides.
        named["threshold"] = named["threshold"].float().expand(len(named["b_enc"])).clamp_min(0.0)
    known = tensors.get("k")
    said = int(known) if known is not None else config.get("k")
    if said is not None and config.get("k", said) != said:
        raise UserError(f"config.json in {folder} says k={config['k']}, ae.pt has {said}. Get another copy.")
    weights = SaeWeights(
        **named,
        k=said if said is not None else k,
        rule="jumprelu" if "threshold" in named else "topk",
        **read_origin(
            folder, RESIDUAL, {"imported_from": "dictionary_learning", **_dictionary_place(folder, config, buffer)}
        ),
    )
    return with_unit_decoder(weights) if kind == "AutoEncoder" else weights


def _dictionary_place(folder: Path, config: dict[str, Any], buffer: dict[str, Any]) -> dict[str, Any]:
    if (folder / ORIGIN).is_file():
        return {}
    hook, io = config.get("submodule_name"), buffer.get("io", "out")
    if io not in ("out", "in"):
        raise UserError(f"{folder} holds a dictionary from a module's input to its output. Only SAEs of one place have an equal here.")  # fmt: skip
    if io == "in" and hook:
        # A block's input is its predecessor's output.
        hook = re.sub(r"^resid_post_layer_(\d+)$", r"blocks.\1.hook_resid_pre", hook)
    return made_for(str(folder), config.get("lm_name"), hook)


def _linear(bias: str) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    """`encoder` and `decoder` as torch's linear maps; `bias` is what is taken off the rows and put back."""

    def read(tensors: dict[str, Any]) -> dict[str, Tensor]:
        return {
            "W_enc": tensors["encoder.weight"].T,
            "b_enc": tensors["encoder.bias"],
            "W_dec": tensors["decoder.weight"].T,
            "b_dec": tensors[bias],
        }

    return read


def _with_threshold(
    read: Callable[[dict[str, Any]], dict[str, Tensor]],
) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    return lambda tensors: {**read(tensors), "threshold": tensors["threshold"]}


def _matrices(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def _relu(bias: str) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    return lambda tensors: {**_linear(bias)(tensors), "threshold": torch.zeros(len(tensors["encoder.bias"]))}


def _rows_keep_bias(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a dictionary whose rows keep the decoder's bias."""
    return {**named, "b_enc": with_input_bias(named["b_enc"], named["b_dec"], named["W_enc"])}


def _gated(tensors: dict[str, Any]) -> dict[str, Tensor]:
    renamed = {
        "W_enc": tensors["encoder.weight"].T,
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["decoder_bias"],
    }
    return without_gate(
        renamed | {"r_mag": tensors["r_mag"], "b_mag": tensors["mag_bias"], "b_gate": tensors["gate_bias"]}
    )


# Classes by their names in `config.json`: the weights by SAELens' names, with thresholds where latents do not compete.
_READ: dict[str, Callable[[dict[str, Any]], dict[str, Tensor]]] = {
    "AutoEncoder": _relu("bias"),
    "AutoEncoderNew": lambda tensors: _rows_keep_bias(_relu("decoder.bias")(tensors)),
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _linear("b_dec"),
    "BatchTopKSAE": _with_threshold(_linear("b_dec")),
    "MatryoshkaBatchTopKSAE": _with_threshold(_matrices),
    "JumpReluAutoEncoder": lambda tensors: _rows_keep_bias(_with_threshold(_matrices)(tensors)),
}


def write_dictionary_learning(weights: SaeWeights, folder: Path) -> None:
    """What `load_dictionary` takes: TopK, BatchTopK where all thresholds are equal, else JumpReLU."""
    tensors, one = weights.tensors(), None
    if weights.threshold is not None:
        one = weights.threshold[0] if bool((weights.threshold == weights.threshold[0]).all()) else None
    kind = (
        "AutoEncoderTopK"
        if weights.threshold is None
        else "JumpReluAutoEncoder"
        if one is None or weights.k is None
        else "BatchTopKSAE"
    )
    if kind == "JumpReluAutoEncoder":
        named = {**tensors, "b_enc": weights.without_input_bias()}
    else:
        assert weights.k is not None
        named = {
            "encoder.weight": tensors["W_enc"].T.contiguous(),
            "encoder.bias": tensors["b_enc"],
            "decoder.weight": tensors["W_dec"].T.contiguous(),
            "b_dec": tensors["b_dec"],
            "k": torch.tensor(weights.k, dtype=torch.int32),
            "threshold": torch.tensor(-1.0) if one is None else one.clone(),
        }
    made_for = weights.metadata.get("activations", {})
    trainer = {
        "trainer_class": {"AutoEncoderTopK": "TopKTrainer", "BatchTopKSAE": "BatchTopKTrainer"}.get(
            kind, "JumpReluTrainer"
        ),
        "dict_class": kind,
        "activation_dim": weights.d_in,
        "dict_size": weights.d_sae,
        "k": weights.k,
        "layer": made_for.get("layer", 0) - 1,
        "lm_name": made_for.get("model", ""),
        "submodule_name": f"resid_post_layer_{made_for.get('layer', 0) - 1}",
    }
    torch.save(named, folder / "ae.pt")
    (folder / "config.json").write_text(
        json.dumps({"trainer": trainer, "buffer": {"d_submodule": weights.d_in, "io": "out"}}, indent=2)
    )
    write_origin(weights, folder)

"""Files of sparsify, dictionary_learning and the papers (`.pt`): a reader and a writer each.

What these files have no field for stands beside them in `origin.json`. A reader's `k` is for files that do not say it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sarm.data.formats.sae_weights import RESIDUAL, STANDARDISED, SaeWeights, with_input_bias
from sarm.settings.checks import UserError

_ORIGIN = "origin.json"


def read_sparsify(folder: Path, k: int | None) -> SaeWeights:
    """`cfg.json` and `sae.safetensors`; raises UserError for transcoders and other activations than TopK."""
    config = json.loads((folder / "cfg.json").read_text())
    tensors = load_file(folder / "sae.safetensors")
    if config.get("activation", "topk") != "topk" or config.get("transcode") or config.get("skip_connection"):
        raise UserError(
            f"{folder} holds a transcoder, or another activation than topk: {config}. Only TopK SAEs of one layer have an equal here."
        )
    return SaeWeights(
        tensors["encoder.weight"].float().T,
        tensors["encoder.bias"],
        tensors["W_dec"].float(),
        tensors["b_dec"],
        config["k"],
        **_read_origin(folder, RESIDUAL, {"imported_from": "sparsify"}),
    )


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
    _write_origin(weights, folder)


def read_dictionary_learning(folder: Path, k: int | None) -> SaeWeights:
    """`config.json` and `ae.pt` of a TopK, BatchTopK, Matryoshka or JumpReLU dictionary; raises UserError for others."""
    config = json.loads((folder / "config.json").read_text())["trainer"]
    tensors = _tensors_of_pt(folder / "ae.pt")
    kind = config["dict_class"]
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        W_enc, b_enc, W_dec = (
            tensors["encoder.weight"].float().T,
            tensors["encoder.bias"],
            tensors["decoder.weight"].float().T,
        )
    elif kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        W_enc, b_enc, W_dec = tensors["W_enc"].float(), tensors["b_enc"], tensors["W_dec"].float()
    else:
        raise UserError(
            f"{folder} holds a {kind}. Supported are AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE and JumpReluAutoEncoder."
        )
    if kind == "JumpReluAutoEncoder":
        b_enc = with_input_bias(b_enc, tensors["b_dec"], W_enc)
    threshold = None
    if kind != "AutoEncoderTopK":
        # -1 stands for "not set yet", and then the ReLU before it decides.
        threshold = tensors["threshold"].float().expand(W_enc.shape[1]).clamp_min(0.0)
    known = tensors.get("k")
    return SaeWeights(
        W_enc,
        b_enc,
        W_dec,
        tensors["b_dec"],
        int(known) if known is not None else config.get("k", k),
        threshold,
        rule="topk" if threshold is None else "jumprelu",
        **_read_origin(folder, RESIDUAL, {"imported_from": "dictionary_learning", "model_name": config.get("lm_name")}),
    )


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
    _write_origin(weights, folder)


def read_pt(path: Path, k: int | None) -> SaeWeights:
    """The papers' or OpenAI's state dict, a file or the `sae.pt` of a folder; raises UserError if nothing says k."""
    path = path if path.is_file() else path / "sae.pt"
    tensors = _tensors_of_pt(path)
    W_enc = tensors["encoder.weight"].float().T
    # OpenAI's files name their activation; the papers' have no ReLU and say nothing, not even k.
    if (kind := tensors.get("activation", "TopK")) != "TopK":
        raise UserError(f"{path} holds an SAE with {kind}, expected TopK.")
    state = tensors.get("activation_state_dict") or {}
    said = json.loads((path.parent / _ORIGIN).read_text()) if (path.parent / _ORIGIN).is_file() else {}
    k = state.get("k") or said.get("k") or k
    if k is None:
        raise UserError(f"{path} does not say how many latents are active. Pass --k.")
    return SaeWeights(
        W_enc,
        tensors.get("latent_bias", torch.zeros(W_enc.shape[1])),
        tensors["decoder.weight"].float().T,
        tensors["pre_bias"],
        int(k),
        rule="signed_topk" if said.get("signed", state.get("postact_fn") != "ReLU") else "topk",
        **_read_origin(path.parent, STANDARDISED, {"imported_from": "pt"}),
    )


def write_pt(weights: SaeWeights, folder: Path) -> None:
    """The papers' `torch.save(state_dict)`. Their code has no ReLU: equal where k pre-activations of a row are positive."""
    tensors = weights.tensors()
    named = {
        "pre_bias": tensors["b_dec"],
        "latent_bias": tensors["b_enc"],
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "decoder.weight": tensors["W_dec"].T.contiguous(),
    }
    torch.save(named, folder / "sae.pt")
    _write_origin(weights, folder)


def _write_origin(weights: SaeWeights, folder: Path) -> None:
    """What the library's own files have no field for, beside them."""
    (folder / _ORIGIN).write_text(
        json.dumps(
            {
                "input": weights.input,
                "k": weights.k,
                "signed": weights.rule == "signed_topk",
                "metadata": weights.metadata,
            },
            indent=2,
        )
    )


def _read_origin(folder: Path, input: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """`input` and `metadata` as this platform wrote them, else the given ones."""
    if not (folder / _ORIGIN).is_file():
        return {"input": input, "metadata": metadata}
    said = json.loads((folder / _ORIGIN).read_text())
    return {"input": said["input"], "metadata": said["metadata"]}


def _tensors_of_pt(path: Path) -> dict[str, Any]:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, expected named tensors.")
    return {
        key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in loaded.items()
    }

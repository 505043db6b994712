"""One `.pt` file of tensors: the papers' state dict, OpenAI's, Qwen Scope's, Goodfire's. The names of the tensors tell which.

What a file has no word for is read from its path, by the names under which it is published; a path that does not tell is refused with the
flag that does, or with the reason.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sarm.data.formats.sae_origin import ORIGIN, read_origin, write_origin
from sarm.data.formats.sae_place import made_for
from sarm.data.formats.sae_weights import RESIDUAL, STANDARDISED, SaeWeights, with_input_bias
from sarm.settings.checks import UserError

Tensors = Mapping[str, Any]
_QWEN = re.compile(r"SAE-Res-([^/]+?)-W\d+K-L0_(\d+)")
_QWEN_LAYER = re.compile(r"layer(\d+)\.sae\.pth?")
_GOODFIRE = re.compile(r"(Llama-3\.[13]-\d+B-Instruct)-SAE-l(\d+)")
_R1 = re.compile(r"(DeepSeek-R1-Distill-Llama-8B)-SAE-l(\d+)")
# OpenAI's folders: gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt
_OPENAI = re.compile(
    r"(mlp_post_act|resid_delta_attn|resid_delta_mlp|resid_post_attn|resid_post_mlp)[^/]*/autoencoders/(\d+)\.pt$"
)


class Kind(NamedTuple):
    """The names of the tensors that tell a publisher, and how its file is read."""

    tensors: frozenset[str]
    read: Callable[[Path, Tensors, int | None], SaeWeights]


def read_pt(path: Path, k: int | None) -> SaeWeights:
    """The SAE of a file, or of the `sae.pt` of a folder; raises UserError for tensors of no known publisher, and for what the file does not say."""
    path = path if path.is_file() else path / "sae.pt"
    tensors = tensors_of_pt(path)
    kind = next((kind for kind in _KINDS if kind.tensors <= tensors.keys()), None)
    if kind is None:
        raise UserError(f"{path} holds {', '.join(sorted(map(str, tensors))[:8])}: the names of no known SAE. Known are the papers', OpenAI's, Qwen Scope's and Goodfire's.")  # fmt: skip
    return kind.read(path, tensors, k)


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
    write_origin(weights, folder)


def tensors_of_pt(path: Path) -> dict[str, Any]:
    """The tensors of a file in float32, and what stands beside them; raises UserError where it holds something else."""
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, expected named tensors.")
    return {
        key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in loaded.items()
    }


def _papers_or_openai(path: Path, tensors: Tensors, k: int | None) -> SaeWeights:
    """OpenAI's files name their activation, and standardise their rows if it is TopK; the papers' have no ReLU and say nothing, not even k."""
    W_enc = tensors["encoder.weight"].T
    kind = tensors.get("activation", "TopK")
    if kind not in ("TopK", "ReLU"):
        raise UserError(f"{path} holds an SAE with {kind}, expected TopK or ReLU.")
    origin = read_origin(path.parent, STANDARDISED, {"imported_from": "pt"})
    if place := _OPENAI.search(path.absolute().as_posix()):
        hook = f"blocks.{place[2]}.hook_resid_post" if place[1] == "resid_post_mlp" else place[1]
        origin["metadata"] |= made_for(str(path), "openai-community/gpt2", hook)
    # A tied decoder holds the encoder once more.
    is_tied = "decoder.linear.weight" in tensors
    decoder = tensors["decoder.linear.weight"].T if is_tied else tensors["decoder.weight"]
    parts: dict[str, Any] = {
        "W_enc": W_enc,
        "b_enc": tensors.get("latent_bias", torch.zeros(W_enc.shape[1])),
        "W_dec": decoder.T,
        "b_dec": tensors["pre_bias"],
    }
    if kind == "ReLU":
        return SaeWeights(**parts, k=k, threshold=torch.zeros(W_enc.shape[1]), rule="jumprelu", **{**origin, "input": RESIDUAL})  # fmt: skip
    state = tensors.get("activation_state_dict") or {}
    said = json.loads((path.parent / ORIGIN).read_text()) if (path.parent / ORIGIN).is_file() else {}
    k = _one_k(path, k, state.get("k") or said.get("k"))
    rule = "signed_topk" if said.get("signed", state.get("postact_fn") != "ReLU") else "topk"
    return SaeWeights(**parts, k=k, rule=rule, **origin)


def _qwen_scope(path: Path, tensors: Tensors, k: int | None) -> SaeWeights:
    """W_enc [d_sae, d_in], W_dec [d_in, d_sae]; model, layer and k are in the names of folder and file. The rows keep b_dec."""
    d_sae, d_in = len(tensors["b_enc"]), len(tensors["b_dec"])
    named, layer = _QWEN.search(path.absolute().as_posix()), _QWEN_LAYER.search(path.name)
    # Without the name, another library's file could have these tensors: its shapes the other way round, or another rule.
    if tuple(tensors["W_enc"].shape) != (d_sae, d_in) or not (named or layer):
        raise UserError(f"{path} has tensors named as Qwen Scope's, and neither its folder (SAE-Res-MODEL-W32K-L0_50) nor its name (layer0.sae.pt). Its rule is not known.")  # fmt: skip
    W_enc, place = tensors["W_enc"].T, {}
    if named or layer:
        model = f"Qwen/{named[1]}" if named else None
        place = made_for(str(path), model, f"model.layers.{layer[1]}" if layer else None)
    return SaeWeights(
        W_enc=W_enc,
        b_enc=with_input_bias(tensors["b_enc"], tensors["b_dec"], W_enc),
        W_dec=tensors["W_dec"].T,
        b_dec=tensors["b_dec"],
        k=_one_k(path, k, int(named[2]) if named else None),
        input=RESIDUAL,
        metadata={"imported_from": "qwen_scope", **place},
    )


def _linear(prefix: str, name: re.Pattern[str], owner: str) -> Callable[[Path, Tensors, int | None], SaeWeights]:
    """ReLU of a linear map with a bias, and another back: published under a name that tells model and block. The rows keep the decoder's bias."""

    def read(path: Path, tensors: Tensors, k: int | None) -> SaeWeights:
        found = name.search(path.absolute().as_posix())
        if found is None:
            raise UserError(f"{path} holds two linear maps and does not say what is between them. Keep the name under which it was published, such as MODEL-SAE-l19.pt.")  # fmt: skip
        W_enc, b_dec = tensors[f"encoder{prefix}.weight"].T, tensors[f"decoder{prefix}.bias"]
        return SaeWeights(
            W_enc=W_enc,
            b_enc=with_input_bias(tensors[f"encoder{prefix}.bias"], b_dec, W_enc),
            W_dec=tensors[f"decoder{prefix}.weight"].T,
            b_dec=b_dec,
            k=k,
            threshold=torch.zeros(W_enc.shape[1]),
            rule="jumprelu",
            input=RESIDUAL,
            metadata={"imported_from": "pt", **made_for(str(path), f"{owner}/{found[1]}", f"model.layers.{found[2]}")},
        )

    return read


def _one_k(path: Path, given: int | None, said: int | None) -> int:
    """The number of active latents, by the file or by the flag; raises UserError where neither says it, or both differ."""
    if said is None and given is None:
        raise UserError(f"{path} does not say how many latents are active. Pass --k.")
    if said is not None and given is not None and said != given:
        raise UserError(f"{path} says k={said}, got k={given}. Leave --k out.")
    return int(said if said is not None else given or 0)


_KINDS = (
    Kind(frozenset({"pre_bias", "encoder.weight"}), _papers_or_openai),
    Kind(frozenset({"W_enc", "b_enc", "W_dec", "b_dec"}), _qwen_scope),
    Kind(
        frozenset({"encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias"}),
        _linear("_linear", _GOODFIRE, "meta-llama"),
    ),
    Kind(
        frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}),
        _linear("", _R1, "deepseek-ai"),
    ),
)

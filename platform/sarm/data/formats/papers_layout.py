"""Reward models in the papers' layout: a Llama checkpoint whose config has `sarm_param`, with keys `model.*`, `sae.*`, `score.weight`.

Their forward: h = residual stream after block `sae_source_layer`, standardised;  a = (h - pre_bias) encoder^T + latent_bias;
z = TopK_k(a) by signed value without a ReLU (or a, without TopK);  reward = score . z at the last shown token.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from sarm.contracts.untrusted import read_json
from sarm.data.formats.tensor_files import tensors_in
from sarm.data.tokens.chat import ChatTokenizer
from sarm.nn.backbone import FAMILIES, attention_of, without_final_norm
from sarm.nn.dense import DenseSae
from sarm.nn.loading_report import faults
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import is_unneeded
from sarm.nn.sae import Sae
from sarm.nn.topk import TopKSae
from sarm.settings.checks import UserError

# Theirs -> ours, and whether one is the other's transpose.
_SAE_KEYS = {
    "sae.pre_bias": ("b_dec", False),
    "sae.latent_bias": ("b_enc", False),
    "sae.encoder.weight": ("W_enc", True),
    "sae.decoder.weight": ("W_dec", True),
}
_SCORE = "score.weight"
_HELD = ("topk", "signed_topk", "dense")
"""Rules (`Sae.exported_as`) that the layout has words for."""


class PapersFields(NamedTuple):
    """What `sarm_param` says, or None where the checkpoint is older than it and says nothing."""

    layer: int | None = None
    k: int | None = None
    topk: bool | None = None


def read_papers_sarm(folder: Path, chat: ChatTokenizer, given: PapersFields) -> SarmForSequenceClassification:
    """The reward model of a checkpoint; `given` is for what its config does not say. Blocks keep the files' dtype.

    Raises UserError if it is of another layout, something is missing, or shapes do not fit.
    """
    try:
        config = read_json(folder / "config.json")
        weights = dict(tensors_in(folder))
    except (OSError, ValueError, KeyError, UserError) as error:
        raise UserError(
            f"{folder} is not a readable checkpoint: {error}. Pass a folder in the papers' layout."
        ) from error
    if config.get("model_type") not in FAMILIES:
        raise UserError(f"{folder} is a {config.get('model_type')} model, supported are {', '.join(FAMILIES)}.")
    needed = [key for key in (*_SAE_KEYS, _SCORE) if key not in weights and key != "sae.decoder.weight"]
    if needed:
        raise UserError(
            f"{folder} has no {', '.join(needed)}, so it is no SARM in the papers' layout. Pass another folder."
        )
    fields = _fields(config, given, folder)
    sae = _sae(weights, fields, folder)
    backbone = _backbone(config, fields, weights, folder)
    if sae.d_in != backbone.config.hidden_size:
        raise UserError(
            f"the SAE in {folder} takes activations of width {sae.d_in}, the model has {backbone.config.hidden_size}."
        )
    ours = SarmConfig(
        backbone=backbone.config.to_dict(),
        layer=fields.layer or 0,
        d_sae=sae.d_sae,
        k=sae.k,
        sae=sae.describe(),
        end_of_turn_id=chat.end_of_turn_id,
        provenance={
            "model": str(folder),
            "imported_from": "papers",
            "template": chat.template_hash,
            "tokenizer": chat.tokenizer_hash,
            "max_length": chat.max_length,
            "system_prompt": chat.system_prompt,
        },
    )
    model = SarmForSequenceClassification(ours, backbone, sae)
    with torch.no_grad():
        model.score.weight.copy_(weights[_SCORE].float().reshape(1, -1))
    model.eval()
    return model


def write_papers_sarm(model: SarmForSequenceClassification, chat: ChatTokenizer, folder: Path) -> None:
    """Config with `sarm_param`, one safetensors file and the tokenizer.

    Their code has no ReLU behind TopK: rewards are equal where K pre-activations of a row are positive, or the SAE is `signed`.

    Raises UserError for a scalar head and for SAEs that the layout has no words for.
    """
    if model.config.head != "sae" or model.sae.exported_as not in _HELD:
        what = "a scalar head" if model.config.head != "sae" else f"a {model.sae.architecture} SAE"
        raise UserError(f"the papers' layout has no words for {what}. Only SARMs on TopK SAEs can be written.")
    if not model.config.standardise:
        raise UserError("the papers' layout standardises activations, this model reads them raw.")
    config = {key: value for key, value in model.config.backbone.items() if not key.startswith("_")}
    config |= {
        "architectures": ["LlamaSARM"],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "sarm_param": {
            "sae_source_layer": model.config.layer,
            "sae_latent_size": model.sae.d_sae,
            "sae_k": model.sae.k,
            "sae_use_sequence_level": True,
            "sarm_use_activation": model.sae.exported_as != "dense",
        },
    }
    tensors = {f"model.{name}": tensor for name, tensor in model.model.state_dict().items()}
    dtype = next(iter(tensors.values())).dtype
    # Loaded by their code, and never used.
    tensors["model.norm.weight"] = torch.ones(model.model.config.hidden_size, dtype=dtype)
    for theirs, (ours, is_transposed) in _SAE_KEYS.items():
        tensor = model.sae.get_parameter(ours).detach()
        tensors[theirs] = tensor.T if is_transposed else tensor
    tensors[_SCORE] = model.score.weight.detach()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: t.contiguous().clone() for key, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    chat.tokenizer.chat_template = chat.exported_template
    chat.tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _fields(config: dict[str, Any], given: PapersFields, folder: Path) -> PapersFields:
    said = config.get("sarm_param") or {}
    topk = said.get("sarm_use_activation", said.get("sarm_use_topk"))
    layer, k = given.layer or said.get("sae_source_layer"), given.k or said.get("sae_k")
    if not said and (layer is None or k is None):
        raise UserError(
            f"the config in {folder} has no sarm_param, so it does not say where the model is cut and how many latents are active. Pass --layer and --k."
        )
    if not k:
        raise UserError(f"sarm_param in {folder} does not say sae_k. Pass --k.")
    # Their default is half of the blocks.
    layer = int(layer or config["num_hidden_layers"] // 2)
    if not 1 <= layer <= config["num_hidden_layers"]:
        raise UserError(f"{folder} has {config['num_hidden_layers']} blocks, got layer {layer}. Pass --layer.")
    topk = given.topk if given.topk is not None else topk
    return PapersFields(layer, int(k), True if topk is None else bool(topk))


def _sae(weights: dict[str, Tensor], fields: PapersFields, folder: Path) -> Sae:
    d_sae, d_in = weights["sae.encoder.weight"].shape
    k = fields.k or 0
    try:
        sae: Sae = TopKSae(d_in, d_sae, k, signed=True) if fields.topk else DenseSae(d_in, d_sae, k)
    except ValueError as error:
        raise UserError(f"the SAE in {folder}: {error}") from error
    if weights[_SCORE].numel() != d_sae:
        raise UserError(f"the head in {folder} has {weights[_SCORE].numel()} weights, the SAE {d_sae} latents.")
    with torch.no_grad():
        # The reward does not need it, and some checkpoints leave it out.
        sae.W_dec.zero_()
        for theirs, (ours, is_transposed) in _SAE_KEYS.items():
            if theirs in weights:
                tensor = weights[theirs].float()
                sae.get_parameter(ours).copy_(tensor.T if is_transposed else tensor)
    return sae


def _backbone(config: dict[str, Any], fields: PapersFields, weights: dict[str, Tensor], folder: Path) -> Any:
    kept = {
        k: v
        for k, v in config.items()
        if k not in ("model_type", "sarm_param", "architectures", "auto_map", "dtype", "torch_dtype")
    }
    kept["num_hidden_layers"] = fields.layer
    if kept.get("layer_types"):
        kept["layer_types"] = kept["layer_types"][: fields.layer]
    embeddings = weights.get("model.embed_tokens.weight")
    if embeddings is not None:
        # A padding token may have been added.
        kept["vocab_size"] = embeddings.shape[0]
    ours = AutoConfig.for_model(config["model_type"], **kept)
    attention = attention_of(ours)
    with torch.device("meta"):
        empty = without_final_norm(AutoModel.from_config(ours, attn_implementation=attention))
    wanted = set(empty.state_dict())
    found = {key.removeprefix("model."): t for key, t in weights.items() if key.startswith("model.")}
    kept = {name: t for name, t in found.items() if name in wanted or not is_unneeded(name, fields.layer or 0)}
    if wrong := faults({"missing_keys": wanted - kept.keys(), "unexpected_keys": kept.keys() - wanted}):
        raise UserError(f"{folder}, of whose first {fields.layer} blocks every weight is needed, {wrong}.")
    backbone = AutoModel.from_config(ours, attn_implementation=attention, dtype=kept[min(wanted)].dtype)
    without_final_norm(backbone)
    try:
        backbone.load_state_dict({name: kept[name] for name in wanted})
    except RuntimeError as error:
        raise UserError(f"{folder} does not fit its config: {str(error).splitlines()[-1].strip()}") from error
    backbone.config.use_cache = False
    return backbone

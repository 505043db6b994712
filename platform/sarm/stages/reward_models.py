"""Reward models before their first step: a pretrained backbone, an SAE or none, a head at zero; and the baselines beside a SARM."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sarm.data.formats.models import backbone_of, model_folder
from sarm.data.formats.sae_folder import load_sae
from sarm.data.store.activations import ActivationStore
from sarm.data.tokens.chat import ChatTokenizer
from sarm.nn.dense import DenseSae
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.pretrained import read_config
from sarm.nn.sae import Sae
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RewardSettings
from sarm.stages.variants import NO_PEFT
from sarm.training.random_encoder import draw_directions_, match_

# Llama-family heads of `*ForSequenceClassification` start so; the papers' looser baseline is two of them.
_LINEAR_INIT_STD = 0.02


def check_sae(folder: Path, model: ModelSettings) -> None:
    """Raise UserError unless the SAE was trained on activations of this model and layer."""
    _, metadata = load_sae(folder)
    made_for = metadata["activations"]
    for name, wanted in (("model", model.name), ("layer", model.layer)):
        if made_for[name] != wanted:
            raise UserError(
                f"the SAE in {folder} was trained on {name} {made_for[name]}, asked for {wanted}. Pass the --model it was trained on, or another --out."
            )


def check_width(folder: Path, model: ModelSettings) -> None:
    """Raise UserError unless the SAE is as wide as the model's residual stream."""
    sae, _ = load_sae(folder)
    config = read_config(model_folder(model), model.layer, revision=model.revision, gguf_file=model.gguf_file)
    if sae.d_in != config.hidden_size:
        raise UserError(
            f"the SAE in {folder} takes activations of width {sae.d_in}, {model.name} has {config.hidden_size}. Pass the --model it was trained on, or another --out."
        )


def build_model(
    model: ModelSettings,
    model_folder: str,
    sae_folder: Path | None,
    chat: ChatTokenizer,
    reward: RewardSettings = RewardSettings(),
    seed: int = 0,
    chat_ends: Path | None = None,
) -> SarmForSequenceClassification:
    """The reward model before its first step, fp32; without an SAE folder it has the scalar head.

    `chat_ends` is the folder of the training responses' activations, which a random encoder is matched on.

    Equal arguments give equal weights. Raises UserError if low-rank adapters are asked for and `peft` is not installed, or a random encoder has no chat ends to be matched on.
    """
    backbone = backbone_of(model, model_folder, model.layer, torch.float32)
    sae = None if sae_folder is None else _pretrained_or_random(sae_folder, reward, seed, chat_ends)
    config = SarmConfig(
        backbone=backbone.config.to_dict(),
        layer=model.layer,
        d_sae=0 if sae is None else sae.d_sae,
        k=0 if sae is None else sae.k,
        sae=None if sae is None else sae.describe(),
        head="scalar" if sae is None else "sae",
        standardise=sae is None or sae.standardises,
        end_of_turn_id=chat.end_of_turn_id,
        provenance={
            "model": model.name,
            "revision": model.revision,
            "template": chat.template_hash,
            "tokenizer": chat.tokenizer_hash,
            "max_length": model.max_length,
            "system_prompt": model.system_prompt,
            **_dictionary(sae_folder, reward),
        },
    )
    built = SarmForSequenceClassification(config, backbone, sae)
    if sae is not None and reward.encoder == "random_linear":
        generator = torch.Generator().manual_seed(seed + 1)
        nn.init.normal_(built.score.weight, std=_LINEAR_INIT_STD, generator=generator)
    if reward.lora_rank:
        add_adapters_(built, reward.lora_rank, seed)
    return built


def _dictionary(sae_folder: Path | None, reward: RewardSettings) -> dict[str, Any]:
    """How the dictionary was trained, where it was by another recipe than the papers'."""
    if sae_folder is None or reward.encoder != "pretrained":
        return {}
    _, metadata = load_sae(sae_folder)
    about = {name: metadata[name] for name in ("recipe", "reward_share", "reward_direction") if name in metadata}
    return {"dictionary": about} if about else {}


def encoder_of(sae: Sae, reward: RewardSettings, seed: int) -> Sae:
    """The SAE as the settings want it: pretrained, with directions drawn anew, or without TopK.

    `random` differs from the pretrained one in the directions of its encoder alone: each latent keeps its length and bias. Its
    decoder is the encoder's transpose of unit rows, as SAE training starts; `random_matched` is the same before `match_`. `random_linear` is a linear
    map of the activation as it is with a bias, normal of std 0.02, that knows no TopK (SARM section 4.2's "random init", as its code has it).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if reward.encoder in ("random", "random_matched"):
            draw_directions_(sae, generator)
        if reward.topk and reward.encoder != "random_linear":
            return sae
        dense = DenseSae(sae.d_in, sae.d_sae, sae.k)
        dense.standardises = sae.standardises and reward.encoder != "random_linear"
        for name, parameter in dense.named_parameters():
            parameter.copy_(getattr(sae, name))
        if reward.encoder == "random_linear":
            dense.W_enc.copy_((_LINEAR_INIT_STD * torch.randn(sae.d_sae, sae.d_in, generator=generator)).T)
            dense.b_enc.zero_()
            dense.b_dec.zero_()
            dense.W_dec.copy_(nn.functional.normalize(dense.W_enc.T, dim=1))
    return dense


def _pretrained_or_random(folder: Path, reward: RewardSettings, seed: int, chat_ends: Path | None) -> Sae:
    sae, metadata = load_sae(folder)
    sae = encoder_of(sae, reward, seed)
    if reward.encoder == "random_matched":
        if chat_ends is None:
            raise UserError("the random encoder needs the activations of chat ends. Extract them first, or pass --reward.encoder random.")  # fmt: skip
        match_(sae, ActivationStore(chat_ends), absorb=len(metadata.get("phases", ())) > 1)
    return sae


def add_adapters_(model: SarmForSequenceClassification, rank: int, seed: int) -> None:
    """Low-rank adapters on every linear map of the blocks (Hu et al. 2021), which start at zero.

    Raises UserError if `peft` is not installed.
    """
    if find_spec("peft") is None:
        raise UserError(NO_PEFT)
    from peft import LoraConfig, inject_adapter_in_model

    names = {name.rpartition(".")[2] for name, part in model.model.named_modules() if isinstance(part, nn.Linear)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(names)), model.model)


def merge_adapters_(model: SarmForSequenceClassification) -> SarmForSequenceClassification:
    """The same model with its adapters added to the weights, by the names of a model that never had any."""
    adapted: list[tuple[str, Any]] = [
        (name, part)
        for name, part in model.model.named_modules()
        if hasattr(part, "base_layer") and hasattr(part, "merge")
    ]
    for name, part in adapted:
        part.merge()
        parent, _, own = name.rpartition(".")
        setattr(model.model.get_submodule(parent), own, part.base_layer)
    return model

"""Reward models before their first step: a pretrained backbone, an SAE or none, a head at zero; and the baselines beside a SARM."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sarm.config import Model, Reward, UserError
from sarm.data.artifacts import load_sae
from sarm.data.chat import ChatTokenizer
from sarm.data.models import backbone_of, model_folder
from sarm.nn.architectures import DenseSae, options_of
from sarm.nn.backbone import read_config, read_depth
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.sae import Sae

# Llama-family heads of `*ForSequenceClassification` start so; the papers' looser baseline is two of them.
_LINEAR_INIT_STD = 0.02
_NO_PEFT = "--reward.lora-rank needs the package peft. Run pip install 'sarm[lora]'."


class Variant(NamedTuple):
    """One training of the job: its stage, the folder under `--out` that it writes, its SAE (None for a scalar head) and settings."""

    stage: str
    folder: str
    sae: Path | None
    model: Model
    reward: Reward


def variants(model: Model, reward: Reward, sae: Path) -> list[Variant]:
    """The SARM and the baselines that the settings ask for.

    Raises UserError if they ask for adapters and `peft` is not installed.
    """
    if reward.lora_rank and find_spec("peft") is None:
        raise UserError(_NO_PEFT)
    found = [Variant("train SARM", "sarm", sae, model, reward)]
    for name in reward.baselines:
        if name == "scalar":
            found.append(Variant("train scalar head", "scalar_head", None, model, reward))
        elif name == "scalar_full":
            depth = read_depth(model_folder(model), revision=model.revision, gguf_file=model.gguf_file)
            found.append(
                Variant("train scalar head, full depth", "scalar_head_full", None, replace(model, layer=depth), reward)
            )
        elif name == "token_sae":
            assert reward.token_sae is not None
            found.append(Variant("train SARM on token SAE", "sarm_token_sae", reward.token_sae, model, reward))
        elif name == "random_encoder":
            random = replace(reward, encoder="random")
            found.append(Variant("train SARM, random encoder", "sarm_random_encoder", sae, model, random))
        else:
            # The papers' code trains this encoder, which nothing made worth keeping.
            linear = replace(reward, encoder="random_linear", train_sae=True, sae_lr=reward.lr or reward.sae_lr)
            found.append(Variant("train SARM, random linear map", "sarm_random_linear", sae, model, linear))
    return found


def check_sae(folder: Path, model: Model) -> None:
    """Raise UserError unless the SAE was trained on activations of this model and layer."""
    _, metadata = load_sae(folder)
    made_for = metadata["activations"]
    for name, wanted in (("model", model.name), ("layer", model.layer)):
        if made_for[name] != wanted:
            raise UserError(
                f"the SAE in {folder} was trained on {name} {made_for[name]}, asked for {wanted}. Pass the --model it was trained on, or another --out."
            )


def check_width(folder: Path, model: Model) -> None:
    """Raise UserError unless the SAE is as wide as the model's residual stream."""
    sae, _ = load_sae(folder)
    config = read_config(model_folder(model), model.layer, revision=model.revision, gguf_file=model.gguf_file)
    if sae.d_in != config.hidden_size:
        raise UserError(
            f"the SAE in {folder} takes activations of width {sae.d_in}, {model.name} has {config.hidden_size}. Pass the --model it was trained on, or another --out."
        )


def build_model(
    model: Model,
    model_folder: str,
    sae_folder: Path | None,
    chat: ChatTokenizer,
    reward: Reward = Reward(),
    seed: int = 0,
) -> SarmForSequenceClassification:
    """The reward model before its first step, fp32; without an SAE folder it has the scalar head.

    Equal arguments give equal weights. Raises UserError if low-rank adapters are asked for and `peft` is not installed.
    """
    backbone = backbone_of(model, model_folder, model.layer, torch.float32)
    sae = None if sae_folder is None else encoder_of(load_sae(sae_folder)[0], reward, seed)
    config = SarmConfig(
        backbone=backbone.config.to_dict(),
        layer=model.layer,
        d_sae=0 if sae is None else sae.d_sae,
        k=0 if sae is None else sae.k,
        sae=None if sae is None else {"architecture": sae.architecture, **options_of(sae)},
        head="scalar" if sae is None else "sae",
        standardise=sae is None or reward.encoder != "random_linear",
        end_of_turn_id=chat.end_of_turn_id,
        provenance={
            "model": model.name,
            "revision": model.revision,
            "template": chat.template_hash,
            "tokenizer": chat.tokenizer_hash,
            "max_length": model.max_length,
            "system_prompt": model.system_prompt,
        },
    )
    built = SarmForSequenceClassification(config, backbone, sae)
    if sae is not None and reward.encoder == "random_linear":
        generator = torch.Generator().manual_seed(seed + 1)
        nn.init.normal_(built.score.weight, std=_LINEAR_INIT_STD, generator=generator)
    if reward.lora_rank:
        add_adapters_(built, reward.lora_rank, seed)
    return built


def encoder_of(sae: Sae, reward: Reward, seed: int) -> Sae:
    """The SAE as the settings want it: pretrained, as random as before its training, or without TopK.

    `random` differs from the pretrained one in the directions of its encoder alone: each latent keeps its length and bias. Its
    decoder is the encoder's transpose of unit rows, as SAE training starts. `random_linear` is a linear map with a bias, normal of
    std 0.02, that knows no TopK (SARM section 4.2's "random init", as its code has it).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if reward.encoder == "random":
            directions_SD = nn.functional.normalize(torch.randn(sae.d_sae, sae.d_in, generator=generator), dim=1)
            sae.W_enc.copy_((directions_SD * sae.W_enc.norm(dim=0)[:, None]).T)
            sae.W_dec.copy_(directions_SD)
        if reward.topk and reward.encoder != "random_linear":
            return sae
        dense = DenseSae(sae.d_in, sae.d_sae, sae.k)
        for name, parameter in dense.named_parameters():
            parameter.copy_(sae.get_parameter(name))
        if reward.encoder == "random_linear":
            dense.W_enc.copy_((_LINEAR_INIT_STD * torch.randn(sae.d_sae, sae.d_in, generator=generator)).T)
            dense.b_enc.zero_()
            dense.b_dec.zero_()
            dense.W_dec.copy_(nn.functional.normalize(dense.W_enc.T, dim=1))
    return dense


def add_adapters_(model: SarmForSequenceClassification, rank: int, seed: int) -> None:
    """Low-rank adapters on every linear map of the blocks (Hu et al. 2021), which start at zero.

    Raises UserError if `peft` is not installed.
    """
    if find_spec("peft") is None:
        raise UserError(_NO_PEFT)
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

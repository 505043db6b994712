"""SAE files as other libraries and suites publish them, one kind each, with what they compute: dense, in float64, by the publisher's own formula."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 8, 20, 3
_SEED = torch.Generator().manual_seed(11)
X = torch.randn(40, D_IN, generator=_SEED) * 2 + 1
W_ENC, W_DEC = torch.randn(D_IN, D_SAE, generator=_SEED), torch.randn(D_SAE, D_IN, generator=_SEED)
B_ENC, B_DEC = torch.randn(D_SAE, generator=_SEED), torch.randn(D_IN, generator=_SEED)
THRESHOLD, FACTOR = torch.rand(D_SAE, generator=_SEED) * 3, torch.rand(D_SAE, generator=_SEED) + 0.5
R_MAG, B_GATE = torch.randn(D_SAE, generator=_SEED), torch.randn(D_SAE, generator=_SEED)
NAMED = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
LINEAR = {"encoder.weight": W_ENC.T.contiguous(), "encoder.bias": B_ENC, "decoder.weight": W_DEC.T.contiguous()}
NORMS = W_DEC.double().norm(dim=1)


class Published(NamedTuple):
    """A kind of file: where it is written, and codes and reconstruction of `X`, model and layer that it is of."""

    write: Callable[[Path], Path]
    codes: Tensor
    reconstruction: Tensor
    model: str | None = None
    layer: int | None = None
    library: str = ""
    rule: str = ""


def pre(taken_off: Tensor | None = B_DEC, x: Tensor = X, scale: float = 1.0) -> Tensor:
    x = x.double() * scale
    return (x if taken_off is None else x - taken_off.double()) @ W_ENC.double() + B_ENC.double()


def topk(values: Tensor, k: int = K) -> Tensor:
    top = values.topk(k, dim=1)
    return torch.zeros_like(values).scatter(1, top.indices, top.values.relu())


def jump(values: Tensor, threshold: Tensor) -> Tensor:
    return values.relu() * (values > threshold.double())


def back(codes: Tensor, rows: Tensor = W_DEC) -> Tensor:
    return codes @ rows.double() + B_DEC.double()


def saelens_file(config: dict, **more: Tensor) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder.mkdir(parents=True)
        save_file({**NAMED, **more}, folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(json.dumps({"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", **config}))
        return folder

    return write


OLD = {"model_name": "gemma-2-2b", "hook_name": "blocks.5.hook_resid_post", "hook_layer": 5, "hook_head_index": None, "activation_fn_str": "relu", "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "normalize_activations": "none", "context_size": 128}  # fmt: skip
NEW = {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none", "metadata": {"sae_lens_version": "6.18.0", "model_name": "gemma-2-2b", "hook_name": "blocks.5.hook_resid_pre", "hook_head_index": None}}  # fmt: skip
GATE = {"r_mag": R_MAG, "b_gate": B_GATE, "b_mag": B_ENC}


def _lens_gated(folder: Path) -> Path:
    saelens_file({**NEW, "architecture": "gated"})(folder)
    save_file({"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC, **GATE}, folder / "sae_weights.safetensors")
    return folder


def _gated() -> Tensor:
    p = (X.double() - B_DEC.double()) @ W_ENC.double()
    return ((p + B_GATE.double()) > 0) * (p * R_MAG.double().exp() + B_ENC.double()).relu()


def sparsify_folder(**config) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder = folder / "layers.5"
        folder.mkdir(parents=True)
        (folder.parent / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m", "ctx_len": 2048}))
        about = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": 0, "k": K, "d_in": D_IN, **config}
        (folder / "cfg.json").write_text(json.dumps(about))
        save_file({"encoder.weight": LINEAR["encoder.weight"], "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}, folder / "sae.safetensors")  # fmt: skip
        return folder

    return write


def dictionary(kind: str, tensors: dict[str, Tensor], io: str = "out", **config) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder.mkdir(parents=True)
        trainer = {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 5, "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_5", **config}  # fmt: skip
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": io, "ctx_len": 128}}))
        torch.save(tensors, folder / "ae.pt")
        return folder

    return write


def _pt(place: str, tensors: dict) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / place
        path.parent.mkdir(parents=True)
        torch.save(tensors, path)
        return path

    return write


def gemma_1(folder: Path) -> Path:
    folder = folder / "models--google--gemma-scope-2b-pt-res/snapshots/0f/layer_5/width_16k/average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: one.numpy() for name, one in (NAMED | {"threshold": THRESHOLD}).items()})
    return folder


def gemma_2(config: dict | None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder = folder / "gemma-scope-2-1b-it/resid_post/layer_5_width_16k_l0_medium"
        folder.mkdir(parents=True)
        save_file({name.lower(): one for name, one in (NAMED | {"threshold": THRESHOLD}).items()}, folder / "params.safetensors")  # fmt: skip
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


GEMMA_2 = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-it", "hf_hook_point_in": "model.layers.5.output", "affine_connection": False}  # fmt: skip
LLAMA = {"d_model": D_IN, "d_sae": D_SAE, "hook_point_in": "blocks.5.hook_resid_post", "hook_point_out": "blocks.5.hook_resid_post", "act_fn": "jumprelu", "jump_relu_threshold": 0.7, "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 5.0, "out": 5.0}, "use_glu_encoder": False, "apply_decoder_bias_to_pre_encoder": False}  # fmt: skip
SCALE = D_IN**0.5 / 5.0


def llama(config: dict) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "hyperparams.json").write_text(json.dumps(config))
        save_file(LINEAR | {"decoder.bias": B_DEC}, folder / "checkpoints/final.safetensors")
        return folder

    return write


def _standardised() -> Tensor:
    x = X.double()
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)


OPENAI = {"pre_bias": B_DEC, "latent_bias": B_ENC, "encoder.weight": W_ENC.T.contiguous(), "decoder.weight": W_DEC.T.contiguous()}  # fmt: skip
TOP, RELU, JUMP = topk(pre()), pre().relu(), jump(pre(), THRESHOLD)
RAW_TOP, RAW_RELU, RAW_JUMP = topk(pre(None)), pre(None).relu(), jump(pre(None), THRESHOLD)
SCALED = jump(pre(None, scale=SCALE), torch.tensor(0.7 * SCALE))
LENS, SPARSIFY, LEARNING, PYTHIA = "SAELens", "sparsify / sae", "dictionary_learning", "EleutherAI/pythia-70m"
IN_LENS = {"model": "gemma-2-2b", "layer": 6, "library": LENS}
IN_LEARNING = {"model": PYTHIA, "layer": 6, "library": LEARNING}

KINDS: dict[str, Published] = {
    "SAELens 3 to 5, standard": Published(saelens_file(OLD | {"architecture": "standard"}), RELU, back(RELU), **IN_LENS, rule="ReLU"),
    "SAELens 3 to 5, standard with activation_fn_str topk": Published(saelens_file(OLD | {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}), TOP, back(TOP), **IN_LENS, rule="TopK"),
    "SAELens 5, topk": Published(saelens_file(OLD | {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}), TOP, back(TOP), **IN_LENS, rule="TopK"),
    "SAELens 1 and 2, no architecture, hook_point": Published(saelens_file({"model_name": "gemma-2-2b", "hook_point": "blocks.5.hook_resid_post", "hook_point_layer": 5, "activation_fn": "relu"}), RELU, back(RELU), **IN_LENS, rule="ReLU"),
    "SAELens 1 to 5, finetuning_scaling_factor of ones": Published(saelens_file(OLD | {"finetuning_scaling_factor": True}, scaling_factor=torch.ones(D_SAE)), RELU, back(RELU), **IN_LENS, rule="ReLU"),
    "SAELens 3 to 5, finetuning_scaling_factor": Published(saelens_file(OLD | {"finetuning_scaling_factor": True}, finetuning_scaling_factor=FACTOR), RELU, back(RELU * FACTOR.double()), **IN_LENS, rule="ReLU"),
    "SAELens 3 to 5, jumprelu": Published(saelens_file(OLD | {"architecture": "jumprelu", "apply_b_dec_to_input": False, "normalize_activations": False}, threshold=THRESHOLD), RAW_JUMP, back(RAW_JUMP), **IN_LENS, rule="JumpReLU"),
    "SAELens 6, topk with rescale_acts_by_decoder_norm": Published(saelens_file(NEW | {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True}), topk(pre() * NORMS), back(topk(pre() * NORMS) / NORMS), "gemma-2-2b", 5, LENS, "TopK"),
    "SAELens 6, gated": Published(_lens_gated, _gated(), back(_gated()), "gemma-2-2b", 5, LENS, "Gated, as the JumpReLU that it equals"),
    "sparsify": Published(sparsify_folder(activation="topk", transcode=False), TOP, back(TOP), PYTHIA, 6, SPARSIFY, "TopK"),
    "sae (EleutherAI, before sparsify), signed": Published(sparsify_folder(signed=True), torch.zeros_like(pre()).scatter(1, pre().topk(K, 1).indices, pre().topk(K, 1).values), back(torch.zeros_like(pre()).scatter(1, pre().topk(K, 1).indices, pre().topk(K, 1).values)), PYTHIA, 6, SPARSIFY, "TopK without a ReLU"),
    "AutoEncoder": Published(dictionary("AutoEncoder", LINEAR | {"bias": B_DEC}), RELU * NORMS, back(RELU), **IN_LEARNING, rule="ReLU, decoder rows of length 1"),
    "AutoEncoderNew": Published(dictionary("AutoEncoderNew", LINEAR | {"decoder.bias": B_DEC}), RAW_RELU, back(RAW_RELU), **IN_LEARNING, rule="ReLU"),
    "GatedAutoEncoder": Published(dictionary("GatedAutoEncoder", {"encoder.weight": LINEAR["encoder.weight"], "decoder.weight": LINEAR["decoder.weight"], "decoder_bias": B_DEC, "r_mag": R_MAG, "gate_bias": B_GATE, "mag_bias": B_ENC}), _gated(), back(_gated()), **IN_LEARNING, rule="Gated, as the JumpReLU that it equals"),
    "AutoEncoderTopK": Published(dictionary("AutoEncoderTopK", LINEAR | {"b_dec": B_DEC}, k=K), TOP, back(TOP), **IN_LEARNING, rule="TopK"),
    "BatchTopKSAE, of a block's input": Published(dictionary("BatchTopKSAE", LINEAR | {"b_dec": B_DEC, "k": torch.tensor(K), "threshold": torch.tensor(0.8)}, io="in"), jump(pre(), torch.tensor(0.8)), back(jump(pre(), torch.tensor(0.8))), PYTHIA, 5, LEARNING, "one threshold"),
    "MatryoshkaBatchTopKSAE": Published(dictionary("MatryoshkaBatchTopKSAE", NAMED | {"k": torch.tensor(K), "threshold": torch.tensor(0.8)}), jump(pre(), torch.tensor(0.8)), back(jump(pre(), torch.tensor(0.8))), **IN_LEARNING, rule="one threshold"),
    "JumpReluAutoEncoder": Published(dictionary("JumpReluAutoEncoder", NAMED | {"threshold": THRESHOLD}), RAW_JUMP, back(RAW_JUMP), **IN_LEARNING, rule="JumpReLU"),
    "Gemma Scope": Published(gemma_1, RAW_JUMP, back(RAW_JUMP), "google/gemma-2-2b", 6, "params.npz", "JumpReLU"),
    "Gemma Scope 2": Published(gemma_2(GEMMA_2), RAW_JUMP, back(RAW_JUMP), "google/gemma-3-1b-it", 6, "params.safetensors, config.json", "JumpReLU"),
    "Gemma Scope 2 without config.json": Published(gemma_2(None), RAW_JUMP, back(RAW_JUMP), None, 6, "params.safetensors", "JumpReLU"),
    "Llama Scope": Published(llama(LLAMA), SCALED, back(SCALED) / SCALE, "meta-llama/Llama-3.1-8B", 6, "hyperparams.json, final.safetensors", "JumpReLU of scaled rows"),
    "Qwen Scope": Published(_pt("SAE-Res-Qwen3-1.7B-Base-W32K-L0_3/layer5.sae.pt", NAMED | {"W_enc": W_ENC.T.contiguous(), "W_dec": W_DEC.T.contiguous()}), RAW_TOP, back(RAW_TOP), "Qwen/Qwen3-1.7B-Base", 6, "layerN.sae.pt", "TopK, k in the folder's name"),
    "Goodfire": Published(_pt("Llama-3.1-8B-Instruct-SAE-l19.pth", {"encoder_linear.weight": W_ENC.T.contiguous(), "encoder_linear.bias": B_ENC, "decoder_linear.weight": W_DEC.T.contiguous(), "decoder_linear.bias": B_DEC}), RAW_RELU, back(RAW_RELU), "meta-llama/Llama-3.1-8B-Instruct", 20, "MODEL-SAE-lN.pth", "ReLU"),
    "DeepSeek R1 distilled": Published(_pt("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", LINEAR | {"decoder.bias": B_DEC}), RAW_RELU, back(RAW_RELU), "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 20, "MODEL-SAE-lN.pt", "ReLU"),
    "OpenAI sparse_autoencoder, TopK": Published(_pt("gpt2-small/resid_post_mlp_v5_32k/autoencoders/5.pt", OPENAI | {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}, "stats_last_nonzero": torch.zeros(D_SAE)}), topk(pre(x=_standardised())), back(topk(pre(x=_standardised()))), "openai-community/gpt2", 6, "N.pt", "TopK of standardised rows"),
    "OpenAI sparse_autoencoder, ReLU": Published(_pt("5.pt", OPENAI | {"activation": "ReLU"}), RELU, back(RELU), None, None, "N.pt", "ReLU"),
    "the papers": Published(_pt("sae.pt", OPENAI | {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "Identity"}}), torch.zeros_like(pre()).scatter(1, pre(x=_standardised()).topk(K, 1).indices, pre(x=_standardised()).topk(K, 1).values), back(torch.zeros_like(pre()).scatter(1, pre(x=_standardised()).topk(K, 1).indices, pre(x=_standardised()).topk(K, 1).values)), None, None, ".pt, with --k", "TopK without a ReLU, of standardised rows"),
}  # fmt: skip

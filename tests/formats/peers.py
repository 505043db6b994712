"""One of the other libraries, in its own interpreter: writes an SAE as it saves them, and computes with every folder it is given.

    python peers.py LIBRARY WORK

WORK holds `rows.safetensors` and folders `ours/NAME`. Afterwards it also holds `theirs/NAME`, what the library saved, and
`results.safetensors` with the library's codes and reconstruction for each folder of both.
"""

import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

D_IN, D_SAE, K = 16, 64, 4


def perturb(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter moved off its initial value, so that no bias is 0 and no two layouts coincide."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.05 if name == "threshold" else 0.3
            noise = (
                torch.rand(parameter.shape, generator=generator)
                if name == "threshold"
                else torch.randn(parameter.shape, generator=generator)
            )
            parameter.add_(scale * noise)
    return module


def sae_lens(work: Path):
    from sae_lens import SAE
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    sizes = {"d_in": D_IN, "d_sae": D_SAE}
    made = {
        "topk": TopKSAE(TopKSAEConfig(**sizes, k=K)),
        "topk_rescaled": TopKSAE(TopKSAEConfig(**sizes, k=K, rescale_acts_by_decoder_norm=True)),
        "topk_input_kept": TopKSAE(TopKSAEConfig(**sizes, k=K, apply_b_dec_to_input=False)),
        "topk_layer_norm": TopKSAE(TopKSAEConfig(**sizes, k=K, normalize_activations="layer_norm")),
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**sizes)),
        "standard": StandardSAE(StandardSAEConfig(**sizes, apply_b_dec_to_input=False)),
    }
    for name, sae in made.items():
        perturb(sae).save_model(work / "theirs" / name)

    def compute(folder: Path, x: torch.Tensor):
        sae = SAE.load_from_disk(folder)
        return sae.encode(x), sae(x)

    return compute


def sparsify(work: Path):
    from sparsify import SparseCoder, SparseCoderConfig

    perturb(SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K))).save_to_disk(work / "theirs" / "topk")

    def compute(folder: Path, x: torch.Tensor):
        sae = SparseCoder.load_from_disk(folder)
        out = sae(x)
        codes = torch.zeros(len(x), sae.num_latents).scatter(1, out.latent_indices, out.latent_acts)
        return codes, out.sae_out

    return compute


def dictionary_learning(work: Path):
    import json

    # It collects activations with this one, which nothing here does and which pins other versions.
    if "nnsight" not in sys.modules:
        try:
            import nnsight  # noqa: F401
        except ImportError:
            sys.modules["nnsight"] = types.ModuleType("nnsight")
            sys.modules["nnsight"].LanguageModel = object
    from dictionary_learning.dictionary import JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    made = {
        "topk": AutoEncoderTopK(D_IN, D_SAE, K),
        "batch_topk": BatchTopKSAE(D_IN, D_SAE, K),
        "matryoshka": MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [16, 48]),
        "jumprelu": JumpReluAutoEncoder(D_IN, D_SAE),
    }
    for name in ("batch_topk", "matryoshka"):
        made[name].threshold.fill_(0.4)
    for name, sae in made.items():
        folder = work / "theirs" / name
        folder.mkdir(parents=True)
        torch.save(perturb(sae).state_dict(), folder / "ae.pt")
        trainer = {
            "dict_class": type(sae).__name__,
            "activation_dim": D_IN,
            "dict_size": D_SAE,
            "k": K,
            "layer": 3,
            "lm_name": "m",
        }
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}))

    def compute(folder: Path, x: torch.Tensor):
        sae, _ = load_dictionary(str(folder), device="cpu")
        return sae.encode(x), sae(x)

    return compute


def main() -> None:
    library, work = sys.argv[1], Path(sys.argv[2])
    compute = {"sae_lens": sae_lens, "sparsify": sparsify, "dictionary_learning": dictionary_learning}[library](work)
    x, results = load_file(work / "rows.safetensors")["x"], {}
    with torch.no_grad():
        for folder in sorted([*(work / "ours").iterdir(), *(work / "theirs").iterdir()]):
            codes, reconstruction = compute(folder, x)
            name = f"{folder.parent.name}/{folder.name}"
            results[f"{name}/codes"] = codes.float().contiguous()
            results[f"{name}/reconstruction"] = reconstruction.float().contiguous()
    save_file(results, work / "results.safetensors")


if __name__ == "__main__":
    main()

"""SAE files of other libraries, both ways: SAELens (6 and later), sparsify, dictionary_learning, and the papers' `.pt`.

Each format is a reader and a writer of `SaeWeights`. Layers count blocks that are kept, as in `hidden_states[layer]`, so the
other libraries' hook on block n is layer n + 1. None of the formats but SAELens' can say that rows are standardised first:
readers of the others must be handed `sarm.nn.sae.standardise(h)`.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sarm.config import UserError
from sarm.data.sae_lens_layout import CONFIG, WEIGHTS, read_sae_lens, write_sae_lens, write_sae_lens_on_residuals
from sarm.data.sae_weights import RESIDUAL, STANDARDISED, SaeWeights, with_input_bias

_ORIGIN = "origin.json"


class Format(NamedTuple):
    """One library's files: whether a path holds them, how they are read, and how an SAE is written into an empty folder."""

    is_at: Callable[[Path], bool]
    read: Callable[[Path, int | None], SaeWeights]
    write: Callable[[SaeWeights, Path], None]


def import_sae(path: Path, format: str = "auto", k: int | None = None) -> SaeWeights:
    """Read an SAE of any known format; `k` is for files that do not say it.

    Raises UserError if there is none, it is torn, of an architecture without an equal here, or not finite.
    """
    if not path.exists():
        raise UserError(f"there is no SAE at {path}. Pass a folder, or a .pt file.")
    name = next((name for name, known in FORMATS.items() if known.is_at(path)), None) if format == "auto" else format
    if name is None:
        raise UserError(
            f"{path} holds no known SAE: no cfg.json with sae_weights.safetensors (saelens) or sae.safetensors (sparsify), no "
            "config.json with ae.pt (dictionary_learning), and it is no .pt file. Pass the folder that holds the weights."
        )
    try:
        return FORMATS[name].read(path, k).checked(str(path))
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, or is torn; it was not opened, since that could run its code."
        ) from error
    except KeyError as error:
        raise UserError(
            f"{path} is not a {name} SAE: {error} is missing. Pass --from-format, or another path."
        ) from error
    except (OSError, EOFError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} is not a readable {name} SAE: {reason}. Get another copy, or pass --from-format."
        ) from error


def export_sae(weights: SaeWeights, folder: Path, format: str) -> None:
    """Write a folder that the library's own loader takes; it appears whole or not at all.

    Raises UserError if the folder is in use, or the format has no words for this SAE.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty. Pass another output folder.")
    temporary = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        FORMATS[format].write(weights.checked("the SAE"), temporary)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_sparsify(folder: Path, k: int | None) -> SaeWeights:
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


def _write_sparsify(weights: SaeWeights, folder: Path) -> None:
    _refuse_signed(weights, "sparsify")
    _refuse_threshold(weights, "sparsify")
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


def _read_dictionary_learning(folder: Path, k: int | None) -> SaeWeights:
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
        **_read_origin(folder, RESIDUAL, {"imported_from": "dictionary_learning", "model_name": config.get("lm_name")}),
    )


def _write_dictionary_learning(weights: SaeWeights, folder: Path) -> None:
    _refuse_signed(weights, "dictionary_learning")
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


def _read_pt(path: Path, k: int | None) -> SaeWeights:
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
        signed=said.get("signed", state.get("postact_fn") != "ReLU"),
        **_read_origin(path.parent, STANDARDISED, {"imported_from": "pt"}),
    )


def _write_pt(weights: SaeWeights, folder: Path) -> None:
    """The papers' `torch.save(state_dict)`. Their code has no ReLU: equal where k pre-activations of a row are positive."""
    _refuse_threshold(weights, "pt")
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
            {"input": weights.input, "k": weights.k, "signed": weights.signed, "metadata": weights.metadata}, indent=2
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


def _refuse_signed(weights: SaeWeights, name: str) -> None:
    if weights.signed:
        raise UserError(
            f"{name} puts a ReLU behind TopK, this SAE keeps negative latents. Pass --format pt, or --relu to drop them as the ReLU does."
        )


def _refuse_threshold(weights: SaeWeights, name: str) -> None:
    if weights.threshold is not None:
        raise UserError(
            f"{name} knows only TopK, this SAE has thresholds. Pass --format saelens or dictionary_learning."
        )


def with_relu(weights: SaeWeights) -> SaeWeights:
    """A signed TopK SAE as its readers use it that drop latents of value 0 and below."""
    said = weights.metadata.get("sae")
    return replace(
        weights, signed=False, metadata=weights.metadata | ({"sae": {**said, "signed": False}} if said else {})
    )


def _with_relu_only(weights: SaeWeights, folder: Path) -> None:
    _refuse_signed(weights, "saelens")
    write_sae_lens(weights, folder)


def _on_residuals(weights: SaeWeights, folder: Path) -> None:
    _refuse_signed(weights, "saelens")
    write_sae_lens_on_residuals(weights, folder)


def _holds(*names: str) -> Callable[[Path], bool]:
    return lambda path: all((path / name).is_file() for name in names)


FORMATS: dict[str, Format] = {
    "saelens": Format(_holds(CONFIG, WEIGHTS), read_sae_lens, _with_relu_only),
    "saelens_residual": Format(lambda path: False, read_sae_lens, _on_residuals),
    "sparsify": Format(_holds("cfg.json", "sae.safetensors"), _read_sparsify, _write_sparsify),
    "dictionary_learning": Format(
        _holds("config.json", "ae.pt"), _read_dictionary_learning, _write_dictionary_learning
    ),
    "pt": Format(lambda path: path.suffix == ".pt" or (path / "sae.pt").is_file(), _read_pt, _write_pt),
}
"""Formats by their names on the command line."""

"""SAE and SARM folders: safetensors weights with everything needed to use them again.

An SAE folder is SAELens' layout (`cfg.json`, `sae_weights.safetensors`); a SARM folder is what `save_pretrained` of a
`transformers` model and tokenizer write, with the template pinned and the code beside it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from sarm.config import UserError
from sarm.data.chat import ChatTokenizer
from sarm.data.sae_lens_layout import CONFIG, WEIGHTS, write_sae_lens
from sarm.data.sae_weights import weights_of
from sarm.nn.architectures import ARCHITECTURES, build_sae
from sarm.nn.modeling_sarm import SarmConfig, SarmForSequenceClassification
from sarm.nn.sae import Sae

SAE = "sae/v1"
SARM = "sarm/v1"


def save_sae(sae: Sae, folder: Path, metadata: dict[str, Any]) -> None:
    """Write the SAE; `metadata` (model, layer, standardising, ...) goes into `cfg.json`.

    Architectures with thresholds are SAELens' jumprelu, which is what they are out of training; `metadata.sae` says how they train.
    """
    write_sae_lens(weights_of(sae, metadata), folder)


def load_sae(folder: Path) -> tuple[Sae, dict[str, Any]]:
    """The SAE of a folder and its metadata.

    Raises UserError if files are missing or torn, or the weights are of another shape than `cfg.json` says.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
        # A jumprelu SAE from elsewhere has no k, and none is needed unless it is trained on.
        here = {"architecture": config["architecture"], "k": config["k"] if config["architecture"] == "topk" else 1}
        kind = dict(config.get("metadata", {}).get("sae", here))
        architecture, k = kind.pop("architecture"), kind.pop("k")
        known = architecture in ARCHITECTURES
        sae = build_sae(architecture, config["d_in"], config["d_sae"], k, **kind) if known else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder} is not a readable SAE: {error}. Train it again, or pass another --out.") from error
    if sae is None:
        raise UserError(f"{folder} holds a {architecture} SAE, expected one of {', '.join(ARCHITECTURES)}.")
    expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        raise UserError(f"{folder / WEIGHTS} holds shapes {found}, cfg.json says {expected}.")
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            tensor.copy_(weights[name])
    return sae, config.get("metadata", {})


def save_sarm(model: SarmForSequenceClassification, chat: ChatTokenizer, folder: Path) -> None:
    """Write a model that `AutoModelForSequenceClassification` loads, its tokenizer, and copies of the code it needs."""
    code = Path(__file__).parent.parent / "nn"
    model.config.auto_map = {
        "AutoConfig": "modeling_sarm.SarmConfig",
        "AutoModelForSequenceClassification": "modeling_sarm.SarmForSequenceClassification",
    }
    model.save_pretrained(folder)
    chat.tokenizer.chat_template = chat.template
    # `save_pretrained` writes the side that the tokenizer was made with.
    chat.tokenizer.truncation_side = chat.tokenizer.init_kwargs["truncation_side"] = "left"
    chat.tokenizer.model_max_length = chat.max_length
    chat.tokenizer.save_pretrained(folder)
    for name in ("modeling_sarm.py", "backbone.py", "architectures.py", "sae.py", "losses.py"):
        shutil.copyfile(code / name, folder / name)


def load_sarm(folder: Path, dtype: torch.dtype = torch.float32) -> SarmForSequenceClassification:
    """The reward model of a folder.

    Raises UserError if it is not one, or weights are missing, surplus or of another shape.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no reward model (no config.json). Train one first, or pass another --out.")
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        if kind != SarmConfig.model_type:
            raise ValueError(f"its model type is {kind}")
        config = SarmConfig.from_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not a readable reward model: {error}. Train it again, or pass another --out."
        ) from error
    model = SarmForSequenceClassification(config)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise UserError(
            f"{folder} does not fit its config: {len(wrong)} weights differ, first {wrong[0]}: got {found.get(wrong[0])}, expected {expected.get(wrong[0])}."
        )
    model.load_state_dict(weights)
    model.model.to(dtype)
    return model.eval()


def read_tensors(folder: Path, *names: str) -> list[torch.Tensor]:
    """Some tensors of a reward model's folder, without the rest of the model.

    Raises UserError if the file is missing or torn, or lacks one.
    """
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            return [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} is not a readable SARM: {error}. Train it again, or pass another --out.") from error

"""SARM folders: what `save_pretrained` of a `transformers` model and tokenizer write, with the template pinned and the code beside it.

Apart from SAE folders, since `transformers`' models take seconds to import, which SAE training can do without.
"""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from sarm.contracts.untrusted import read_json
from sarm.data.store.finite import not_finite
from sarm.data.tokens.chat import ChatTokenizer
from sarm.nn.modeling_sarm import CODE_FILES, SarmConfig, SarmForSequenceClassification
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.settings.checks import UserError

_PACKAGE = Path(__file__).parents[2]
TEXT_CODE_FILES = ("control_tokens.py", "spelling.py")


def save_sarm(model: SarmForSequenceClassification, chat: ChatTokenizer, folder: Path) -> None:
    """Write a model that `AutoModelForSequenceClassification` loads, its tokenizer, and copies of the code it needs."""
    # By these rules the folder is read, whenever its model was trained.
    model.config.protocol_version, model.config.answer_place = PROTOCOL_VERSION, chat.answer_place
    # What pads rows, for whoever asks the config and not the tokenizer.
    model.config.pad_token_id = chat.pad_id
    model.save_pretrained(folder)
    chat.tokenizer.chat_template = chat.exported_template
    # `save_pretrained` writes the side that the tokenizer was made with.
    chat.tokenizer.truncation_side = chat.tokenizer.init_kwargs["truncation_side"] = "left"
    chat.tokenizer.model_max_length = chat.max_length
    chat.tokenizer.save_pretrained(folder)


def copy_model_code(folder: Path) -> None:
    """Copy the modules that a reward model is made of; they import each other relatively, and otherwise torch and transformers alone."""
    code = _PACKAGE / "nn"
    for name in CODE_FILES:
        shutil.copyfile(code / name, folder / name)


def copy_text_code(folder: Path) -> None:
    """Copy the modules that encode contents as text; they import each other relatively, and otherwise tokenizers and jinja2 alone."""
    for name in TEXT_CODE_FILES:
        shutil.copyfile(_PACKAGE / "data" / "tokens" / name, folder / name)


def load_sarm(folder: Path, dtype: torch.dtype = torch.float32) -> SarmForSequenceClassification:
    """The reward model of a folder.

    Raises UserError if it is not one, or weights are missing, surplus or of another shape.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no reward model (no config.json). Train one first, or pass another --out.")
    try:
        kind = read_json(folder / "config.json").get("model_type")
        if kind != SarmConfig.model_type:
            raise ValueError(f"its model type is {kind}")
        config = SarmConfig.from_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        model = SarmForSequenceClassification(config)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not a readable reward model: {error}. Train it again, or pass another --out."
        ) from error
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise UserError(
            f"{folder} does not fit its config: {len(wrong)} weights differ, first {wrong[0]}: got {found.get(wrong[0])}, expected {expected.get(wrong[0])}."
        )
    if broken := not_finite(weights.items()):
        raise UserError(f"{folder} holds NaN or infinite values in {broken}. The model is broken; train it again.")
    model.load_state_dict(weights)
    model.model.to(dtype)
    model.eval()
    return model


def read_tensors(folder: Path, *names: str) -> list[torch.Tensor]:
    """Some tensors of a reward model's folder, without the rest of the model.

    Raises UserError if the file is missing or torn, or lacks one.
    """
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            return [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} is not a readable SARM: {error}. Train it again, or pass another --out.") from error

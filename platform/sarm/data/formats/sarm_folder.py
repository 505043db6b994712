"""SARM folders: what `save_pretrained` of a `transformers` model and tokenizer write, with the template pinned and the code beside it.

Apart from SAE folders, since `transformers`' models take seconds to import, which SAE training can do without.
"""

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sarm.contracts.untrusted import read_json
from sarm.data.formats.feature_edit import FeatureEdit
from sarm.data.formats.tensor_files import tensors_in
from sarm.data.store.finite import not_finite, not_floats
from sarm.data.tokens.chat import ChatTokenizer
from sarm.nn.abs_topk import AbsTopKSae
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
    save_tokenizer(chat, folder)


def save_tokenizer(chat: ChatTokenizer, folder: Path) -> None:
    """Write a tokenizer that renders and cuts as `chat` does: its template pinned, with the system prompt, and its length."""
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

    Raises UserError if it is not one, or weights are missing, surplus or of another shape. Warns where its config does not say whether
    activations are standardised.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no reward model (no config.json). Train one first, or pass another --out.")
    try:
        fields = read_json(folder / "config.json")
        kind = fields.get("model_type")
        if kind != SarmConfig.model_type:
            raise ValueError(f"its model type is {kind}")
        config = SarmConfig.from_pretrained(folder)
        weights = dict(tensors_in(folder))
        model = SarmForSequenceClassification(config)
    except (OSError, ValueError, AttributeError, KeyError, UserError) as error:
        raise UserError(
            f"{folder} is not a readable reward model: {error}. Train it again, or pass another --out."
        ) from error
    if "standardise" not in fields:
        warnings.warn(f"{folder / 'config.json'} does not say whether activations are standardised, as the first folders did not. They are, as theirs were.", stacklevel=2)  # fmt: skip
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        raise UserError(
            f"{folder} does not fit its config: {len(wrong)} weights differ, first {wrong[0]}: got {shapes.get(wrong[0])}, expected {expected.get(wrong[0])}."
        )
    if whole := not_floats(weights.items()):
        raise UserError(f"{folder} holds whole numbers in {whole}: it was quantised, which a SARM cannot be. Pass it as it was exported.")  # fmt: skip
    if broken := not_finite(weights.items()):
        raise UserError(f"{folder} holds NaN or infinite values in {broken}. The model is broken; train it again.")
    model.load_state_dict(weights)
    model.model.to(dtype)
    model.eval()
    return model


@torch.no_grad()
def read_sarm(folder: Path, dtype: torch.dtype = torch.float32) -> SarmForSequenceClassification:
    """The reward model of a folder for all who read its latents: each is silent or fires, and has one meaning.

    A latent of AbsTopK has two, one for each sign, so it is read as two of TopK (`AbsTopKSae.unfolded`): S + i is what latent i is where
    it is negative, with the opposite weight in the head. Rewards and contributions are the same. Raises UserError as `load_sarm` does.
    """
    model = load_sarm(folder, dtype)
    if model.config.head != "sae" or not isinstance(model.sae, AbsTopKSae):
        return model
    config: Any = copy.deepcopy(model.config)
    sae = model.sae.unfolded()
    config.d_sae, config.sae = sae.d_sae, sae.describe()
    unfolded = SarmForSequenceClassification(config, model.model, sae, model.feature_edits)
    unfolded.score.weight.copy_(torch.cat([model.score.weight, -model.score.weight], 1))
    unfolded.eval()
    return unfolded


def carry_edit_(model: SarmForSequenceClassification, edit: FeatureEdit) -> None:
    """Edit these features inside the model from now on, also where it is saved: config and weights hold what that needs.

    Raises UserError for an edit of some tokens alone, or of another width or of layers that the model lacks.
    """
    if edit.positions != "all":
        raise UserError(f"the edit is of the {edit.positions} tokens, and a SARM is edited at all tokens, as answers share their prompt. Make it with --debias.positions all.")  # fmt: skip
    try:
        records = [
            {**model.feature_edits.add_(splice, origin, model.model), "model": edit.model}
            for splice, origin in zip(edit.splices, edit.origins, strict=True)
        ]
    except ValueError as error:
        raise UserError(str(error)) from error
    model.config.feature_edits = [*model.config.feature_edits, *records]


def read_latents(folder: Path, *names: str) -> list[NDArray[np.float32]]:
    """Tensors with a row for each latent, as `read_sarm` numbers them, without the rest of the model: `score.weight` [S], `sae.W_dec` [S, D].

    Raises UserError if the file is missing or torn, or lacks one.
    """
    try:
        found = dict(tensors_in(folder, names))
        if lacking := [name for name in names if name not in found]:
            raise ValueError(f"it holds no {lacking[0]}")
        tensors = [found[name].float().squeeze(0) for name in names]
        sae = read_json(folder / "config.json").get("sae") or {}
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{folder} is not a readable SARM: {error}. Train it again, or pass another --out.") from error
    is_unfolded = sae.get("architecture") == AbsTopKSae.architecture
    return [(torch.cat([tensor, -tensor]) if is_unfolded else tensor).numpy() for tensor in tensors]

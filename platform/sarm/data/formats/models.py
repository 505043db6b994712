"""From a model's name to its files, and the checks that need no weights."""

from pathlib import Path
from typing import Any

from sarm.data.formats.model_files import check_model_files
from sarm.data.formats.model_shapes import BUILT_IN_MODELS
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings


def model_folder(model: ModelSettings) -> str:
    """Folder or Hugging Face id that `transformers` loads; the demo's and the tests' models are made once and cached.

    Raises UserError for an unknown built-in name.
    """
    if model.name in BUILT_IN_MODELS:
        return str(BUILT_IN_MODELS[model.name]())
    if ":" in model.name and not Path(model.name).exists():
        raise UserError(f"unknown model {model.name}, built in are {' and '.join(BUILT_IN_MODELS)}. Pass --model.name.")
    return model.name


def backbone_of(model: ModelSettings, folder: str, layer: int, dtype: Any) -> Any:
    """The first `layer` blocks of the model in `folder`, with their weights in a torch `dtype`.

    Raises UserError if a weight is missing or not finite.
    """
    from sarm.data.store.finite import not_finite
    from sarm.nn.pretrained import load_backbone

    try:
        backbone = load_backbone(folder, layer, dtype, revision=model.revision, gguf_file=model.gguf_file)
    except ValueError as error:
        raise UserError(str(error)) from error
    if broken := not_finite(backbone.named_parameters()):
        raise UserError(f"{folder} holds NaN or infinite values in {broken}. The weights are broken; get another copy.")
    return backbone


def check_model(model: ModelSettings) -> ChatTokenizer:
    """The model's tokenizer, after checking that the model exists, is supported, has `layer` blocks and fits the tokenizer.

    Raises UserError otherwise; reads no weights.
    """
    folder = model_folder(model)
    if Path(folder).expanduser().is_dir() and not model.gguf_file:
        check_model_files(Path(folder).expanduser())
    # Seconds of imports, that who is refused for a file need not wait for.
    from sarm.nn.pretrained import longest_row, read_config

    try:
        config = read_config(folder, model.layer, revision=model.revision, gguf_file=model.gguf_file)
    except ValueError as error:
        raise UserError(str(error)) from error
    chat = load_chat_tokenizer(model, folder)
    if lost := chat.beyond(config.vocab_size):
        raise UserError(
            f"the tokenizer of {model.name} has {len(chat.tokenizer)} tokens, its model {config.vocab_size}: texts may hold {lost}, for which there is no embedding. Pass a matching --model.name."
        )
    limit = longest_row(config)
    if limit is not None and model.max_length > limit:
        raise UserError(
            f"beyond {limit} tokens, {model.name} computes every row by the longest of its batch, so that a reward would depend on what is beside it. Pass --model.max-length {limit} or less."
        )
    return chat

"""From a model's name to its files, and the checks that need no weights."""

from pathlib import Path
from typing import Any

from sarm.contracts.untrusted import read_json
from sarm.data.formats.adapters import is_adapter, merged_model
from sarm.data.formats.model_files import check_model_files
from sarm.data.formats.model_shapes import BUILT_IN_MODELS
from sarm.data.formats.reward_classes import bodies_in, has_known_code
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings


def model_folder(model: ModelSettings) -> str:
    """Folder or Hugging Face id that `transformers` loads; the demo's and the tests' models are made once and cached, as are merged adapters.

    Raises UserError for an unknown built-in name, and for adapters that cannot be merged (`merged_model`).
    """
    if model.name in BUILT_IN_MODELS:
        return str(BUILT_IN_MODELS[model.name]())
    folder = Path(model.name).expanduser()
    if ":" in model.name and not folder.exists():
        raise UserError(f"unknown model {model.name}, built in are {' and '.join(BUILT_IN_MODELS)}. Pass --model.name.")
    return str(merged_model(folder)) if is_adapter(folder) else model.name


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


def check_one_body(folder: Path) -> None:
    """Raise UserError if the files hold several language models, as a policy and its reward model: which is meant is said nowhere."""
    from sarm.data.formats.tensor_files import shapes_in

    bodies = bodies_in(shapes_in(folder))
    if len(bodies) > 1:
        raise UserError(f"{folder} holds {len(bodies)} language models, in {' and '.join(map(repr, bodies))}. Pass a folder with one to --model.name.")  # fmt: skip


def check_predicts(model: ModelSettings) -> None:
    """Raise UserError if the model is one without a language model's head, as reward models are: it predicts no next token."""
    from sarm.nn.pretrained import read_config

    config = read_config(model_folder(model), model.layer, revision=model.revision, gguf_file=model.gguf_file)
    classes = [str(name) for name in config.architectures or ()]
    if classes and not any("CausalLM" in name or "ConditionalGeneration" in name for name in classes):
        raise UserError(f"{model.name} is {', '.join(classes)}, which predicts no next token, so that no cross-entropy of its SAE can be measured. Pass --sae.cross-entropy-texts 0.")  # fmt: skip


def _config_in(folder: Path) -> dict[str, Any]:
    try:
        return dict(read_json(folder / "config.json"))
    # What is wrong with the file says the check of files.
    except (OSError, ValueError, TypeError):
        return {}


def check_model(model: ModelSettings) -> ChatTokenizer:
    """The model's tokenizer, after checking that the model exists, is supported, has `layer` blocks and fits the tokenizer.

    Raises UserError otherwise; reads no weights.
    """
    folder = model_folder(model)
    local = Path(folder).expanduser()
    if local.is_dir() and not model.gguf_file:
        check_model_files(local, own_code=has_known_code(_config_in(local)))
        check_one_body(local)
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

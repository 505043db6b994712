"""Edits of features inside a model, checked against the model before it is loaded."""

from pathlib import Path
from typing import Any

from sarm.contracts.untrusted import read_json
from sarm.data.formats.feature_edit import digest_of, load_edit
from sarm.nn.backbone import FAMILIES, REFUSED
from sarm.nn.splice import check_sites
from sarm.settings.checks import UserError


def checked_edit(folder: Path, model: Path, identity: str, *, takes_places: bool) -> str:
    """The hash of an edit that fits the model in a folder, whose own hash is `identity`. `takes_places`: whether its reader can edit some tokens alone.

    Raises UserError for a folder that holds no edit, an edit of another model, of layers that the model lacks or of another width, and for
    positions that the model's reader cannot take.
    """
    edit = load_edit(folder)
    if edit.model != identity:
        raise UserError(f"the edit in {folder} was made for the model {edit.model[:12]}, {model} is {identity[:12]}. Pass the edit of this model.")  # fmt: skip
    if edit.positions != "all" and not takes_places:
        raise UserError(f"the edit in {folder} is of the {edit.positions} tokens, and {model} is edited at all tokens here, as answers share their prompt. Make it with --debias.positions all.")  # fmt: skip
    num_blocks, d_in = shape_of_body(model)
    try:
        check_sites(edit.splices, num_blocks, d_in, str(model))
    except ValueError as error:
        raise UserError(str(error)) from error
    return digest_of(folder)


def shape_of_body(model: Path) -> tuple[int, int]:
    """Number of blocks and width of the model in a folder: of a SARM those that are kept. Raises UserError if its config does not say."""
    body = _config_of_body(model)
    try:
        return int(body["num_hidden_layers"]), int(body["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{model / 'config.json'} does not say how deep and wide the model is ({type(error).__name__}: {error}). Pass another model.") from error  # fmt: skip


def check_family(model: Path) -> None:
    """Raise UserError unless the model in a folder is of a family whose blocks' outputs are known to be the residual stream."""
    family = _config_of_body(model).get("model_type")
    if family in REFUSED:
        raise UserError(f"{model} is a {family} model, {REFUSED[family]}. Pass another model.")
    if family not in FAMILIES:
        raise UserError(f"{model} is a {family} model, of which no layer can be read; known are {', '.join(FAMILIES)}. Pass another model.")  # fmt: skip


def _config_of_body(model: Path) -> dict[str, Any]:
    """The config of the language model in a folder: of a SARM its backbone's. Raises UserError if it cannot be read."""
    try:
        config = read_json(model / "config.json")
        return dict(config.get("backbone") or config.get("text_config") or config)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{model / 'config.json'} cannot be read ({type(error).__name__}: {error}). Pass another model.") from error  # fmt: skip

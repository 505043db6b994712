"""A SARM whose head was edited, as a folder like any other, with the edit beside it."""

import json
from pathlib import Path

import torch

from sarm.audit.steering import Edit
from sarm.contracts.folders import HEAD_EDIT
from sarm.contracts.manifest import write_atomically
from sarm.data.formats.feature_edit import load_edit
from sarm.data.formats.sarm_folder import carry_edit_, read_sarm, save_sarm
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.passes.models import sarm_settings


def save_edited(source: Path, edit: Edit, folder: Path, features: Path | None = None) -> None:
    """Write the model of `source` with the edited head, its tokenizer and code, and the edit; with the edit of features in a folder, if one is given.

    Latents are those that `read_sarm` numbers. Raises UserError if the edit was made for another head.
    """
    model = read_sarm(source)
    weight_S = model.score.weight.detach().squeeze(0).numpy()
    with torch.no_grad():
        model.score.weight[0] = torch.from_numpy(edit.applied(weight_S))
    if features is not None:
        carry_edit_(model, load_edit(features))
    save_sarm(model, load_chat_tokenizer(sarm_settings(source), source), folder)
    write_atomically(folder / HEAD_EDIT, json.dumps({"source": str(source), "weights": edit.as_json()}, indent=2))

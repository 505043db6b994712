"""Where an SAE of another library reads: the model and the layer that its file or its path names.

Reward models read the residual stream after a block, so an SAE of any other place is refused with that place's name. Layers count blocks
that are kept, as in `hidden_states[layer]`: the output of block n is layer n + 1, and its input is layer n.
"""

import re
from pathlib import Path
from typing import Any

from sarm.settings.checks import UserError

# TransformerLens' and Hugging Face's names of a block's output, dictionary_learning's, and the Llama Scope's short one.
_AFTER = re.compile(
    r"blocks\.(\d+)\.hook_resid_post|(?:model\.|transformer\.|gpt_neox\.|language_model\.)*(?:layers|h)\.(\d+)(?:\.output)?|resid_post_layer_(\d+)"
)
_BEFORE = re.compile(r"blocks\.(\d+)\.hook_resid_pre")


def layer_at(hook: str, where: str) -> int:
    """Blocks that are kept of a model whose residual stream is read at `hook`; `where` names the file.

    Raises UserError for what is no place in the residual stream behind a block.
    """
    if found := _AFTER.fullmatch(hook):
        return int(next(number for number in found.groups() if number is not None)) + 1
    found = _BEFORE.fullmatch(hook)
    if found and int(found[1]):
        return int(found[1])
    raise UserError(
        f"{where} is of {hook!r}, and reward models read the residual stream after a block. Pass an SAE of hook_resid_post, or of a block's output."
    )


def made_for(where: str, model: str | None = None, hook: str | None = None) -> dict[str, Any]:
    """What is known of where an SAE reads, as `metadata` has it: `model` and `layer` under `activations`, and `hook_name` as the file names it.

    Raises UserError as `layer_at`.
    """
    known = {"model": model or None, "layer": layer_at(hook, where) if hook else None}
    said = {"activations": {name: value for name, value in known.items() if value is not None}, "hook_name": hook}
    return {name: value for name, value in said.items() if value}


def is_same_model(one: str, other: str) -> bool:
    """Whether two names are of one model: owners and case do not count, nor do the two spellings that TransformerLens has of its own."""
    return _plain(one) == _plain(other)


def _plain(name: str) -> str:
    last = Path(name).name.lower().removeprefix("meta-")
    return {"gpt2-small": "gpt2"}.get(last, last)

"""Classes of reward models that their repositories define, and what they compute: that is known here, so their code is never run.

Each is a causal language model as `transformers` has it, with a head beside it (`sarm.passes.reward_heads`).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sarm.contracts.untrusted import read_json
from sarm.settings.checks import UserError

EMBEDDING = "embed_tokens.weight"
ATTACHED = "sarm_attached"
"""The model type of a classifier with a dictionary (`attached_folder`)."""
KNOWN_CODE = {
    "LlamaForRewardModelWithGating": "gated",
    "AtheneForSequenceClassification": "linear",
    "CustomAutoModelForSequenceClassification": "linear",
    "EurusRewardModel": "linear",
    "LlamaRewardModel": "linear",
    "LlamaForScore": "linear",
    "GRewardModel": "layers",
    "Qwen2ForRewardModel": "layers",
    "INFORMForSequenceClassification": "layers",
}
"""The kind of head of each class."""
READS_CLS = ("AtheneForSequenceClassification", "CustomAutoModelForSequenceClassification")
"""They read the reward at a token that is put behind the conversation."""


def has_known_code(config: Mapping[str, Any]) -> bool:
    """Whether a config names one of these classes, so that code which it names is not needed."""
    return any(str(name) in KNOWN_CODE for name in config.get("architectures") or ())


def bodies_in(names: Iterable[str]) -> list[str]:
    """The beginnings of the names of each language model's weights in a checkpoint: what stands before its embedding's."""
    return [name.removesuffix(EMBEDDING) for name in names if name.split(".")[-2:] == EMBEDDING.split(".")]


def read_behind(tokenizer: Any, folder: str, revision: str) -> list[int]:
    """The tokens behind a conversation at which the model of a folder, or Hugging Face id, reads its reward: the CLS token for some.

    Raises UserError if its tokenizer has none.
    """
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(folder, revision=revision)
    if not any(name in READS_CLS for name in config.get("architectures") or ()):
        return []
    if tokenizer.cls_token_id is None:
        raise UserError(f"{folder} reads its reward at the CLS token, and its tokenizer has none. Get another copy.")
    return [tokenizer.cls_token_id]


def is_attached(folder: Path) -> bool:
    """Whether a folder holds a classifier with a dictionary."""
    try:
        return bool(read_json(folder / "config.json").get("model_type") == ATTACHED)
    except (OSError, ValueError, AttributeError):
        return False

"""SARM: reward models whose score is a sum of a few nameable sparse features.

The names below are public, and loaded when they are first asked for: importing this package loads neither torch nor ray, so that
`--help` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sarm.api.reward_model import Explanation as Explanation
    from sarm.api.reward_model import RewardModel as RewardModel
    from sarm.api.reward_model import load as load
    from sarm.api.training import train as train
    from sarm.data.formats.sae_folder import load_sae as load_sae
    from sarm.data.formats.sarm_folder import load_sarm as load_sarm
    from sarm.data.tokens.chat import load_chat_tokenizer as load_chat_tokenizer
    from sarm.interpret.context_store import load_contexts as load_contexts
    from sarm.nn.modeling_sarm import SarmConfig as SarmConfig
    from sarm.nn.modeling_sarm import SarmForSequenceClassification as SarmForSequenceClassification
    from sarm.nn.sae import Sae as Sae
    from sarm.settings.checks import UserError as UserError

__version__ = "0.2.0"

_HOMES = {
    "Explanation": "sarm.api.reward_model",
    "RewardModel": "sarm.api.reward_model",
    "Sae": "sarm.nn.sae",
    "SarmConfig": "sarm.nn.modeling_sarm",
    "SarmForSequenceClassification": "sarm.nn.modeling_sarm",
    "UserError": "sarm.settings.checks",
    "load": "sarm.api.reward_model",
    "load_chat_tokenizer": "sarm.data.tokens.chat",
    "load_contexts": "sarm.interpret.context_store",
    "load_sae": "sarm.data.formats.sae_folder",
    "load_sarm": "sarm.data.formats.sarm_folder",
    "train": "sarm.api.training",
}
__all__ = ["Explanation", "RewardModel", "Sae", "SarmConfig", "SarmForSequenceClassification", "UserError", "load", "load_chat_tokenizer", "load_contexts", "load_sae", "load_sarm", "train"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sarm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

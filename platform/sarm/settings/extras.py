"""What of the package is installed: the reading side always, and by extras (`pip install 'sarm[train]'`) what trains, serves and asks judges.

`pyproject.toml` has the versions; a test holds the two together.
"""

import functools
import importlib.util
from typing import Literal

from sarm.settings.checks import UserError

Extra = Literal["train", "serve", "judge", "lora", "optuna", "tensorboard", "wandb"]

LIBRARIES: dict[Extra, tuple[str, ...]] = {
    "train": ("ray", "deepspeed", "mlflow", "datasets", "accelerate", "gguf", "sentencepiece", "tqdm"),
    "serve": ("starlette", "uvicorn", "h11", "prometheus_client"),
    "judge": ("openai",),
    "lora": ("peft",),
    "optuna": ("optuna",),
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb",),
}
"""The modules that each extra brings and the reading side does without."""
_WORK = {
    "train": "training, and whatever else runs on Ray or is kept in MLflow,",
    "serve": "the reward server",
    "judge": "explaining latents, with judges or without,",
    "lora": "training by adapters",
    "optuna": "a search by Optuna",
    "tensorboard": "logging to TensorBoard",
    "wandb": "logging to Weights & Biases",
}


class MissingExtraError(UserError, ImportError):
    """Work whose libraries are not installed; says what to install."""


@functools.cache
def is_installed(module: str) -> bool:
    """Whether a library is there; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    # A module that was taken out of `sys.modules` by name has no spec.
    except ValueError:
        return False


def need(*extras: Extra) -> None:
    """Raise MissingExtraError, of one line, unless the libraries of these extras are installed."""
    for extra in extras:
        if lacking := [name for name in LIBRARIES[extra] if not is_installed(name)]:
            raise MissingExtraError(said_of(extra, lacking[0]))


def extra_of(module: str | None) -> Extra | None:
    """The extra that brings a module, by its dotted name; None if none does."""
    top = (module or "").partition(".")[0]
    return next((extra for extra, names in LIBRARIES.items() if top in names), None)


def said_of(extra: Extra, module: str) -> str:
    """The one line about a library of an extra that is not there."""
    return f"{_WORK[extra]} needs the {extra} extra ({module} is not installed): pip install 'sarm[{extra}]'"

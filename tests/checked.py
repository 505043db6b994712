"""The type checker of `conftest.py`'s import hook."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# An int may stand for a float, as mypy has it.
_CONF = BeartypeConf(is_pep484_tower=True)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its annotations checked; nested ones as they are, since each call of the outer one would prepare the checks anew."""
    return function if "<locals>" in function.__qualname__ else beartype(function, conf=_CONF)

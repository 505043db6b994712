"""Reward models that are functions: `module:function` or `file.py:function`, of conversations to numbers."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sarm.contracts.manifest import sha256_of
from sarm.settings.checks import UserError


def load_function(place: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names.

    Raises UserError if there is none.
    """
    source, _, name = place.rpartition(":")
    try:
        if source.endswith(".py"):
            found = importlib.util.spec_from_file_location(f"scorer_{Path(source).stem}", source)
            assert found is not None
            assert found.loader is not None
            module = importlib.util.module_from_spec(found)
            sys.modules[found.name] = module
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        function = getattr(module, name)
    # Whatever the user's module raises while it is imported.
    except Exception as error:
        raise UserError(
            f"cannot load {place} ({type(error).__name__}: {error}). Pass --model MODULE:FUNCTION."
        ) from error
    if not callable(function):
        raise UserError(f"{place} is not a function. Pass --model MODULE:FUNCTION.")
    loaded: Callable[..., Any] = function
    return loaded


def hash_of_function(name: str) -> str:
    """The bytes of the file that the function is in: an edited function has no cached scores."""
    import inspect

    function = load_function(name)
    path = inspect.getsourcefile(inspect.unwrap(function))
    return hashlib.sha256(f"{name.rpartition(':')[2]}\x1f{sha256_of(Path(path)) if path else name}".encode()).hexdigest()[:32]  # fmt: skip

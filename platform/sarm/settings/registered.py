"""Names that registries on higher floors hold, listed in the help of flags.

Settings know no higher floor: the command line says where the names are (`REGISTRIES`), and they are asked for when help is shown.
"""

from collections.abc import Callable, Iterable
from typing import Any

import tyro

REGISTRIES: dict[str, Callable[[], Iterable[str]]] = {}


def listing(registry: str) -> Any:
    """What makes the help of a flag list the names in a registry, before the flag's default."""

    def hint(default: str) -> str:
        names = REGISTRIES.get(registry, tuple)()
        return f"({registry}: {', '.join(names)}) (default: {default or 'none'})"

    return tyro.conf.arg(help_behavior_hint=hint)

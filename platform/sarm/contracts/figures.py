"""Figures as JSON: a frozen dataclass becomes a mapping of its fields, in their order.

A field with the metadata SPREAD holds figures whose keys stand among those of their holder. It, and a field with the metadata OPTIONAL,
have no key where they are None. Any other None is written as null.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

SPREAD = {"figures": "spread"}
OPTIONAL = {"figures": "optional"}


def plain_values(value: Any) -> Any:
    """The value with mappings for dataclasses and lists for tuples; numbers stay as they are (`finite_or_null`)."""
    if dataclasses.is_dataclass(value):
        return _of_fields(value)
    if isinstance(value, Mapping):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    return value


def _of_fields(figures: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in dataclasses.fields(figures):
        value, kind = getattr(figures, one.name), one.metadata.get("figures")
        if kind is not None and value is None:
            continue
        found |= plain_values(value) if kind == "spread" else {one.name: plain_values(value)}
    return found

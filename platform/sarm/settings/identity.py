"""Settings as JSON values: all of them, and those that decide what is computed."""

import dataclasses
import json
from pathlib import Path
from typing import Any


def identity(config: Any, *, seed: int | None = None) -> dict[str, Any]:
    """The fields of `config` that decide what is computed, as JSON values: two runs with equal identities give equal results."""
    fields = {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if _decides(f, config)}
    return fields if seed is None else {**fields, "seed": seed}


def as_json(config: Any) -> str:
    """The whole resolved config, for `--dry-run`, manifests and MLflow."""
    return json.dumps(_plain(dataclasses.asdict(config)), indent=2)


def _decides(field: "dataclasses.Field[Any]", config: Any) -> bool:
    if field.metadata.get("operational"):
        return False
    return not field.metadata.get("absent_at_default") or getattr(config, field.name) != field.default


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value

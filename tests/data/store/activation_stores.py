"""Small activations/v1 folders for tests."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from sarm.contracts.folders import ACTIVATIONS_FOLDER
from sarm.contracts.manifest import StageFolder
from sarm.contracts.tables import activations_table
from sarm.data.store.activations import activation_table, write_activation_file

D_IN = 6
METADATA = {"dtype": "float16", "layer": 1, "model": "tiny:llama"}


def table_of(
    x: torch.Tensor,
    first_row: int = 0,
    dtype: str = "float16",
    kinds: list[str] | None = None,
    own: dict[str, list[Any]] | None = None,
    **metadata,
) -> pa.Table:
    """Rows numbered from `first_row`, three to a document; `own` are other values of columns."""
    numbers = range(first_row, first_row + len(x))
    columns = {
        "row_id": list(numbers),
        "doc_id": [f"doc{n // 3}" for n in numbers],
        "side": ["text"] * len(x),
        "position": list(numbers),
        "token_id": [5] * len(x),
        "num_tokens": [9] * len(x),
    }
    columns |= {} if kinds is None else {"kind": kinds}
    schema = activations_table(x.shape[1], {**METADATA, "dtype": dtype, **metadata}, kinds=kinds is not None)
    return activation_table(columns | (own or {}), x, dtype, schema)


def write_store(folder: Path, parts: list[pa.Table], finish: bool = True) -> Path:
    stage = StageFolder(folder, ACTIVATIONS_FOLDER, {})
    stage.claim()
    for number, part in enumerate(parts):
        write_activation_file(part, folder / f"part-{number:06}.parquet")
    if finish:
        kind = json.loads(parts[0].schema.metadata[b"sarm"])
        stage.finish({"rows": sum(map(len, parts)), "activations": kind})
    return folder


def numbered(first: int, num: int) -> torch.Tensor:
    """Vectors that all differ and are exact in 16 bits."""
    return torch.arange(first, first + num).float()[:, None] * 0.5 + torch.arange(D_IN).float() * 64

"""Small activations/v1 folders for tests."""

import json
from pathlib import Path

import pyarrow as pa
import torch

from sarm.contracts.folders import ACTIVATIONS_FOLDER
from sarm.contracts.manifest import StageFolder
from sarm.contracts.tables import activations_table
from sarm.data.store.activations import activation_table, write_activation_file

D_IN = 6
METADATA = {"dtype": "float16", "layer": 1, "model": "tiny:llama"}


def table_of(x: torch.Tensor, first_row: int = 0, dtype: str = "float16", **metadata) -> pa.Table:
    """Rows numbered from `first_row`, three to a document."""
    numbers = range(first_row, first_row + len(x))
    columns = {
        "row_id": list(numbers),
        "doc_id": [f"doc{n // 3}" for n in numbers],
        "side": ["text"] * len(x),
        "position": list(numbers),
        "token_id": [5] * len(x),
        "num_tokens": [9] * len(x),
    }
    return activation_table(columns, x, dtype, activations_table(x.shape[1], {**METADATA, "dtype": dtype, **metadata}))


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

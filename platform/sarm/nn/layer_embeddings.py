"""Weights that hold a part for each block of a model, side by side: those of the first blocks, read out of a checkpoint of all.

Gemma 4 E2B and E4B add to every block an embedding of its own of the token, and a projection of the token's first embedding.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
# By the end of its name: the dimension along which the blocks lie.
_BLOCKS_ALONG = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}


@torch.no_grad()
def fill_layer_embeddings_(model: nn.Module, report: dict[str, Any], name: str, revision: str) -> None:
    """Fill what a loading's report found too large because it is of more blocks; such weights are faults of it no more.

    Raises OSError or SafetensorError where the files cannot be read. A weight of another shape than the first blocks' stays a fault.
    """
    left = []
    for fault in report.get("mismatched_keys", ()):
        key, got, wanted = str(fault[0]), tuple(fault[1]), tuple(fault[2])
        along = next((one for end, one in _BLOCKS_ALONG.items() if key.endswith(end)), None)
        others = [(a, b) for place, (a, b) in enumerate(zip(got, wanted, strict=True)) if place != along]
        if along is None or got[along] < wanted[along] or any(a != b for a, b in others):
            left.append(fault)
            continue
        parameter = model.get_parameter(key)
        parameter.copy_(_first(name, revision, key, along, wanted[along]))
    report["mismatched_keys"] = left


def _first(name: str, revision: str, key: str, along: int, size: int) -> Tensor:
    """The first `size` rows or columns of the weight whose name ends so; the rest is not read."""
    from safetensors import safe_open

    for path in _files(name, revision):
        with safe_open(path, "pt") as file:
            for stored in file.keys():  # noqa: SIM118  (no mapping)
                if stored == key or stored.endswith(f".{key}"):
                    part = file.get_slice(stored)
                    tensor: Tensor = part[:size] if along == 0 else part[:, :size]
                    return tensor
    raise OSError(f"{key} is in no file of {name}")


def _files(name: str, revision: str) -> list[str]:
    """The files with the weights of a folder or a model of the hub, all of which were just read."""
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    if Path(name).expanduser().is_dir() and not (Path(name).expanduser() / _INDEX).is_file():
        return [str(path) for path in sorted(Path(name).expanduser().glob("*.safetensors"))]
    index = cached_file(name, _INDEX, revision=revision, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return [str(cached_file(name, _WHOLE, revision=revision))]
    shards, _ = get_checkpoint_shard_files(name, index, revision=revision)
    return [str(path) for path in shards]

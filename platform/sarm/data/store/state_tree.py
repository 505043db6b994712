"""Nested training state (what `state_dict()` returns) as named tensors plus JSON, and back, without pickle.

Tensors come back with the memory layout they had: a fused optimizer reads moments in the layout of their parameter.
"""

import json
from typing import Any

import torch
from torch import Tensor

_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


def split_state(state: Any) -> tuple[dict[str, Tensor], str]:
    """The tensors by path, contiguous on the CPU, and JSON that says where they belong.

    Dicts, lists and tuples may hold tensors, numbers, strings, booleans and None. Raises TypeError for anything else.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, json.dumps(_encode(state, "state", tensors))


def join_state(tensors: dict[str, Tensor], text: str) -> Any:
    """What `split_state` was given; raises KeyError if a tensor is missing."""
    return _decode(json.loads(text), tensors)


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # Dimensions from the slowest to the fastest, so that a transposed matrix is stored as it lies in memory.
        order = sorted(range(value.dim()), key=lambda d: value.stride()[d], reverse=True)
        tensors[path] = value.detach().permute(order).contiguous().cpu().clone()
        return {_TENSOR: path, "order": order}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: _encode(item, f"{path}/{key}", tensors) for key, item in value.items()}
        items = enumerate(value.items())
        return {_ITEMS: [[_plain(key), _encode(item, f"{path}/{n}", tensors)] for n, (key, item) in items]}
    if isinstance(value, list | tuple):
        items_of = [_encode(item, f"{path}/{number}", tensors) for number, item in enumerate(value)]
        return items_of if isinstance(value, list) else {_TUPLE: items_of}
    return _plain(value)


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        order = value["order"]
        return tensors[value[_TENSOR]].permute([order.index(d) for d in range(len(order))])
    if _ITEMS in value:
        return {key: _decode(item, tensors) for key, item in value[_ITEMS]}
    if _TUPLE in value:
        return tuple(_decode(item, tensors) for item in value[_TUPLE])
    return {key: _decode(item, tensors) for key, item in value.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a training state holds tensors, numbers, strings, lists, tuples and dicts, got {type(value)}")


def random_state() -> dict[str, Any]:
    """State of torch's generators of this process: the CPU's, and every visible CUDA device's."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue torch's generators where `random_state` was taken; a device that was not there then keeps its own."""
    torch.set_rng_state(state["cpu"])
    for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda, device)

"""The tensors in a model's files, one file or shards: safetensors, and `pytorch_model*.bin` read as plain tensors and nothing else."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sarm.data.formats.model_files import weight_files
from sarm.settings.checks import UserError

Shape = tuple[int, ...]


def shapes_in(folder: Path, *, pickles: bool = False) -> dict[str, Shape]:
    """The shape of every tensor by its name; no weight is read. `pickles` also takes `.bin` files, where there are no safetensors.

    Raises UserError if there is no file, a shard is missing, a file is torn or holds more than tensors, or two files hold one tensor.
    """
    found: dict[str, Shape] = {}
    place: dict[str, Path] = {}
    for path in weight_files(folder, pickles=pickles):
        own = _shapes_of(path)
        # Which of two a reader takes is not said anywhere: one of them may be another model's.
        if twice := sorted(own.keys() & found.keys()):
            raise UserError(f"{folder} holds {twice[0]} twice, in {place[twice[0]].name} and {path.name}. Delete the file that is not meant.")  # fmt: skip
        found |= own
        place |= dict.fromkeys(own, path)
    return found


def _shapes_of(path: Path) -> dict[str, Shape]:
    if path.suffix == ".bin":
        return {name: tuple(tensor.shape) for name, tensor in _of_pickle(path).items()}
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no whole safetensors file: {error}. Get another copy.") from error


def tensors_in(
    folder: Path, names: Iterable[str] | None = None, *, pickles: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of these names, or all, each read when it is its turn. Raises UserError as `shapes_in` does."""
    shapes_in(folder, pickles=pickles)
    wanted = None if names is None else set(names)
    for path in weight_files(folder, pickles=pickles):
        if path.suffix == ".bin":
            yield from ((name, tensor) for name, tensor in _of_pickle(path).items() if wanted is None or name in wanted)
            continue
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (no mapping)
                    if wanted is None or name in wanted:
                        yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is no whole safetensors file: {error}. Get another copy.") from error


def _of_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # A pickle can fail in any way; none of them runs code.
    except Exception as error:
        raise UserError(f"{path} holds more than tensors, or is torn; it was not opened. Convert it to safetensors where you trust it, and pass that folder.") from error  # fmt: skip
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise UserError(f"{path} is no mapping of names to tensors. Pass a folder with a model's weights.")
    return found

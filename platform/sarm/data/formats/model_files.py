"""A model's folder before anything in it is loaded: weights that are whole and no pickles, and no code of its own."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sarm.contracts.untrusted import inside, read_json
from sarm.settings.checks import UserError

_INDEX = "model.safetensors.index.json"
_BIN_INDEX = "pytorch_model.bin.index.json"
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""Patterns of the files that decide what a model computes."""
_PICKLES = ("*.pt", "*.pth", "*.ckpt", "*.pkl")


def folder_of(name: str, revision: str = "main") -> Path:
    """The folder of a model: the one that is named, else the cached snapshot of a Hugging Face repository, fetched if need be.

    Raises UserError if there is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UserError(f"no model folder {name}. Pass --model with a folder, owner/name on Hugging Face, or module:function.")  # fmt: skip
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(MODEL_FILES)))
    # The library and the network beneath it raise dozens of kinds; all mean the same to the user.
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise UserError(f"{name} is no folder and cannot be fetched ({type(error).__name__}: {reason}). Pass another --model.") from error  # fmt: skip


def check_model_files(folder: Path, *, own_code: bool = False, pickles: bool = False) -> None:
    """Raise UserError unless the folder's safetensors files are whole, and its JSON files name no code (`own_code`: config.json may name it).

    The code would not be run; but a model that asks for it is another one without it. With `pickles`, `.bin` files do where there are no
    safetensors: whoever reads them takes plain tensors alone.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _refuse_code(folder / name, _fields(folder / name), own_code=own_code and name == "config.json")
    for path in weight_files(folder, pickles=pickles):
        if path.suffix == ".bin":
            continue
        try:
            with safe_open(path, "np"):
                pass
        except (OSError, SafetensorError) as error:
            size = path.stat().st_size if path.exists() else 0
            raise UserError(
                f"{path} ({size:,} bytes) is no whole safetensors file: {error}. Get another copy."
            ) from error


def weight_files(folder: Path, *, pickles: bool = False) -> list[Path]:
    """The files with a model's weights: the shards that an index names, else all; `.bin` ones (`pickles`) only where there are no safetensors.

    Raises UserError if there are none, or an index names what is not there, lies outside or is beside a whole file.
    """
    if paths := _indexed(folder, _INDEX) or sorted(folder.glob("*.safetensors")):
        return paths
    found = _indexed(folder, _BIN_INDEX) or sorted(folder.glob("pytorch_model*.bin"))
    if found and pickles:
        return found
    if named := found or sorted(path for pattern in _PICKLES for path in folder.glob(pattern)):
        raise UserError(
            f"{folder} holds its weights as {named[0].name}, a pickle, which can run code. Convert it to safetensors where you trust it (`save_pretrained` writes them), and pass that folder."
        )
    raise UserError(f"{folder} holds no *.safetensors. The download may be incomplete; get the weights.")


def _indexed(folder: Path, name: str) -> list[Path]:
    index = folder / name
    if not index.is_file():
        return []
    names = _fields(index).get("weight_map", {})
    try:
        paths = [inside_cache(folder, str(name)) for name in sorted(set(names.values()))]
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{index} cannot be used: {error}. Get another copy.") from error
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{index} names {missing[0].name}, which is not there. The download may be incomplete.")
    # Saving in shards leaves an older whole file where it is, and readers differ in which of the two they take.
    whole = folder / name.removesuffix(".index.json")
    if whole.is_file() and whole not in paths:
        raise UserError(f"{folder} holds its weights twice, as {whole.name} and in the shards of {name}. Delete those that are not meant.")  # fmt: skip
    return paths


def inside_cache(folder: Path, name: str) -> Path:
    """`inside`, but for links: the files of a Hugging Face cache are links to where it keeps their bytes."""
    path = folder / name
    return path if path.is_symlink() and Path(name).name == name else inside(folder, name)


def _refuse_code(path: Path, fields: dict[str, Any], *, own_code: bool) -> None:
    for key, value in fields.items():
        # `attn_implementation: owner/name` makes transformers download a kernel.
        is_code = key in ("auto_map", "trust_remote_code") and value and not own_code
        if is_code or ("attn_implementation" in key and "/" in str(value)):
            raise UserError(
                f"{path} names code of its own ({key}), which is never run here, and without it the model may be another. Pass another model, or remove {key} if the plain architecture is right."
            )


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields = read_json(path)
        if not isinstance(fields, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Get another copy.") from error
    return fields

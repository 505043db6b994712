"""Low-rank adapters as PEFT saves them (`adapter_config.json` beside `adapter_model.safetensors`), merged into the model that they are for.

W' = W + scale B A for each adapted weight (LoRA: Hu et al. 2021, section 4.1); modules that were trained whole, such as a reward head, take
the place of the base's. PEFT merges; here it is checked that every tensor of the adapter is in the result and that none was drawn at random.
The merged model is kept in the cache, in the dtype of its base, and read as any other folder.
"""

import hashlib
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sarm.contracts.untrusted import read_json
from sarm.data.formats.model_files import check_model_files, weight_files
from sarm.data.sources.cache import build_once
from sarm.settings.checks import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CLASSES = {"SEQ_CLS": "AutoModelForSequenceClassification", "CAUSAL_LM": "AutoModelForCausalLM"}
# What `transformers` calls the heads of its sequence classifiers.
_HEADS = ("score.", "classifier.")
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja", "vocab.*", "merges.txt")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def merged_model(folder: Path) -> Path:
    """The cached folder of the model that an adapter's folder and its base make together.

    Raises UserError if PEFT is not installed, the adapter is none of LoRA or names no kind of model, it is a pickle, its base cannot be read,
    or the two do not fit: a weight of the result would be in no file.
    """
    config = _config(folder)
    if find_spec("peft") is None:
        raise UserError(f"{folder} holds adapters, which need the package peft. Run pip install 'sarm[lora]'.")
    base = _base(folder, config)
    check_model_files(base)
    digest = hashlib.sha256()
    tokenizers = sorted(path for source in (base, folder) for path in _tokenizer_files(source))
    for path in [folder / CONFIG, folder / WEIGHTS, base / "config.json", *weight_files(base), *tokenizers]:
        about = path.stat()
        digest.update(f"{path.absolute()}\x1f{about.st_size}\x1f{about.st_mtime_ns}\x1e".encode())
    return build_once(f"merged/{digest.hexdigest()[:32]}", lambda part: _build(folder, base, config, part))


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = dict(read_json(folder / CONFIG))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {error}. Get another copy.") from error
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} holds {config.get('peft_type')} adapters, and only LORA ones can be merged. Pass the merged model.")  # fmt: skip
    if config.get("task_type") not in _CLASSES:
        raise UserError(f"{folder} is an adapter for {config.get('task_type')}, expected {' or '.join(_CLASSES)}. Pass the merged model.")  # fmt: skip
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} holds no {WEIGHTS}. Get the adapter's weights as safetensors.")
    return config


def _base(folder: Path, config: dict[str, Any]) -> Path:
    name = str(config.get("base_model_name_or_path") or "")
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path.absolute()
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise UserError(f"{folder / CONFIG} names the base {name or 'of nothing'}, which is no folder here. Write its folder there.")  # fmt: skip
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=config.get("revision"), allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model"]))  # fmt: skip
    # The library and the network beneath it raise dozens of kinds; all mean the same to the user.
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise UserError(f"the base of {folder}, {name}, cannot be fetched ({type(error).__name__}: {reason}). Write its folder into {CONFIG}.") from error  # fmt: skip


def _build(folder: Path, base: Path, config: dict[str, Any], part: Path) -> None:
    from sarm.nn.pretrained import quiet_transformers

    with quiet_transformers():
        try:
            model = _merged(folder, base, str(config["task_type"]))
            model.save_pretrained(part)
        except UserError:
            raise
        # PEFT and transformers raise what they like about files.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{folder} cannot be merged into {base}: {reason} Get another copy of either.") from error
    # Where both have one, the adapter's tokenizer is the one that it was trained with.
    for source in (base, folder):
        for path in _tokenizer_files(source):
            shutil.copyfile(path, part / path.name)


def _tokenizer_files(folder: Path) -> list[Path]:
    return [path for pattern in _TOKENIZER for path in folder.glob(pattern)]


def _merged(folder: Path, base: Path, task: str) -> Any:
    import transformers
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    from sarm.nn.loading_report import faults

    tensors = load_file(folder / WEIGHTS)
    # Modules that were trained whole: the base need not have them.
    whole = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items() if ".lora_" not in name}
    # Embeddings may be among them, and the layers within a head: its last layer is the narrowest.
    labels = [len(tensor) for name, tensor in whole.items() if name.startswith(_HEADS) and tensor.dim() == 2]
    heads = {"num_labels": min(labels)} if task == "SEQ_CLS" and labels else {}
    model, report = getattr(transformers, _CLASSES[task]).from_pretrained(
        base, dtype="auto", trust_remote_code=False, use_safetensors=True, output_loading_info=True, **heads
    )
    if wrong := faults(report, may_lack=lambda key: key in whole, may_hold=lambda key: key.startswith("lm_head.")):
        raise UserError(f"{base}, the base of {folder}, {wrong}. Get another copy.")
    adapted = PeftModel(model, PeftConfig.from_pretrained(str(folder)))
    wanted = get_peft_model_state_dict(adapted).keys()
    if lacking := sorted(wanted - tensors.keys()):
        raise UserError(f"{folder} lacks {lacking[0]}, which would be drawn at random. Save the adapter with its head (modules_to_save).")  # fmt: skip
    if unused := sorted(tensors.keys() - wanted):
        raise UserError(f"{folder} holds {unused[0]}, for which {base} has no place. Pass the adapter's own base.")
    set_peft_model_state_dict(adapted, tensors)
    taken = get_peft_model_state_dict(adapted)
    if other := [name for name, tensor in taken.items() if not tensor.equal(tensors[name].to(tensor.dtype))]:
        raise UserError(f"{folder} holds {other[0]}, which {base} did not take as it is. Pass the adapter's own base.")
    return adapted.merge_and_unload(safe_merge=True)

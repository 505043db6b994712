"""From what `--model` names to a `ModelSpec`: its kind, its files, and the hash that decides which cached scores are its own."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sarm.contracts.folders import SARM_FOLDER
from sarm.contracts.manifest import MANIFEST, read_manifest, sha256_of, verify_files
from sarm.contracts.untrusted import read_json
from sarm.data.formats.adapters import is_adapter, merged_model
from sarm.data.formats.model_files import MODEL_FILES, check_model_files, folder_of
from sarm.data.formats.reward_classes import ATTACHED
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer, load_tokenizer
from sarm.data.tokens.templates import check_renders, chosen_template
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.passes.functions import hash_of_function, load_function
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings

DEFAULT_LENGTH = 2048
BESIDE = "feature_edit"
"""In a model's folder: the edit that its rewards are read with."""


@dataclass(frozen=True)
class ModelSpec:
    """A reward model as workers load it; `identity` is a hash of its weights, tokenizer and code, `template` of its chat template."""

    kind: str
    place: str
    identity: str
    template: str
    protocol: str
    max_length: int
    dtype: str
    system_prompt: str | None = None
    head: str = ""
    objectives: tuple[float, ...] = ()
    chat_template: str = ""
    edit: str = ""
    """Folder of an edit of features inside the model; `identity` then depends on it too."""


def find_model(settings: Benchmarking) -> ModelSpec:
    """What is to be scored, checked as far as it can be without loading weights.

    Raises UserError for a name that is none of the three, a head that is not known or lacks weights, a tokenizer without chat template, or an
    edit of features that is not of this model.
    """
    return with_edit(_plain_model(settings), settings.edit)


def _plain_model(settings: Benchmarking) -> ModelSpec:
    name = settings.model
    if ":" in name and not Path(name).exists():
        _refuse_flags(settings, "a function")
        load_function(name)
        source, _, function = name.rpartition(":")
        place = f"{Path(source).absolute()}:{function}" if source.endswith(".py") else name
        return _spec(
            kind="callable",
            place=place,
            identity=hash_of_function(name),
            template="",
            settings=settings,
            max_length=DEFAULT_LENGTH,
        )
    folder = _folder(name, settings.revision)
    config = _config(folder, name)
    if config.get("model_type") == ATTACHED:
        raise UserError(f"{name} is a dictionary of {config.get('classifier')}, whose rewards are that model's own. Pass that model to --model.")  # fmt: skip
    if config.get("model_type") == "sarm":
        _refuse_flags(settings, "a SARM, which has a head and a template of its own")
        return sarm_spec(folder, settings.protocol, settings.max_length, settings.compute_dtype)
    return _classifier(folder, config, settings)


def with_edit(spec: ModelSpec, folder: Path | None) -> ModelSpec:
    """The model with the edit of features in `folder`, or else with the one that lies beside its weights, if one does.

    Raises UserError for an edit of another model, or one that the model cannot be read with.
    """
    folder = folder or (edit_beside(Path(spec.place)) if spec.kind != "callable" else None)
    if folder is None:
        return spec
    if spec.kind == "callable":
        raise UserError(f"{spec.place} is a function, which has no layers to edit. Leave out --edit.")
    # Torch takes seconds, which who edits nothing need not wait for.
    from sarm.passes.feature_edits import checked_edit

    own = hash_of_folder(Path(spec.place))
    digest = checked_edit(folder, Path(spec.place), own, takes_places=spec.kind == "classifier")
    identity = hashlib.sha256(f"{spec.identity}\x1f{digest}".encode()).hexdigest()[:32]
    return replace(spec, edit=str(folder), identity=identity)


def edit_beside(model: Path) -> Path | None:
    """The edit of features that lies among a model's files, with which its rewards are read; None if there is none."""
    return model / BESIDE if (model / BESIDE).is_dir() else None


def refuse_edit_beside(model: Path, work: str) -> None:
    """Raise UserError for a model with an edit of features among its files: `work` does not apply it, and would be of other rewards."""
    if edit_beside(model) is not None:
        raise UserError(f"{model} holds an edit of features ({BESIDE}), which {work} does not apply. Move that folder out to use the model without it.")  # fmt: skip


def _refuse_flags(settings: Benchmarking, kind: str) -> None:
    if settings.head or settings.objectives or settings.chat_template:
        raise UserError(f"{settings.model} is {kind}. Leave out --head, --objectives and --chat-template, which are for models of others.")  # fmt: skip


def sarm_tokenizer(spec: ModelSpec) -> ChatTokenizer:
    """A SARM folder's own tokenizer and pinned template."""
    import sarm.nn.modeling_sarm  # noqa: F401  # registers the model's type: the loader would ask whether to run the folder's code

    model = ModelSettings(name=spec.place, max_length=spec.max_length, system_prompt=spec.system_prompt)
    return load_chat_tokenizer(model, spec.place)


def sarm_settings(folder: Path) -> ModelSettings:
    """How a SARM folder, or that of a classifier with a dictionary, turns messages into tokens: by its own tokenizer, length and system prompt.

    Raises UserError if the folder holds no reward model with latents.
    """
    try:
        config = dict(read_json(folder / "config.json"))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder} holds no reward model (config.json: {error}). Train one first, or pass another folder."
        ) from error
    is_attached = config.get("model_type") == ATTACHED
    if not is_attached and (config.get("model_type") != "sarm" or config.get("head") != "sae"):
        kind = config.get("head", config.get("model_type"))
        raise UserError(f"{folder} is a {kind} model without latents. Pass a folder with a SARM.")
    known = config.get("provenance") or {}
    length = known.get("max_length", DEFAULT_LENGTH)
    reads: Any = "last" if is_attached else "end_of_turn"
    system = known.get("system_prompt")
    return ModelSettings(name=str(folder), max_length=length, system_prompt=system, rewarded_token=reads)


# Ends the id of a completion that is scored without its prompt.
ALONE = ":alone"


def score_key(spec: ModelSpec) -> str:
    """What a cached score depends on besides the texts: model, template, protocol and its version, length and dtype."""
    # Scores from before heads were looked for may be those of a random one.
    of_head = [f"head {spec.head} {spec.objectives}"] if spec.kind == "classifier" else []
    asked = (spec.identity, spec.template, spec.protocol, str(spec.max_length), spec.dtype, str(spec.system_prompt))
    parts = (*asked, f"version {PROTOCOL_VERSION}", *of_head)
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:32]


def hash_of_folder(folder: Path) -> str:
    """A hash of every file that decides what a model computes."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
        # What a run wrote beside the weights says nothing about them.
        if path.name not in ("manifest.json", "stage.json", "history.json"):
            found.update(f"{path.name}\x1f{sha256_of(path)}\x1e".encode())
    return found.hexdigest()[:32]


def check_tokenizer(spec: ModelSpec) -> None:
    """Before scoring: raise UserError if a SARM's tokenizer or template is not the one that it was trained with.

    Apart from `find_model`, since loading a tokenizer costs seconds that a run whose scores are all cached can save.
    """
    if spec.kind != "sarm":
        return
    known = _config(Path(spec.place), spec.place).get("provenance") or {}
    chat = sarm_tokenizer(spec)
    for what, found in (("template", chat.template_hash), ("tokenizer", chat.tokenizer_hash)):
        if known.get(what, found) != found:
            raise UserError(
                f"the {what} in {spec.place} ({found}) is not the one the model was trained with ({known[what]}), so its rewards would mean nothing. Restore the folder's tokenizer files."
            )


def sarm_spec(
    folder: Path, protocol: str = "exact", max_length: int | None = None, dtype: str = "float32"
) -> ModelSpec:
    """A SARM's folder, whose files are those that were written; without a `max_length`, it is the model's own.

    Raises UserError otherwise.
    """
    config = _config(folder, str(folder))
    if (folder / MANIFEST).exists():
        verify_files(folder, read_manifest(folder, SARM_FOLDER))
    check_model_files(folder, own_code=True)
    known = config.get("provenance") or {}
    return ModelSpec(
        kind="sarm",
        place=str(folder),
        identity=hash_of_folder(folder),
        # The template's file is part of the folder's hash; its own hash is for the reader.
        template=known.get("template", ""),
        protocol=protocol,
        max_length=_length(protocol, max_length, known.get("max_length", DEFAULT_LENGTH)),
        dtype=dtype,
        system_prompt=known.get("system_prompt"),
    )


def _classifier(folder: Path, config: dict[str, Any], settings: Benchmarking) -> ModelSpec:
    """A reward model that others trained: its head is known, every weight is in its files, and its tokenizer has a template."""
    # Torch takes seconds, which who is refused for less need not wait for.
    from sarm.passes.foreign_models import check_foreign, layout_of

    name = settings.model
    layout = layout_of(folder, config, settings.head)
    check_model_files(folder, own_code=layout is not None and layout.known_code, pickles=True)
    outputs = layout.num_outputs if layout is not None else _num_labels(folder, config, name)
    if outputs != max(1, len(settings.objectives)):
        raise UserError(
            f"{name} has {outputs} outputs, and {len(settings.objectives) or 'no'} weights of them are given. Pass {outputs} to --objectives, or another --model."
        )
    tokenizer = classifier_tokenizer(folder, settings.chat_template)
    if layout is not None and layout.reads_cls and tokenizer.cls_token_id is None:
        raise UserError(f"{name} reads its reward at the CLS token, and its tokenizer has none. Get another copy.")
    check_foreign(folder, layout)
    template = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()[:16]
    spec = _spec(
        kind="classifier",
        place=str(folder),
        identity=hash_of_folder(folder),
        template=template,
        settings=settings,
        max_length=DEFAULT_LENGTH,
    )
    return replace(spec, head=settings.head, objectives=settings.objectives, chat_template=settings.chat_template)


def _num_labels(folder: Path, config: dict[str, Any], name: str) -> int:
    from transformers import AutoConfig

    try:
        labels: int = AutoConfig.from_pretrained(folder, trust_remote_code=False).num_labels
    # A config is checked by its own class, which raises what it likes.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name} cannot be loaded: {reason} Pass another --model.") from error
    if not any("SequenceClassification" in one for one in config.get("architectures") or []):
        raise UserError(
            f"{name} is {', '.join(config.get('architectures') or ['no architecture'])}, expected a sequence classifier. Pass another --model."
        )
    return labels


def classifier_tokenizer(folder: Path, chat_template: str) -> Any:
    """The tokenizer of a reward model that others trained, with the template to render with.

    Raises UserError if there is no tokenizer, no template, or one that cannot render a question and its answer.
    """
    tokenizer = load_tokenizer(ModelSettings(name=str(folder)), folder)
    tokenizer.chat_template = chosen_template(tokenizer, chat_template, "--chat-template")
    check_renders(tokenizer, "--chat-template")
    return tokenizer


def _spec(kind: str, place: str, identity: str, template: str, settings: Benchmarking, max_length: int) -> ModelSpec:
    return ModelSpec(
        kind=kind,
        place=place,
        identity=identity,
        template=template,
        protocol=settings.protocol,
        max_length=_length(settings.protocol, settings.max_length, max_length),
        dtype=settings.compute_dtype,
    )


def _length(protocol: str, asked: int | None, own: int) -> int:
    # The official code always cuts at 2,048.
    return asked or (DEFAULT_LENGTH if protocol == "official" else own)


def _folder(name: str, revision: str) -> Path:
    folder = folder_of(name, revision)
    return merged_model(folder) if is_adapter(folder) else folder


def _config(folder: Path, name: str) -> dict[str, Any]:
    try:
        return dict(read_json(folder / "config.json"))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{name} holds no model (config.json: {error}). Pass --model with a model's folder.") from error

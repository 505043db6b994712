"""`jobs/push.py`: a SARM with its model card, in a folder or on the hub, as transformers and `sarm.load` read it."""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sarm import __version__
from sarm.contracts.folders import CORPUS_FOLDER, HEAD_EDIT, PAIRS_FOLDER, SAE_FOLDER, SARM_FOLDER, Folders
from sarm.contracts.manifest import MANIFEST, sha256_of, write_atomically
from sarm.contracts.untrusted import read_json
from sarm.data.formats.feature_edit import load_edit
from sarm.data.formats.sarm_folder import carry_edit_, load_sarm, save_sarm
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.engine.terminal import say
from sarm.passes.models import check_tokenizer, sarm_settings, sarm_spec, with_edit
from sarm.report.model_card import Made, model_card
from sarm.settings.checks import UserError
from sarm.settings.push import Push

CARD, UNFINISHED = "README.md", ".sarm-push-unfinished"
# What loaders take for weights: those of an earlier push with other shards would be read in the place of these.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def push(settings: Push) -> Path | str:
    """Write the model and its card; returns the folder, or the address on the hub.

    An edit of features is then among the model's weights. Raises UserError for a folder that holds no whole SARM, for an edit of another
    model, for a target that holds something else, and a hub that refuses.
    """
    source = settings.model
    if not source.is_dir():
        raise UserError(f"no model folder {source}. Pass --model with a folder that holds a SARM.")
    sarm_settings(source)
    spec = with_edit(sarm_spec(source), settings.edit)
    check_tokenizer(spec)
    if settings.to is not None:
        _check_target(settings.to, source)
        _write(settings, spec.edit, settings.to, settings.to.name)
        say(f"pushed {source} to {settings.to}")
        return settings.to
    with tempfile.TemporaryDirectory(prefix="sarm-push-") as folder:
        _write(settings, spec.edit, Path(folder), settings.hub)
        address = _upload(settings, Path(folder))
    say(f"pushed {source} to {address}")
    return address


def made_of(source: Path) -> Made:
    """What is known of a model: its config, and the data and report of the run that it, or the model that was edited, lies in."""
    edit = _json(source / HEAD_EDIT)
    trained = Path(str(edit["source"])) if edit.get("source") else source
    run = Folders(trained.parent)
    known = _json(trained / MANIFEST)
    # Data and figures of a model that was here before, or that lies here as well, would be worse than none.
    pairs = _read_for(known, PAIRS_FOLDER, run.pairs)
    sae = _read_for(known, SAE_FOLDER, run.sae)
    corpus = _read_for(_read_for(sae, "activations/text", run.text_activations), CORPUS_FOLDER, run.corpus)
    evaluation = _json(run.evaluation / MANIFEST)
    is_of_this = known and sha256_of(trained / MANIFEST) == (evaluation.get("inputs") or {}).get(SARM_FOLDER)
    report = _json(run.out / "report.json") if is_of_this else {}
    figures = (known.get("counts") or {}).get("figures") or {}
    config = read_json(source / "config.json")
    return Made(
        config={**config, "provenance": _told(config.get("provenance") or {})},
        pairs=[_named(one) for one in (pairs.get("config") or {}).get("pairs") or ()],
        texts=[_named(one) for one in (corpus.get("config") or {}).get("texts") or ()],
        num_pairs=figures.get("num_pairs"),
        accuracies=[row for row in report.get("accuracies") or () if row.get("accuracy") is not None],
        num_heldout=report.get("num_heldout_pairs"),
        edited=len(edit.get("weights") or ()),
    )


def _read_for(manifest: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """The manifest of a folder that another was made from, by the name that the other gives it; nothing if it was made from another folder."""
    path = folder / MANIFEST
    is_it = path.is_file() and sha256_of(path) == (manifest.get("inputs") or {}).get(name)
    return _json(path) if is_it else {}


def _told(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of a model's making, without where its base model lay on this machine."""
    base = str(provenance.get("model") or "")
    is_here = base.startswith(("/", "~", ".")) or Path(base).is_dir()
    return {**provenance, "model": Path(base).name} if base and is_here else dict(provenance)


def _named(source: str) -> str:
    """A source as others may know it: of a file of this machine its name alone."""
    return source if re.match(r"[a-z]+:", source) else Path(source).name


def _check_target(target: Path, source: Path) -> None:
    if target.resolve() == source.resolve():
        raise UserError(f"{target} is the model itself. Pass another --to.")
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not _is_ours(target))):
        raise UserError(f"{target} holds something else than a pushed SARM. Pass another --to.")


def _is_ours(folder: Path) -> bool:
    card = folder / CARD
    has_card = card.is_file() and "Written by `sarm push`" in card.read_text(encoding="utf-8", errors="replace")
    return has_card or (folder / UNFINISHED).is_file()


def _write(settings: Push, edit: str, target: Path, name: str) -> None:
    """The model, its tokenizer and code as this version writes them, and the card last; what a folder of before lacked it has then."""
    # Read before anything is written: what cannot be read leaves the push of before as it is.
    chat = load_chat_tokenizer(sarm_settings(settings.model), settings.model)
    model = load_sarm(settings.model)
    model.config.provenance = _told(model.config.provenance)
    if edit:
        carry_edit_(model, load_edit(Path(edit)))
    made = made_of(settings.model)._replace(feature_edits=model.config.feature_edits)
    card = model_card(made, name, settings.licence, __version__)
    target.mkdir(parents=True, exist_ok=True)
    # Where this ends too early, the folder is known as ours.
    write_atomically(target / UNFINISHED, "")
    for path in (path for pattern in _WEIGHTS for path in target.glob(pattern)):
        path.unlink()
    save_sarm(model, chat, target)
    write_atomically(target / CARD, card)
    (target / UNFINISHED).unlink()


def _upload(settings: Push, folder: Path) -> str:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        # None leaves a new repository to the owner's default; of one that is there the hub ignores this.
        address = str(api.create_repo(settings.hub, private=settings.private or None, exist_ok=True))
        if settings.private and not api.repo_info(settings.hub).private:
            raise UserError(f"{settings.hub} is there already, and everybody sees it. Make it private on the hub, pass another --hub, or leave --private out.")  # fmt: skip
        api.upload_folder(
            repo_id=settings.hub,
            folder_path=folder,
            commit_message=f"sarm push, version {__version__}",
            delete_patterns=list(_WEIGHTS),
        )
    except UserError:
        raise
    # The library and the network beneath it raise dozens of kinds; all mean the same to the user.
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise UserError(f"the hub did not take {settings.hub} ({type(error).__name__}: {reason}). Look at `hf auth whoami`, or pass --to FOLDER.") from error  # fmt: skip
    return address


def _json(path: Path) -> dict[str, Any]:
    """A file that a card can do without; nothing where it is not there or cannot be read."""
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError, json.JSONDecodeError):
        return {}

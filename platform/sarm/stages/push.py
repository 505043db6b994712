"""`jobs/push.py`: a SARM with its model card, in a folder or on the hub, as transformers and `sarm.load` read it."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from sarm import __version__
from sarm.contracts.folders import SARM_FOLDER
from sarm.contracts.manifest import MANIFEST, sha256_of, write_atomically
from sarm.contracts.untrusted import read_json
from sarm.data.formats.sarm_folder import load_sarm, save_sarm
from sarm.data.tokens.chat import load_chat_tokenizer
from sarm.engine.terminal import say
from sarm.passes.models import check_tokenizer, sarm_settings, sarm_spec
from sarm.report.model_card import Made, model_card
from sarm.settings.checks import UserError
from sarm.settings.push import Push
from sarm.stages.edited_model import EDIT

CARD = "README.md"


def push(settings: Push) -> Path | str:
    """Write the model and its card; returns the folder, or the address on the hub.

    Raises UserError for a folder that holds no whole SARM, a target that holds something else, and a hub that refuses.
    """
    source = settings.model
    if not source.is_dir():
        raise UserError(f"no model folder {source}. Pass --model with a folder that holds a SARM.")
    sarm_settings(source)
    check_tokenizer(sarm_spec(source))
    if settings.to is not None:
        _check_target(settings.to, source)
        _write(settings, settings.to, settings.to.name)
        say(f"pushed {source} to {settings.to}")
        return settings.to
    with tempfile.TemporaryDirectory(prefix="sarm-push-") as folder:
        _write(settings, Path(folder), settings.hub)
        address = _upload(settings, Path(folder))
    say(f"pushed {source} to {address}")
    return address


def made_of(source: Path) -> Made:
    """What is known of a model: its config, and the data and report of the run that it, or the model that was edited, lies in."""
    edit = _json(source / EDIT)
    trained = Path(str(edit["source"])) if edit.get("source") else source
    run = trained.parent
    pairs, corpus, evaluation = (_json(run / name / MANIFEST) for name in ("pairs", "corpus", "evaluation"))
    # Figures of a model that was here before would be worse than none.
    known = trained / MANIFEST
    is_of_this = known.is_file() and sha256_of(known) == (evaluation.get("inputs") or {}).get(SARM_FOLDER)
    report = _json(run / "report.json") if is_of_this else {}
    figures = (_json(known).get("counts") or {}).get("figures") or {}
    return Made(
        config=read_json(source / "config.json"),
        pairs=[_named(one) for one in (pairs.get("config") or {}).get("pairs") or ()],
        texts=[_named(one) for one in (corpus.get("config") or {}).get("texts") or ()],
        num_pairs=figures.get("num_pairs"),
        accuracies=[row for row in report.get("accuracies") or () if row.get("accuracy") is not None],
        num_heldout=report.get("num_heldout_pairs"),
        edited=len(edit.get("weights") or ()),
    )


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
    return card.is_file() and "Written by `sarm push`" in card.read_text(encoding="utf-8", errors="replace")


def _write(settings: Push, target: Path, name: str) -> None:
    """The model, its tokenizer and code as this version writes them, and the card last; what a folder of before lacked it has then."""
    target.mkdir(parents=True, exist_ok=True)
    # Of an earlier push with other shards.
    for path in (*target.glob("*.safetensors"), *target.glob("*.safetensors.index.json")):
        path.unlink()
    chat = load_chat_tokenizer(sarm_settings(settings.model), settings.model)
    save_sarm(load_sarm(settings.model), chat, target)
    write_atomically(target / CARD, model_card(made_of(settings.model), name, settings.licence, __version__))


def _upload(settings: Push, folder: Path) -> str:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(settings.hub, private=settings.private, exist_ok=True))
        api.upload_folder(repo_id=settings.hub, folder_path=folder, commit_message=f"sarm push, version {__version__}")
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

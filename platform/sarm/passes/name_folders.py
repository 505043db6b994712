"""Which folders name the features of a reward model: its contexts and explanations, those that are given or those beside it."""

from pathlib import Path
from typing import NamedTuple

from sarm.contracts.folders import CONTEXTS_FOLDER, EXPLANATIONS_FOLDER, HEAD_EDIT
from sarm.contracts.manifest import MANIFEST, read_manifest
from sarm.contracts.untrusted import read_json
from sarm.passes.models import hash_of_folder
from sarm.settings.checks import UserError


class NameFolders(NamedTuple):
    """Folders of contexts/v1 and explanations/v1; None where there is none."""

    contexts: Path | None
    explanations: Path | None


def name_folders(model: Path, contexts: Path | None = None, explanations: Path | None = None) -> NameFolders:
    """The folders that are given, else the finished ones beside the model.

    Those beside it that are of another model are passed over, since several models may lie there. A model whose head was edited has the
    features of the model that it was made from. Raises UserError for folders that are given and are unfinished, torn or of another model.
    """
    beside = model.parent / "contexts", model.parent / "explanations"
    if contexts is None and explanations is None and not any((one / MANIFEST).exists() for one in beside):
        return NameFolders(None, None)
    own = {hash_of_folder(one) for one in (model, _edited_from(model)) if one is not None}
    return NameFolders(
        _chosen(contexts, beside[0], CONTEXTS_FOLDER, own), _chosen(explanations, beside[1], EXPLANATIONS_FOLDER, own)
    )


def _chosen(given: Path | None, beside: Path, schema: str, own: set[str]) -> Path | None:
    folder = given or beside
    if given is None and not (beside / MANIFEST).exists():
        return None
    # Explanations of before do not say it.
    model = str(read_manifest(folder, schema).counts.get("model") or "")
    if model in own or (not model and schema == EXPLANATIONS_FOLDER):
        return folder
    if given is None:
        return None
    what, expected = schema.partition("/")[0], " or ".join(sorted(one[:12] for one in own))
    raise UserError(f"{folder} holds {what} of another model ({model[:12] or 'unknown'}, expected {expected}). Pass the --{what} of this one, or leave it out.")  # fmt: skip


def _edited_from(model: Path) -> Path | None:
    """The model whose head was edited to make this one, if it is still there."""
    try:
        source = Path(str(read_json(model / HEAD_EDIT)["source"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return source if source.is_dir() else None

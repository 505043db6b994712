"""SAEs by name: `hf:OWNER/NAME[@REVISION][/FOLDER or FILE]` of the Hugging Face hub, fetched once into its cache.

Suites hold hundreds of SAEs in one repository, so only the named folder is fetched, with the configs above it that say whose SAE it is.
"""

import re
from pathlib import Path, PurePosixPath

from sarm.settings.checks import UserError

_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?")


def is_named(source: Path) -> bool:
    """Whether a source is a name and no path."""
    return source.as_posix().startswith("hf:")


def fetch_sae(source: Path) -> Path:
    """The local folder or file of a named SAE.

    Raises UserError for a name that cannot be read, or one that the hub does not give.
    """
    match = _NAME.fullmatch(source.as_posix())
    if match is None or ".." in PurePosixPath(match[3] or "").parts:
        raise UserError(f"{source} is no name of an SAE. Pass hf:OWNER/NAME/FOLDER, or a folder.")
    repository, revision, inside = match[1], match[2] or "main", (match[3] or "").strip("/")
    # Above: sparsify says its model in a config of the whole repository.
    above = [f"{parent}/config.json".removeprefix("./") for parent in PurePosixPath(inside).parents] if inside else []
    wanted = {"allow_patterns": [inside, f"{inside}/*", *above]} if inside else {"ignore_patterns": ["*/*"]}
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(repository, revision=revision, **wanted)) / inside
    # The library and the network beneath it raise dozens of kinds; all mean the same to the user.
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise UserError(f"{source} cannot be fetched ({type(error).__name__}: {reason}). Pass another name, or a folder.") from error  # fmt: skip
    if not found.exists():
        raise UserError(f"{repository} holds no {inside}. Pass the folder of one of its SAEs, as its page lists them.")
    return found

"""Where a source is: a file, a pattern, a folder of files, a data set that was saved to disk, or one of the Hugging Face hub."""

import glob
import json
import re
from collections.abc import Collection
from pathlib import Path

from sarm.data.sources.files import FORMATS, extension_of, format_of, is_data
from sarm.data.sources.hub import is_data_set, parse_data_set
from sarm.settings.checks import UserError

_KINDS = ".jsonl, .json, .csv, .tsv, .txt (plain, .gz, .bz2, .xz, .zst, .lz4), .parquet, .arrow, .tar, .zip"
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


def source_files(spec: str, made_in_code: Collection[str]) -> list[Path]:
    """The files of a path, pattern or folder, sorted; empty for `hf:` and for the sources in `made_in_code`.

    Raises UserError for a missing file, a pattern without match, an unknown extension or an unknown scheme.
    """
    if spec in made_in_code:
        return []
    if is_data_set(spec):
        parse_data_set(spec)
        return []
    path = Path(spec).expanduser()
    # Two letters at least: `C:\data.jsonl` has a drive, not a scheme.
    if not path.exists() and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", spec):
        raise UserError(
            f"unknown source {spec}. Pass a path, pattern or folder of {_KINDS}, hf:NAME[:CONFIG][:SPLIT] or one of {', '.join(made_in_code)}."
        )
    if path.is_dir():
        return _folder_files(path)
    if path.exists():
        files = [path]
    elif files := [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]:
        pass
    elif glob.has_magic(spec):
        raise UserError(f"no file matches {spec}. Check the pattern; quote it so that the shell leaves it alone.")
    else:
        raise UserError(f"no file {spec}. {_neighbours(path, spec)}")
    for file in files:
        if not extension_of(file.name):
            raise UserError(f"{file} has an unknown extension. The known ones are {_KINDS}.")
    return files


def kind_of(spec: str, files: Collection[Path]) -> str:
    """What a source is taken for, in a few words."""
    if not files:
        return "Hugging Face data set" if is_data_set(spec) else "made in code"
    kinds = ", ".join(sorted({format_of(file).kind for file in files}))
    number = f"{len(files):,} file{'s' * (len(files) > 1)}"
    if not Path(spec).expanduser().is_dir():
        return f"{kinds}, {number}"
    is_saved = any((file.parent / _SAVED).is_file() for file in files)
    return f"{'data set saved to disk' if is_saved else 'folder'}, {kinds}, {number}"


def _folder_files(folder: Path) -> list[Path]:
    """The files of a folder, of the one kind that most of its bytes are of; of a data set that was saved, those that it names."""
    if (folder / _SAVED_SPLITS).is_file():
        splits = sorted(path.name for path in folder.iterdir() if (path / _SAVED).is_file())
        if "train" not in splits:
            raise UserError(
                f"{folder} has no split train. Pass {' or '.join(str(folder / name) for name in splits[:5])}."
            )
        folder = folder / "train"
    if (folder / _SAVED).is_file():
        return _saved_files(folder)
    by_kind: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and is_data(path.name):
            by_kind.setdefault(format_of(path).kind, []).append(path)
    if not by_kind:
        raise UserError(f"{folder} is a folder without data files. Pass one with {_KINDS}.")
    return max(by_kind.values(), key=lambda files: sum(file.stat().st_size for file in files))


def _saved_files(folder: Path) -> list[Path]:
    try:
        names = [one["filename"] for one in json.loads((folder / _SAVED).read_text())["_data_files"]]
        files = [folder / name for name in names if Path(name).name == name and (folder / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / _SAVED} cannot be read. Save the data set again.") from error
    if not names or len(files) < len(names):
        raise UserError(f"{folder} lacks files that its {_SAVED} names. Copy it again.")
    return files


def _neighbours(path: Path, spec: str) -> str:
    """What a user who mistyped a path may have meant."""
    if not path.parent.is_dir():
        meant = f" Did you mean hf:{spec}?" if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not extension_of(spec) else ""
        return f"There is no folder {path.parent} either.{meant}"
    names = sorted(p.name for p in path.parent.iterdir() if p.name.endswith(tuple(FORMATS)))
    return f"{path.parent} holds {', '.join(names[:5]) or 'no data file'}{' ...' if len(names) > 5 else ''}."

"""Where relative paths of settings stand.

A job that `ray job submit --working-dir` hands to a cluster starts inside a package that Ray has unpacked in its temporary folder and
deletes when it likes. What such a job is asked to write to `outputs/demo` goes to a folder of its own, the results root, as `demo`, and what it is asked to read of `outputs/demo` is found there.
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

# In the environment: the results root. It counts for every job, submitted or not.
VARIABLE = "SARM_RESULTS"
DEFAULT = "~/sarm-outputs"
# Metadata of every setting that names what is read, or what is written; `place_paths` goes by it.
READ, WRITTEN = {"path": "read"}, {"path": "written"}
# A text may name a path behind a name: `rm_bench=FILE`, `HOST=file:FILE`.
_PATH_IN_TEXT = re.compile(r"((?:[^=]*=)?(?:file:)?)(outputs/.+)", re.DOTALL)
_PACKAGES = ("runtime_resources", "working_dir_files")
# What Ray gives to the process that it starts for a submitted job; the value is the name of the constant in Ray as well.
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def submitted_as() -> str:
    """The id under which Ray runs this process as a submitted job; '' if it does not."""
    try:
        found: Any = json.loads(os.environ.get(_JOB, "{}"))
        return str(found["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return ""


def is_in_package(folder: Path) -> bool:
    """Whether the folder belongs to a working directory that Ray has unpacked."""
    return _PACKAGES in zip(folder.parts, folder.parts[1:], strict=False)


def results_root() -> Path | None:
    """The folder that stands for `outputs`; None where that is the one in the current directory."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser().absolute()
    return Path(DEFAULT).expanduser() if is_in_package(Path.cwd()) else None


def absolute_out(out: Path) -> Path:
    """The output folder, absolute: relative ones stand under the results root where there is one, else in the current directory."""
    out, root = out.expanduser(), results_root()
    if root is None or out.is_absolute():
        return out.absolute()
    return root.joinpath(*(out.parts[1:] if out.parts[0] == "outputs" and len(out.parts) > 1 else out.parts))


def absolute_in(path: Path) -> Path:
    """Something to read, absolute: `outputs` is the results root where there is one, and what lies in it is where `absolute_out` puts it."""
    path, root = path.expanduser(), results_root()
    return path.absolute() if root is None or path.parts[:1] != ("outputs",) else root.joinpath(*path.parts[1:])


def text_in(text: str) -> str:
    """A text that may name something to read, e.g. `hf:NAME` or `NAME=FILE`: as it is, but a path in `outputs` is made absolute where there is a results root."""
    match = _PATH_IN_TEXT.fullmatch(text)
    if match is None or results_root() is None:
        return text
    return f"{match[1]}{absolute_in(Path(match[2]))}"


def place_paths(settings: Any) -> None:
    """Let the fields of a frozen dataclass that are marked READ or WRITTEN say where they stand; called as it is made.

    Ray and its workers change directories, so paths are absolute from here on. Texts stay as they were typed where they can,
    because stages are identified by them.
    """
    for field in dataclasses.fields(settings):
        if kind := field.metadata.get("path"):
            object.__setattr__(settings, field.name, _placed(getattr(settings, field.name), kind))


def _placed(value: Any, kind: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_placed(item, kind) for item in value)
    if isinstance(value, Path):
        return absolute_in(value) if kind == "read" else absolute_out(value)
    return text_in(value) if isinstance(value, str) else value

"""Where a relative output folder stands.

A job that `ray job submit --working-dir` hands to a cluster starts inside a package that Ray has unpacked in its temporary folder and
deletes when it likes. What such a job is asked to write to `outputs/demo` goes to a folder of its own, the results root, as `demo`.
"""

import json
import os
from pathlib import Path
from typing import Any

# In the environment: the results root. It counts for every job, submitted or not.
VARIABLE = "SARM_RESULTS"
DEFAULT = "~/sarm-outputs"
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
    """Something to read, absolute: what lies in `outputs` is looked for where `absolute_out` puts it."""
    path = path.expanduser()
    return absolute_out(path) if path.parts[:1] == ("outputs",) and len(path.parts) > 1 else path.absolute()

"""The name of a job's work, and how it is handed to a cluster under that name: a second submit finds the first."""

import dataclasses
import glob
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sarm.config import UserError
from sarm.manifest import MANIFEST, sha256_of


def submission_id(script: str, config: Any) -> str:
    """A name that depends on the job, its settings and what they point to: the second submit of the same work has the same."""
    name = Path(script).stem.replace("_", "-")
    settings = dataclasses.asdict(config)
    # Where it runs and who is told does not make it another job; where it writes does.
    settings["run"] = {"out": config.run.out, "seed": config.run.seed}
    digest = hashlib.sha256(f"{name}\x1f{json.dumps(settings, default=str, sort_keys=True)}".encode())
    for text in _texts(settings):
        for path in sorted(glob.glob(text, recursive=True))[:10_000] if glob.has_magic(text) else [text]:
            digest.update(f"\x1f{path}\x1f{_content_of(Path(path))}".encode())
    return f"{name}-{digest.hexdigest()[:12]}"


def submit(script: str, arguments: Sequence[str], config: Any) -> None:
    """Hand the job, supervised, to the Ray cluster whose dashboard is at `run.submit`, or find it there under its name.

    Raises UserError if the cluster cannot be reached.
    """
    from ray.dashboard.modules.dashboard_sdk import parse_runtime_env_args
    from ray.job_submission import JobStatus, JobSubmissionClient

    address, root, own_id = config.run.submit, Path(script).absolute().parent.parent, submission_id(script, config)
    runtime_env = parse_runtime_env_args(runtime_env=str(root / "cluster" / "runtime_env.yaml"), working_dir=str(root))
    try:
        client = JobSubmissionClient(address)
        known = {job.submission_id or "": job.status for job in client.list_jobs()}
        # Ray gives a name once; what ended, well or not, may be asked for again.
        tries = [name for name in known if re.fullmatch(rf"{own_id}(-\d+)?", name)]
        running = [name for name in tries if known[name] in (JobStatus.PENDING, JobStatus.RUNNING)]
        name = running[0] if running else f"{own_id}-{len(tries) + 1}" if tries else own_id
        if not running:
            entry = [
                "python",
                str(Path(script).absolute().relative_to(root)),
                *without_flag(arguments, "--submit", has_value=True),
                "--supervise",
            ]
            client.submit_job(entrypoint=shlex.join(entry), submission_id=name, runtime_env=runtime_env)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"no job can be submitted to {address}: {str(error).splitlines()[0]}. Pass --submit with the dashboard's address."
        ) from error
    print(
        f"{name} {'is running already' if running else 'is submitted'}: ray job logs --address {address} --follow {name}"
    )


def without_flag(arguments: Sequence[str], flag: str, *, has_value: bool = False) -> list[str]:
    """A command line without a flag (and its value)."""
    kept: list[str] = []
    skipped = False
    for argument in arguments:
        if not skipped and argument.partition("=")[0] != flag:
            kept.append(argument)
        skipped = has_value and argument == flag
    return kept


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            # Where results go is a setting, not an input.
            if key != "out":
                yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str | Path):
        yield str(value)


def _content_of(path: Path) -> str:
    """What tells a file or folder from one with the same name: its manifest's hash, else size and time."""
    try:
        if (path / MANIFEST).is_file():
            return sha256_of(path / MANIFEST)
        found = path.stat()
        return f"{found.st_size} {found.st_mtime_ns}"
    except (OSError, ValueError):
        return ""

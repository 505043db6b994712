"""The name of a job's work, and how it is handed to a cluster under that name: a second submit finds the first."""

import dataclasses
import glob
import hashlib
import http.client
import json
import logging
import os
import re
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sarm.contracts.manifest import MANIFEST, sha256_of
from sarm.engine.results import MLFLOW, RESULTS
from sarm.engine.stopping import SUBMITTED_TO, without_flag
from sarm.settings.checks import UserError
from sarm.settings.results_root import VARIABLE

_SECONDS_FOR_AN_ANSWER = 10.0
# A cluster that is new to the working directory unpacks it first; one without room makes the job wait.
_SECONDS_FOR_A_START = 120.0


def submission_id(script: str, config: Any) -> str:
    """A name that depends on the job, its settings and what they point to: the second submit of the same work has the same."""
    name = Path(script).stem.replace("_", "-")
    settings = dataclasses.asdict(config)
    # Two starts that differ only in where they run, or in who is told, are the same job. Another output folder makes another job.
    settings["run"] = {"out": config.run.out, "seed": config.run.seed}
    digest = hashlib.sha256(f"{name}\x1f{json.dumps(settings, default=str, sort_keys=True)}".encode())
    for text in _texts(settings):
        for path in sorted(glob.glob(text, recursive=True))[:10_000] if glob.has_magic(text) else [text]:
            digest.update(f"\x1f{path}\x1f{_content_of(Path(path))}".encode())
    return f"{name}-{digest.hexdigest()[:12]}"


def submit(script: str, arguments: Sequence[str], config: Any) -> None:
    """Hand the job, supervised, to the Ray cluster whose dashboard is at `run.submit`, or find it there under its name.

    Returns once the job has said where its results go. Raises UserError if the cluster cannot be used, the job is refused there, or there is
    no checkout to upload.
    """
    if not Path(script).is_file():
        raise UserError(
            f"--submit uploads a checkout of this project to the cluster, and there is no {script} here. Run the command in the folder of one."
        )
    address, root, own_id = (
        config.run.submit.rstrip("/"),
        Path(script).absolute().parent.parent,
        submission_id(script, config),
    )
    check_dashboard(address)
    from ray.dashboard.modules.dashboard_sdk import parse_runtime_env_args
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobStatus, JobSubmissionClient

    runtime_env = parse_runtime_env_args(runtime_env=str(root / "cluster" / "runtime_env.yaml"), working_dir=str(root))
    place = {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}
    runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **place, SUBMITTED_TO: address}
    # Ray prints four lines about what it packs and what it leaves out.
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        client = JobSubmissionClient(address)
        known = {job.submission_id or "": job.status for job in client.list_jobs()}
        # Ray accepts a name once. A job that has ended, well or not, may be submitted again.
        tries = [name for name in known if re.fullmatch(rf"{own_id}(-\d+)?", name)]
        running = [name for name in tries if known[name] in (JobStatus.PENDING, JobStatus.RUNNING)]
        name = running[0] if running else f"{own_id}-{len(tries) + 1}" if tries else own_id
        if not running:
            client.submit_job(entrypoint=entrypoint(script, arguments), submission_id=name, runtime_env=runtime_env)
        print(
            f"{name} {'is running already' if running else 'is submitted'}: ray job logs --address {address} --follow {name}",
            flush=True,
        )
        follow(client, name)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"no job can be submitted to {address}: {str(error).splitlines()[0]}.") from error


def entrypoint(script: str, arguments: Sequence[str]) -> str:
    """The command that the cluster runs for this one: supervised, whether or not it says so itself."""
    own = without_flag(without_flag(arguments, "--submit", has_value=True), "--supervise")
    return shlex.join(["python", "/".join(Path(script).absolute().parts[-2:]), *own, "--supervise"])


def check_dashboard(address: str) -> None:
    """Raise UserError unless a Ray dashboard with this Ray's version answers at the address and accepts the token of this process."""
    import ray
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray.exceptions import AuthenticationError

    if not re.match(r"https?://[^/]+$", address):
        raise UserError(f"--submit takes the address of a Ray dashboard, such as http://HOST:8265, got {address!r}.")
    token = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token."
    try:
        request = urllib.request.Request(f"{address}/api/version", headers=get_auth_headers_if_auth_enabled({}))
        with urllib.request.urlopen(request, timeout=_SECONDS_FOR_AN_ANSWER) as answer:
            version = str(json.loads(answer.read(10_000))["ray_version"])
    except AuthenticationError as error:
        raise UserError(f"the cluster at {address} was not asked: this process has no token. {token}") from error
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(f"the cluster at {address} does not accept the token of this process. {token}") from error
        raise UserError(
            f"what answers at {address} is no Ray dashboard (HTTP {error.code}). Pass its address to --submit."
        ) from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"no Ray cluster answers at {address}: {reason}. Pass the dashboard's address to --submit, or leave it out."
        ) from error
    except (ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        raise UserError(f"what answers at {address} is no Ray dashboard. Pass its address to --submit.") from error
    if version != ray.__version__:
        raise UserError(
            f"the cluster at {address} runs Ray {version}, and this project Ray {ray.__version__}. Use a cluster that has the versions of requirements.lock."
        )


def follow(client: Any, name: str, seconds: float = _SECONDS_FOR_A_START) -> None:
    """Wait until the job says where its results go, and say it here; after `seconds`, say that it has not.

    An error in the log of a job that goes on is one of an earlier start, from which it was started again.
    Raises UserError with the job's own line if it ended before it said that.
    """
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        is_over = client.get_job_status(name).is_terminal()
        log = client.get_job_logs(name).splitlines()
        if any(line.startswith(RESULTS) for line in log):
            # Every start of the job prints this line, and its end.
            print("\n".join(dict.fromkeys(line for line in log if line.startswith((RESULTS, MLFLOW)))), flush=True)
            return
        if is_over:
            refused = [line.removeprefix("error: ") for line in log if line.startswith("error: ")]
            message = f"{name} ended before it began: {client.get_job_info(name).message}"[:500].splitlines()[0]
            raise UserError(refused[-1] if refused else message)
        time.sleep(0.5)
    print(
        f"{name} has not begun within {seconds:.0f} s; the cluster may have no room for it. The line above shows its log.",
        flush=True,
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            # The output folder is a setting and not an input.
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

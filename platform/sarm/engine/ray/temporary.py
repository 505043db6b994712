"""What a local cluster needs of the machine: a short folder for its sockets, and a place for its token.

The system limits the paths of sockets to 107 bytes, and job schedulers give long temporary folders. Ray keeps its token in the home.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sarm.settings.checks import UserError

# What Ray puts behind its folder: session_2026-01-31_23-59-59_999999_9999999/sockets/plasma_store, with room for a longer name.
_BEHIND, _LIMIT = 72, 107
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


@contextlib.contextmanager
def short_folder() -> Iterator[str | None]:
    """A short folder for Ray while the body runs, where Ray's own would be too long; None where that will do.

    Raises UserError if no short folder can be written.
    """
    own = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if len(os.fsencode(own)) + len("/ray/") + _BEHIND <= _LIMIT:
        yield None
        return
    folder = _made()
    if folder is None:
        raise UserError(f"the temporary folder {own} is too long for Ray's sockets, and none of {', '.join(_SHORT)} can be written. Set RAY_TMPDIR to a path of at most 30 characters.")  # fmt: skip
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def token_without_home() -> Iterator[None]:
    """A token of this cluster's own in the environment while the body runs, where Ray would have to write one and the home cannot be written."""
    named = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    if named or _home_takes_token():
        yield
        return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        yield
    finally:
        del os.environ["RAY_AUTH_TOKEN"]


def _home_takes_token() -> bool:
    folder = Path("~/.ray").expanduser()
    if (folder / "auth_token").is_file():
        return True
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _made() -> str | None:
    for place in _SHORT:
        with contextlib.suppress(OSError):
            return tempfile.mkdtemp(prefix="sarm-", dir=Path(place))
    return None

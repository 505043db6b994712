"""The user's cache folder: things that are fetched or built once and read by every later run."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from sarm.settings.checks import UserError

FINISHED = ".finished"


def cache_root() -> Path:
    """`$SARM_CACHE`, else `~/.cache/sarm`."""
    return Path(os.environ.get("SARM_CACHE") or "~/.cache/sarm").expanduser().absolute()


def is_cached(name: str) -> bool:
    """Whether `build_once(name, ...)` would return at once."""
    return (cache_root() / name / FINISHED).exists()


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The cached folder `name`; where there is none yet, `build(folder)` fills an empty one that then takes its place.

    A build that fails or is killed leaves nothing under `name`, so the next call starts over.
    Raises UserError if the cache cannot be written, and whatever `build` raises.
    """
    final = cache_root() / name
    if is_cached(name):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{final.name}-", dir=final.parent)
    except OSError as error:
        raise UserError(
            f"the cache {cache_root()} cannot be written ({error.strerror}). Set SARM_CACHE to a folder that can."
        ) from error
    with scratch as folder:
        part = Path(folder) / "part"
        part.mkdir()
        build(part)
        (part / FINISHED).touch()
        try:
            part.rename(final)
        except OSError as error:
            # Another process may have finished the same build meanwhile; then its folder is as good as ours.
            if not is_cached(name):
                raise UserError(f"{final} is in the way of the cache. Delete it, or set SARM_CACHE.") from error
    return final

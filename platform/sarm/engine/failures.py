"""What to do about an error: the user changes something, the command is run again, or the program has a bug; and the exit status of each."""

import errno
from collections.abc import Iterator

from sarm.settings.checks import UserError

DONE, USER, AGAIN = 0, 2, 75
# Libraries and names of errors, looked for among an error's causes. Names are compared, so that no library is imported for a comparison.
_TRANSIENT = {
    "builtins.ConnectionError", "builtins.TimeoutError", "ray.ActorDiedError", "ray.ActorUnavailableError", "ray.NodeDiedError",
    "ray.WorkerCrashedError", "ray.ObjectLostError", "ray.OutOfMemoryError", "ray.RaySystemError", "ray.LocalRayletDiedError",
    "ray.WorkerHealthCheckFailedError", "torch.DistError", "sarm.StalledError",
}  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT)


def status_of(error: BaseException) -> int | None:
    """The exit status that says what to do about an error: 2 for a full disk, 75 if another try may succeed, None for a bug."""
    for cause in causes_of(error):
        if is_full_disk(cause):
            return USER
        kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(cause).__mro__}
        # The reader of the output has gone, and another try does not bring it back.
        if _TRANSIENT & kinds and not isinstance(cause, BrokenPipeError):
            return AGAIN
    return None


def is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _FULL


def mistake_in(error: BaseException) -> UserError | None:
    """What the user can mend beneath Ray's wrappers, as the line that it was raised with; None if nothing there says so."""
    for cause in causes_of(error):
        if isinstance(cause, UserError):
            said = str(cause.args[0]) if cause.args else str(cause)
            # Ray's own class for it is one too, and its text is a whole traceback; Ray Data writes advice of its own behind.
            if not said.startswith("\x1b"):
                return UserError(said.strip().splitlines()[0])
    return None


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """The error, and what Python and Ray say it came from."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop()
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        waiting += [cause.__cause__, getattr(cause, "cause", None)]

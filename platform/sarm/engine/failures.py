"""What an error asks for: something of the user's to mend, another try, or a look at the program. And the exit statuses that say so."""

import errno
from collections.abc import Iterator

DONE, USER, AGAIN = 0, 2, 75
# Library and name of errors, in any of an error's causes: most failures need none of the libraries.
_TRANSIENT = {
    "builtins.ConnectionError", "builtins.TimeoutError", "ray.ActorDiedError", "ray.ActorUnavailableError", "ray.NodeDiedError",
    "ray.WorkerCrashedError", "ray.ObjectLostError", "ray.OutOfMemoryError", "ray.RaySystemError", "ray.LocalRayletDiedError",
    "ray.WorkerHealthCheckFailedError", "torch.DistError",
}  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT)


def status_of(error: BaseException) -> int | None:
    """The exit status that says what to do about an error: 2 for a full disk, 75 for what another try may find gone, None for a bug."""
    for cause in causes_of(error):
        if is_full_disk(cause):
            return USER
        kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(cause).__mro__}
        # Whoever read the output has gone: no other try brings them back.
        if _TRANSIENT & kinds and not isinstance(cause, BrokenPipeError):
            return AGAIN
    return None


def is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _FULL


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

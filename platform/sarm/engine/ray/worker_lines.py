"""What the workers of a cluster that this process started print, as if it had printed it: without the name of the process before each line, and
without what Ray and progress bars say of themselves. All of it is in Ray's logs. A job on a cluster of others keeps Ray's way.
"""

import re
from collections.abc import Mapping
from typing import Any

# How Ray's own handler is called, which this one takes the place of, and which Ray removes by this name.
_HANDLER = "ray_print_logs"
_NOISE = re.compile(
    r"Requesting resources: "
    r"|(?:Attempting to start|Started) training worker group of size "
    r"|- \(ip=\S+, pid=\d+\) world_rank="
    r"|Setting up process group for: "
    # A progress bar, whose every step would be a line here.
    r"|\d%\|.*\| *\d+/\d+ "
)


def show_plainly() -> None:
    """Show what workers print without names and noise from now on, until Ray is shut down."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    dispatcher.remove_handler(_HANDLER)
    dispatcher.add_handler(_HANDLER, _show)


def is_noise(line: str) -> bool:
    """Whether nobody who waits for a job needs the line."""
    return _NOISE.search(line) is not None


def _show(printed: Mapping[str, Any]) -> None:
    from ray._private.worker import print_to_stdstream

    # Errors and results stay, whoever prints them.
    if kept := [line for line in printed.get("lines", ()) if not is_noise(line)]:
        print_to_stdstream({**printed, "lines": kept}, ignore_prefix=True)

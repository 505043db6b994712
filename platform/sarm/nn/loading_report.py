"""What `transformers` found while it loaded weights. A weight that no file holds is drawn at random, and only a warning says so.

Whoever loads a model asks here whether every weight came from its files. An exported model carries a copy of this module.
"""

from collections.abc import Callable, Mapping
from typing import Any

_NEVER: Callable[[str], bool] = lambda key: False  # noqa: E731


def faults(
    report: Mapping[str, Any], *, may_lack: Callable[[str], bool] = _NEVER, may_hold: Callable[[str], bool] = _NEVER
) -> str:
    """What is wrong with a loading (`output_loading_info`), as the rest of a sentence about the model; empty if nothing is.

    `may_lack` says of a weight that nobody needs it, `may_hold` of one in the files that the model may leave there.
    """
    missing = sorted(key for key in report.get("missing_keys", ()) if not may_lack(key))
    surplus = sorted(key for key in report.get("unexpected_keys", ()) if not may_hold(key))
    shapes = sorted((str(key), tuple(got), tuple(wanted)) for key, got, wanted in report.get("mismatched_keys", ()))
    found = []
    if missing:
        found.append(f"lacks {len(missing)} weights, e.g. {missing[0]}")
    if surplus:
        found.append(f"holds {len(surplus)} weights that this architecture has no place for, e.g. {surplus[0]}")
    if shapes:
        key, got, wanted = shapes[0]
        found.append(
            f"holds {len(shapes)} weights of another shape than its config says, e.g. {key}: {got}, not {wanted}"
        )
    found += [str(message).strip().splitlines()[0] for message in report.get("error_msgs", ()) if str(message).strip()]
    return "; ".join(found)

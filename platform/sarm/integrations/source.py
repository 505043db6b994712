"""Where an adapter's rewards come from: a server's address, or a SARM's folder that is loaded in this process.

Frameworks that name a file and pass no options read both from the environment: `SARM_REWARDS`, the address or the folder, and
`SARM_REWARDS_TOKEN`, the server's token.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sarm.client import Answer, RewardClient, RewardError, Rewards

SOURCE, TOKEN = "SARM_REWARDS", "SARM_REWARDS_TOKEN"
Message = Mapping[str, Any]
_SENT = ("role", "content", "name", "tool_calls", "tool_call_id", "tools")


def open_rewards(source: str | Path | None = None, *, token: str | None = None, **options: Any) -> Rewards:
    """The rewards of a source, of the environment's if none is named. Options as `sarm.client.Rewards` takes them.

    Raises RewardError if there is no source, UserError for a folder that holds no SARM.
    """
    place = str(source or os.environ.get(SOURCE, ""))
    if not place:
        raise RewardError(f"no source of rewards is named. Set {SOURCE} to a server's address or a SARM's folder.")
    if place.startswith(("http://", "https://")):
        return RewardClient(place, token=token or os.environ.get(TOKEN) or None, **options)
    # Torch and the model, which a client of a server does without.
    from sarm.serve.local import LocalRewards

    return LocalRewards(place, **options)


@cache
def shared_rewards(source: str | None = None, token: str | None = None, features: tuple[int, ...] = ()) -> Rewards:
    """The same, opened once a process: frameworks call a function for every sample."""
    return open_rewards(source, token=token, features=features)


def plain(messages: str | Sequence[Message], role: str = "user") -> list[dict[str, Any]]:
    """Messages as the server takes them, with their names and calls of tools; a string is what `role` says."""
    if isinstance(messages, str):
        return [{"role": role, "content": messages}]
    return [{name: one.get(name) for name in _SENT if name in ("role", "content") or one.get(name)} for one in messages]


def item_of(
    prompt: str | Sequence[Message], completion: str | Sequence[Message], *, is_truncated: bool
) -> dict[str, Any]:
    """The item of one completion."""
    finish = {"finish": ["length"]} if is_truncated else {}
    return {"messages": [*plain(prompt), *plain(completion, "assistant")], **finish}


def figures_of(answer: Answer, features: Iterable[int] = ()) -> dict[str, float]:
    """What is logged of an answer, under the same names for every answer: its flags, and what the watched features add to its reward."""
    found = {one["id"]: one["contribution"] for one in (answer.explanation or {}).get("features", [])}
    return {
        "sarm/truncated": float(answer.is_truncated),
        "sarm/cut": float(answer.is_cut),
        "sarm/special_tokens_in_content": float("special_tokens_in_content" in answer.flags),
        **{f"sarm/feature_{latent}": float(found.get(latent, 0.0)) for latent in features},
    }

"""What somebody should know of a set of pairs before a model learns from them, in sentences."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from sarm.data.sources.tool_turns import more_of

# Below this many pairs of unequal length a rule may be chance: 30 of 30 would be, once in 500 million sets.
_LEAST_PAIRS = 30
_EXPLAINED_SHARE = 0.95
_MOST = 0.5


class PairNotes:
    """Counts over pairs: how often the longer answer is chosen, turns that some chat templates refuse, and what some do not write."""

    def __init__(self) -> None:
        self.pairs = self.unequal = self.longer = self.with_system = self.not_alternating = 0
        self.with_tools = self.with_names = 0

    def add(self, prompt: Sequence[Mapping[str, str]], chosen: str, rejected: str) -> None:
        """Count one pair."""
        self.pairs += 1
        self.unequal += len(chosen) != len(rejected)
        self.longer += len(chosen) > len(rejected)
        roles = [message["role"] for message in prompt]
        self.with_system += "system" in roles
        has_tools = "tool" in roles or any({"tool_calls", "tools"} & more_of(message).keys() for message in prompt)
        self.with_tools += has_tools
        self.with_names += has_names(prompt)
        turns = roles[1:] if roles[:1] == ["system"] else roles
        # Between a call and its answer nobody else speaks.
        if has_tools:
            return
        self.not_alternating += turns[:1] != ["user"] or any(one == other for one, other in pairwise(turns))

    @property
    def longer_share(self) -> float | None:
        """Of the pairs with answers of unequal length, the share whose longer answer is chosen."""
        return self.longer / self.unequal if self.unequal else None

    def sentences(self) -> list[str]:
        """What is worth saying."""
        said = []
        share = self.longer_share
        if share is not None and self.unequal >= _LEAST_PAIRS and max(share, 1 - share) >= _EXPLAINED_SHARE:
            which = "longer" if share > _MOST else "shorter"
            said.append(
                f"The {which} answer is the chosen one in {max(share, 1 - share):.1%} of {self.unequal:,} pairs of unequal length. Length alone explains these labels: a reward model may learn nothing else."
            )
        refused = []
        if self.with_system:
            refused.append(f"{self.with_system:,} pairs have a system turn")
        if self.not_alternating:
            refused.append(f"in {self.not_alternating:,} pairs user and assistant do not alternate")
        if refused:
            said.append(
                f"{' and '.join(refused)}: a chat template that refuses such turns leaves the pairs out, as `template_refuses`.".capitalize()
            )
        if self.with_tools:
            said.append(f"{self.with_tools:,} pairs offer or use tools: a chat template that has no words for them leaves the pairs out, as `template_without_tools`.")  # fmt: skip
        if self.with_names:
            said.append(f"{self.with_names:,} pairs have messages with a name: a chat template that does not write names leaves these out. `--inspect SOURCE --model.name MODEL` says whether it does.")  # fmt: skip
        return said


def has_names(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message says who speaks, other than which tool."""
    return any(message["role"] != "tool" and "name" in more_of(message) for message in messages)


def notes_on(rows: Iterable[Mapping[str, Any]]) -> PairNotes:
    """The counts over rows of pairs/v1."""
    notes = PairNotes()
    for row in rows:
        notes.add(row["prompt"], row["chosen"], row["rejected"])
    return notes


def truncation_note(truncated: int, total: int, max_length: int) -> str | None:
    """A sentence where most sequences lose their beginning."""
    if total == 0 or truncated <= _MOST * total:
        return None
    return f"{truncated:,} of {total:,} sequences are longer than --model.max-length {max_length:,} and lose their beginning. Pass a larger --model.max-length, or shorter texts."

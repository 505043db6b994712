"""The beginnings of an answer among its tokens: where a model reads what the reward would be, had the answer stopped there."""

from typing import NamedTuple

from sarm.data.tokens.chat import Tokens


class Beginnings(NamedTuple):
    """All beginnings of an answer but the whole, the empty one first. Behind each stands what closes an answer, as a branch."""

    columns: tuple[int, ...]
    """The last token of each beginning."""
    closing: tuple[int, ...]
    """What stands behind the answer, up to the rewarded token."""
    ends: tuple[int, ...]
    """Where each token of the answer stops in its text."""

    @property
    def tokens(self) -> int:
        """How many tokens the branches add."""
        return len(self.columns) * len(self.closing)


def beginnings_of(tokens: Tokens) -> Beginnings | None:
    """The beginnings of an answer that was encoded with its offsets; None if no token is its own, or none stands before it."""
    own = [column for column, (start, end) in enumerate(tokens.offsets) if start < end]
    if not own or not own[0]:
        return None
    return Beginnings(
        columns=(own[0] - 1, *own[:-1]),
        closing=tuple(tokens.ids[own[-1] + 1 :]),
        ends=tuple(tokens.offsets[column][1] for column in own),
    )

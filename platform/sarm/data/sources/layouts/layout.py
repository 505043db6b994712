"""What a layout of preference data is: a way in which a row of a source says which of its answers are better."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sarm.data.sources.conversations import Message

Fields = Mapping[str, Any]


class RawPair(NamedTuple):
    """One preference: the messages before the answers, the better and the worse answer, and where they are from."""

    prompt: list[Message]
    chosen: str
    rejected: str
    source: str
    subset: str | None
    margin: float | None


class Answers(NamedTuple):
    """The messages before the answers, the better and the worse answer; whether they are texts is checked afterwards."""

    prompt: list[Message]
    chosen: Any
    rejected: Any


class Judged(NamedTuple):
    """One answer with its label or score, which makes pairs with the other answers of the same prompt in its source."""

    prompt: list[Message]
    answer: Any
    value: float


class Fault(Exception):  # noqa: N818 - a row's reason word on its way to a Reject, seen nowhere else
    """Why a row is no preference."""


class Layout(NamedTuple):
    """A way of writing preferences down. Of several that a row fits, the first in `LAYOUTS` counts."""

    name: str
    """What it is called in `docs/compatibility.md`."""
    rule: str
    """Which answer is the better one, in words."""
    needs: tuple[tuple[str, ...], ...]
    """Columns that a source has; of columns in one bracket, one is enough."""
    may_have: tuple[str, ...]
    """Other columns that are read."""
    fits: Callable[[Fields], bool]
    """Whether a row is written so."""
    read: Callable[[Fields], Sequence[Answers] | Judged]
    """A fitting row's preferences, or its one answer with what is said of it. Raises Fault with the reason word."""

    @property
    def columns(self) -> frozenset[str]:
        """Every column that is read."""
        return frozenset({name for names in (*self.needs, self.may_have) for name in names})

    def needed(self) -> str:
        """The columns that it needs, as messages write them."""
        return " + ".join(" or ".join(names) for names in self.needs)


def present(fields: Fields, *names: str) -> Any:
    """The first of these columns that has a value. Raises Fault `no_NAME` of the first if none has."""
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    raise Fault(f"no_{names[0]}")


def has(fields: Fields, *names: str) -> bool:
    """Whether every one of these columns has a value."""
    return all(fields.get(name) is not None for name in names)


def number_of(value: Any) -> float | None:
    """A number, also one that a file without types spells; None for anything else, NaN and infinities among it."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < float("inf") else None

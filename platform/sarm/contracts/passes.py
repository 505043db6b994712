"""What passes over rows hand to each other: their outputs, what they cost, how they say that they go on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa


class Spelled(NamedTuple):
    """How many contents spell a control token of the tokenizer, and how many spell turns of a chat template; both are scored as text."""

    control_tokens: int = 0
    templated: int = 0

    def __add__(self, other: tuple[int, ...]) -> "Spelled":  # type: ignore[override]
        return Spelled(self[0] + other[0], self[1] + other[1])


SPELLED_COUNTS = ("contents_with_control_tokens", "contents_already_templated")
"""What both are called in the counts of every stage that reads conversations."""


class Target(NamedTuple):
    """One folder of a pass: which tokens, after which block."""

    unit: str
    layer: int


@dataclass
class Cost:
    """What forward passes took: tokens, tokens with padding, seconds."""

    tokens: int = 0
    padded_tokens: int = 0
    forward_seconds: float = 0.0
    contents_with_control_tokens: int = 0
    contents_already_templated: int = 0

    def note(self, spelled: Iterable[Spelled]) -> None:
        """Count contents that spell control tokens or turns."""
        for one in spelled:
            self.contents_with_control_tokens += one.control_tokens
            self.contents_already_templated += one.templated


Tables = dict[Any, pa.Table]


Beat = Callable[[], None]

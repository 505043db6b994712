"""What scorers are asked and what they answer: a prompt and its completions; a score for each."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from sarm.contracts.passes import Cost

Message = dict[str, str]


class Request(NamedTuple):
    """One prompt with completions to score; `alone` forbids sharing a forward pass."""

    prompt: list[Message]
    completions: list[str]
    alone: bool


class Scored(NamedTuple):
    """A completion's score, its tokens (None where the model has none) and whether tokens were cut off.

    The score is NaN where the conversation cannot be encoded, and `reason` says why.
    """

    score: float
    num_tokens: int | None
    truncated: bool
    reason: str | None = None


@runtime_checkable
class Scorer(Protocol):
    """Scores of every completion of every request, and what the forward passes took."""

    def __call__(self, requests: Sequence[Request]) -> tuple[list[list[Scored]], Cost]: ...

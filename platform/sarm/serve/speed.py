"""How fast an engine reads: the estimate by which a queue is admitted."""

from dataclasses import dataclass

# Older batches weigh a fifth less with each full one.
_FOLLOWS = 0.2
# What is assumed before anything was timed, and how little that weighs.
_FIRST_TOKENS, _FIRST_SECONDS = 50.0, 0.1


@dataclass
class Speed:
    """Tokens and seconds of the latest batches, each weighing as much as it has tokens; a full batch has `full_tokens`.

    The first batch says nothing: it makes what later ones find. A small one says little: most of its time is no reading. A queue that was
    admitted by either would be refused for no reason.
    """

    full_tokens: int
    _tokens: float = _FIRST_TOKENS
    _seconds: float = _FIRST_SECONDS
    _is_cold: bool = True

    @property
    def tokens_per_second(self) -> float:
        """The estimate."""
        return self._tokens / self._seconds

    def add(self, tokens: int, seconds: float) -> None:
        """Take a batch."""
        if self._is_cold:
            self._is_cold = False
            return
        kept = 1 - _FOLLOWS * min(1.0, tokens / self.full_tokens)
        self._tokens = kept * self._tokens + tokens
        self._seconds = kept * self._seconds + max(seconds, 1e-6)

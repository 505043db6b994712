"""How many tokens an answer may have. A model that thinks before it answers spends the same tokens on both."""

# Once thinking has left no room for the answer, at least so much is asked for, then four times as much, up to the most.
_FIRST, _FACTOR, MOST_TOKENS = 2048, 4, 32_768


class Room:
    """The room of one judge's answers; `fixed` is what the user allows, which is then never exceeded."""

    def __init__(self, fixed: int | None):
        self._fixed = fixed
        self._most = fixed or MOST_TOKENS
        self._needed = 0

    def first(self, tokens: int) -> int:
        """Tokens of the first request of a question that allows `tokens`: as many as this model's thinking has needed before."""
        return self._fixed or max(tokens, min(self._needed, self._most))

    def wider(self, tried: int) -> int | None:
        """More than was tried, and the same for later questions; None where no more is allowed."""
        room = min(self._most, max(_FIRST, _FACTOR * tried))
        if self._fixed or room <= tried:
            return None
        self._needed = max(self._needed, room)
        return room

    def narrower(self, asked: int, above: int) -> int:
        """Less than a room that the model does not have beside the question, and no more from now on: the middle between it and what is known to fit.

        What fits, where both are close; what was asked, where the user has fixed it or nothing less would do.
        """
        if self._fixed or asked <= above:
            return asked
        middle = (asked + above) // 2
        self._most = middle if 4 * middle > 5 * above else above
        return self._most

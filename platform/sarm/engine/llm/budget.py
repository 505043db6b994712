"""What judges may cost. Tokens are set aside before a request and spent after it, so that requests at once cannot exceed it together."""

import asyncio
from dataclasses import dataclass

from sarm.engine.llm.endpoint import JudgeStoppedError
from sarm.settings.judging import JudgeSpec


@dataclass
class Usage:
    """What a question has taken so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False
    requests: int = 0

    def add(self, other: "Usage") -> None:
        """Take in what a request, or an answer from the log, took; its requests are counted when they are sent."""
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.estimated |= other.estimated


class Budget:
    """Tokens and money that the answers of one run may have cost; shared by its judges."""

    def __init__(self, max_tokens: int | None, max_usd: float | None):
        self.max_tokens, self.max_usd = max_tokens, max_usd
        self.tokens, self.usd = 0, 0.0
        self._reserved: dict[int, tuple[int, float]] = {}
        self._freed = asyncio.Event()

    async def reserve(self, spec: JudgeSpec, prompt_tokens: int, completion_tokens: int) -> int:
        """Set tokens aside for a request, once others have given back enough; returns a ticket.

        Raises JudgeStoppedError if the budget would not suffice even with no other request under way.
        """
        tokens, usd = prompt_tokens + completion_tokens, spec.usd(prompt_tokens, completion_tokens) or 0.0
        while problem := self._problem(tokens, usd):
            if not self._reserved:
                raise JudgeStoppedError(problem)
            self._freed.clear()
            await self._freed.wait()
        ticket = max(self._reserved, default=0) + 1
        self._reserved[ticket] = (tokens, usd)
        return ticket

    def _problem(self, tokens: int, usd: float) -> str:
        tokens += sum(held for held, _ in self._reserved.values())
        usd += sum(held for _, held in self._reserved.values())
        if self.max_tokens is not None and self.tokens + tokens > self.max_tokens:
            return f"the budget of {self.max_tokens:,} tokens is used up ({self.tokens:,} spent). Answers are kept: raise --judging.max-tokens-total and run the same command."
        if self.max_usd is not None and self.usd + usd > self.max_usd:
            return f"the budget of {self.max_usd:g} USD is used up ({self.usd:.4f} spent). Answers are kept: raise --judging.max-usd and run the same command."
        return ""

    def release(self, ticket: int) -> None:
        """The request of a ticket has ended, and what it took is spent."""
        del self._reserved[ticket]
        self._freed.set()

    def spend(self, spec: JudgeSpec, prompt_tokens: int, completion_tokens: int) -> None:
        """Tokens that an answer took, now or when it came into the log."""
        self.tokens += prompt_tokens + completion_tokens
        self.usd += spec.usd(prompt_tokens, completion_tokens) or 0.0

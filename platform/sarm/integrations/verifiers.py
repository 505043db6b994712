"""verifiers (prime-rl): a reward method of a task, `sarm = vf.reward(weight=1.0)(reward("http://127.0.0.1:8000"))` in the task's class."""

from collections.abc import Awaitable, Callable
from typing import Any

from sarm.integrations.source import item_of, open_rewards


def reward(source: str | None = None, *, token: str | None = None, **options: Any) -> Callable[..., Awaitable[float]]:
    """A method of a task and a trace: the reward of the last message on the trace's final branch.

    Raises RewardError, also for a trace that does not end with the assistant's message.
    """
    rewards = open_rewards(source, token=token, **options)

    async def sarm_reward(self: Any, trace: Any) -> float:
        messages = [{"role": one.role, "content": _text(one.content)} for one in trace.messages]
        ((answer,),) = await rewards.arewards([item_of(messages, [], is_truncated=bool(trace.is_truncated))])
        return answer.reward

    return sarm_reward


def _text(content: Any) -> str:
    """The text of a content, which may come in parts."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part if isinstance(part, dict) else part.model_dump() for part in content]
    return "".join(part.get("text", "") for part in parts)

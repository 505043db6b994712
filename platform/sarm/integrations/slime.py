"""slime: `--custom-rm-path sarm.integrations.slime.custom_rm`, with the source in the environment (`SARM_REWARDS`).

It knows what slime's HTTP client does not send: whether a sample was cut off. Prompts may be messages, or texts in the policy's template.
"""

from typing import Any

from sarm.integrations.source import item_of, shared_rewards


async def custom_rm(args: Any, sample: Any, **_: Any) -> float | list[float]:
    """The reward of a sample, or of each of a list of them. Raises RewardError."""
    samples = sample if isinstance(sample, list) else [sample]
    found = await shared_rewards().arewards([_item(one) for one in samples])
    values = [own[0].reward for own in found]
    return values if isinstance(sample, list) else values[0]


def _item(sample: Any) -> dict[str, Any]:
    status = getattr(sample.status, "value", sample.status)
    if isinstance(sample.prompt, str):
        return {"text": sample.prompt + sample.response, "prompt_text": sample.prompt, "finish": ["length" if status == "truncated" else "stop"]}  # fmt: skip
    return item_of(sample.prompt, sample.response, is_truncated=status == "truncated")

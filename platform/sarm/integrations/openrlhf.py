"""OpenRLHF: `--reward.remote_url PATH/TO/sarm/integrations/openrlhf.py`, with the source in the environment (`SARM_REWARDS`).

Unlike the server's own route for OpenRLHF it sends a token and waits as long as the server says.
"""

import math
from collections.abc import Sequence
from typing import Any

from sarm.integrations.source import figures_of, shared_rewards


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any) -> dict[str, Any]:
    """`rewards` to train on, `scores` between 0 and 1 for dynamic filtering, `extra_logs` with one number a query under fixed names.

    `queries` are prompts and answers decoded with their special tokens, in the policy's template. Raises RewardError.
    """
    known = [*prompts, *[None] * (len(queries) - len(prompts))]
    items = [{"text": text, "prompt_text": prompt} for text, prompt in zip(queries, known, strict=True)]
    answers = [own[0] for own in shared_rewards().rewards(items)]
    figures = [figures_of(answer) for answer in answers]
    values = [answer.reward for answer in answers]
    return {
        "rewards": values,
        "scores": [0.5 * (1 + math.tanh(value / 2)) for value in values],
        "extra_logs": {name: [one[name] for one in figures] for name in (figures[0] if figures else {})},
    }

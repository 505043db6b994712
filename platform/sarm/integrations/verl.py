"""verl: a reward manager, which sees prompts and knows what was cut off, and a function for data sets that carry their prompts.

`reward.reward_manager.source=importlib reward.reward_manager.module.path=PATH/TO/THIS/FILE reward.reward_manager.name=SarmRewardManager`
`reward.custom_reward_function.path=PATH/TO/THIS/FILE reward.custom_reward_function.name=compute_score`
"""

import os
from typing import Any

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from sarm.integrations.source import figures_of, item_of, shared_rewards

# In the environment: ids of latents whose contributions are logged, with commas between.
FEATURES = "SARM_REWARDS_FEATURES"


class SarmRewardManager(RewardManagerBase):  # type: ignore[misc]
    """Rewards of single samples. The source is `SARM_REWARDS` in the environment."""

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ):
        super().__init__(config, tokenizer, compute_score)
        self._features = tuple(int(one) for one in os.environ.get(FEATURES, "").split(",") if one.strip())
        self._rewards = shared_rewards(features=self._features)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The reward of the last sample of `data`, with the same extra columns for every sample, as verl needs. Raises RewardError."""
        sample = data[-1:][0]
        responses = sample.batch["responses"]
        shown = int(sample.batch["attention_mask"][-responses.shape[-1] :].sum())
        ids = responses[:shown].tolist()
        ends = [place for place, one in enumerate(ids) if one == self.tokenizer.eos_token_id]
        text = self.tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=False)
        prompt = list(sample.non_tensor_batch["raw_prompt"])
        ((answer,),) = await self._rewards.arewards([item_of(prompt, text, is_truncated=not ends)])
        return {"reward_score": answer.reward, "reward_extra_info": figures_of(answer, self._features)}


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    source: str | None = None,
    **_: Any,
) -> dict[str, float]:
    """The reward of an answer to `extra_info["prompt"]`, a text or messages; verl passes no prompt by itself.

    `source` may come from `reward_kwargs`. Raises ValueError if the data set has no such column, RewardError without rewards.
    """
    prompt = (extra_info or {}).get("prompt")
    if prompt is None:
        raise ValueError(
            "extra_info has no prompt, and verl passes none. Add it to the data set, or use SarmRewardManager."
        )
    item = item_of(prompt if isinstance(prompt, str) else list(prompt), solution_str, is_truncated=False)
    ((answer,),) = await shared_rewards(source).arewards([item])
    return {"score": answer.reward, **figures_of(answer)}

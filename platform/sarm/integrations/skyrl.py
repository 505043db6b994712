"""SkyRL: an environment of one turn, `register(id="sarm", entry_point="sarm.integrations.skyrl:SarmEnv")`.

Its source stands in `env_config.source`, or in the environment (`SARM_REWARDS`).
"""

from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from sarm.integrations.source import figures_of, item_of, shared_rewards


class SarmEnv(BaseTextEnv):  # type: ignore[misc]
    """What the policy answers to the prompt, rewarded once."""

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None):
        super().__init__()
        self._rewards = shared_rewards(getattr(env_config, "source", None))
        self._prompt: Any = (extras or {}).get("prompt")

    def init(self, prompt: Any) -> tuple[Any, dict[str, Any]]:
        """Keep the prompt, which `step` is not told."""
        self._prompt = prompt
        return prompt, {}

    def step(self, action: str) -> Any:
        """The answer's reward. Raises RewardError."""
        ((answer,),) = self._rewards.rewards([item_of(self._prompt, action, is_truncated=False)])
        return BaseTextEnvStepOutput(observations=[], reward=answer.reward, done=True, metadata=figures_of(answer))

"""NeMo-RL: `register_env("sarm", "sarm.integrations.nemo_rl.SarmEnvironment")`, with `{"source": ...}` as the environment's config."""

from typing import Any

import torch
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn

from sarm.integrations.source import open_rewards, plain


class SarmEnvironment(EnvironmentInterface):  # type: ignore[misc]
    """Conversations of one turn, rewarded once."""

    def __init__(self, cfg: dict[str, Any]):
        self._rewards = open_rewards(cfg.get("source"), token=cfg.get("token"))

    def step(self, message_log_batch: list[list[dict[str, Any]]], metadata: list[Any]) -> Any:
        """The rewards of message logs that end with the assistant's message; every episode ends. Raises RewardError."""
        found = self._rewards.rewards([{"messages": plain(log)} for log in message_log_batch])
        num = len(found)
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": ""} for _ in range(num)],
            metadata=metadata,
            next_stop_strings=[None] * num,
            rewards=torch.tensor([own[0].reward for own in found], dtype=torch.float32),
            terminateds=torch.ones(num, dtype=torch.bool),
            answers=[None] * num,
        )

    def shutdown(self) -> None:
        """Nothing runs beside it."""

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """The batch as it is, and the mean reward."""
        return batch, {"sarm_reward": float(batch["total_reward"].float().mean())}

"""open-instruct: a verifier for rows whose data set is `sarm`; it is found by being imported, and reads its source from the environment.

Its contract is a score between 0 and 1, so it is the sigmoid of the standardised reward.
"""

import asyncio
import math
from typing import Any

from open_instruct.ground_truth_utils import VerificationResult, VerifierFunction

from sarm.integrations.source import item_of, shared_rewards


class SarmVerifier(VerifierFunction):  # type: ignore[misc]
    """The reward of a prediction to its query, which is a text or messages."""

    def __init__(self, verifier_config: Any = None):
        super().__init__("sarm", weight=1.0, verifier_config=verifier_config)

    async def async_call(
        self, tokenized_prediction: list[int], prediction: str, label: Any, query: Any = None, rollout_state: Any = None
    ) -> Any:
        """Raises ValueError without a query, RewardError without rewards."""
        if query is None:
            raise ValueError("a reward is of an answer to a query, and there is none")
        ((answer,),) = await shared_rewards().arewards([item_of(query, prediction, is_truncated=False)])
        return VerificationResult(score=0.5 * (1 + math.tanh(answer.reward / 2)))

    def __call__(self, tokenized_prediction: list[int], prediction: str, label: Any, query: Any = None, rollout_state: Any = None) -> Any:  # fmt: skip
        """The same, where no loop runs."""
        return asyncio.run(self.async_call(tokenized_prediction, prediction, label, query, rollout_state))

"""TRL's GRPO, RLOO and online DPO: `GRPOTrainer(reward_funcs=reward("http://127.0.0.1:8000"), ...)`, or the folder of a SARM."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from sarm.integrations.source import figures_of, item_of, open_rewards


def reward(
    source: str | Path | None = None,
    *,
    token: str | None = None,
    features: Sequence[int] = (),
    end_ids: Collection[int] = (),
    **options: Any,
) -> Callable[..., Awaitable[list[float]]]:
    """A reward function. What `features` add to rewards is logged as metrics, and each answer's flags.

    `options` are those of `sarm.client.Rewards`: with `run="NAME"` the server's watch knows whose steps these are. With `end_ids`, the policy's end-of-turn tokens, completions without one are taken for cut off. Conversational and plain data sets are
    scored alike: a string is what the user says, or the assistant. Raises RewardError where no rewards come, which ends training.
    """
    rewards = open_rewards(source, token=token, features=features, **options)

    async def sarm_reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        ids = completion_ids if completion_ids is not None and end_ids else [end_ids] * len(prompts)
        items = [
            item_of(prompt, completion, is_truncated=bool(end_ids) and not set(end_ids) & set(own))
            for prompt, completion, own in zip(prompts, completions, ids, strict=True)
        ]
        step = getattr(trainer_state, "global_step", None)
        answers = [own[0] for own in await rewards.arewards(items, step)]
        figures = [figures_of(answer, features) for answer in answers]
        if log_metric is not None and figures:
            for name in figures[0]:
                log_metric(name, sum(one[name] for one in figures) / len(figures))
        if log_extra is not None:
            log_extra("sarm_flags", [" ".join(answer.flags) for answer in answers])
        return [answer.reward for answer in answers]

    return sarm_reward

"""Right and wrong of each held-out pair, from many trainings, and what they say together.

A pair counts once: its credit (1 right, 0 wrong, 0.5 a tie) is the mean over the seeds that scored it. Intervals are by prompt.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tests.evidence.verdicts import Measured

from sarm.data.store.parts import read_parts
from sarm.evaluate.intervals import Interval, difference_interval, share_interval
from sarm.evaluate.statistics import pair_credit

Credits = dict[str, dict[str, float]]
"""By model and pair."""


def of_evaluation(folder: Path, models: Mapping[str, str]) -> dict[str, Any]:
    """Credits of the models whose scores an evaluation has, and each pair's prompt; `models` are folders of scores by name."""
    credits: dict[str, list[float]] = {}
    pairs: list[str] = []
    prompts: list[str] = []
    for name, scores_of in models.items():
        if not (folder / f"{scores_of}_scores").exists():
            continue
        scores = read_parts(folder / f"{scores_of}_scores").sort_by("pair_id")
        pairs = [str(pair) for pair in scores["pair_id"].to_pylist()]
        prompts = [str(prompt) for prompt in scores["prompt_id"].to_pylist()]
        margins = scores["chosen_reward"].to_numpy() - scores["rejected_reward"].to_numpy()
        credits[name] = [float(one) for one in pair_credit(margins)]
    return {"pairs": pairs, "prompts": prompts, "credits": credits}


def accuracy(found: Iterable[Mapping[str, Any]], model: str) -> Measured | None:
    """Of a model over all pieces that have it; None if none has."""
    by_pair, prompts, seeds = _gathered(found, [model])
    if not by_pair:
        return None
    values = np.array([np.mean(own) for own in by_pair.values()])
    return _measured(values, [prompts[pair] for pair in by_pair], share_interval(values, _ids(by_pair, prompts)), seeds)


def difference(found: Iterable[Mapping[str, Any]], model: str, other: str) -> Measured | None:
    """Accuracy of a model minus that of another on the same pairs of the same pieces; None if no piece has both."""
    by_pair, prompts, seeds = _gathered(found, [model, other])
    if not by_pair:
        return None
    values = np.array([np.mean(own) for own in by_pair.values()])
    interval = difference_interval(values, _ids(by_pair, prompts))
    return _measured(values, [prompts[pair] for pair in by_pair], interval, seeds)


def joined(found: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Pieces of one fold and seed as one: `names` says what a piece's models are called in it, by `recipe` and a colon."""
    whole: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in found:
        key = (one["fold"], one["seed"])
        kept = whole.setdefault(key, {**one, "credits": {}})
        if kept["pairs"] != one["pairs"]:
            raise ValueError(f"pieces of fold {key[0]}, seed {key[1]} scored different pairs")
        for model, credits in one["credits"].items():
            if name := names.get(f"{one['recipe']}:{model}"):
                kept["credits"][name] = credits
    return list(whole.values())


def _gathered(
    found: Iterable[Mapping[str, Any]], models: list[str]
) -> tuple[dict[str, list[float]], dict[str, str], int]:
    """For each pair its values over seeds (of one model the credit, of two the difference), the prompts, and how many seeds there are of the fold that has fewest."""
    by_pair: dict[str, list[float]] = {}
    prompts: dict[str, str] = {}
    seeds: dict[Any, set[Any]] = {}
    for one in found:
        if not all(model in one["credits"] for model in models):
            continue
        own = np.array(one["credits"][models[0]])
        values = own - np.array(one["credits"][models[1]]) if len(models) == 2 else own
        seeds.setdefault(one["fold"], set()).add(one["seed"])
        for pair, prompt, value in zip(one["pairs"], one["prompts"], values, strict=True):
            by_pair.setdefault(pair, []).append(float(value))
            prompts[pair] = prompt
    return by_pair, prompts, min(map(len, seeds.values()), default=0)


def _ids(by_pair: Mapping[str, Any], prompts: Mapping[str, str]) -> "np.ndarray[Any, Any]":
    return np.array([prompts[pair] for pair in by_pair])


def _measured(values: "np.ndarray[Any, Any]", prompts: list[str], interval: Interval, seeds: int) -> Measured:
    return Measured(float(values.mean()), interval.low, interval.high, len(set(prompts)), seeds)

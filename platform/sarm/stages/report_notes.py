"""What a report calls its models, and the sentences that it adds to its figures."""

from collections.abc import Mapping
from typing import Any

from sarm.contracts.folders import BASELINES

NAMES = {
    "sarm": "SARM",
    **BASELINES,
    "probe": "logistic probe, frozen backbone",
    "sparse_head": "{latents} latents, frozen backbone",
    "sparse_rm": "SparseRM, {directions} directions, frozen backbone",
    "shorter_answer": "shorter answer",
    "longer_answer": "longer answer",
    "random": "random",
}


def notes_of(metrics: Mapping[str, Any]) -> list[str]:
    """Sentences of `metrics.json` that a reader of the report has to know."""
    notes = [
        "Intervals are over prompts, since the pairs of one prompt depend on each other: Wilson's of the effective number of pairs, with Student's t (docs/evaluation.md); the split was made by hash before anything was trained.",
        "Labels beside latents are the responses that fire them most, not explanations.",
    ]
    notes.append(near_duplicates(metrics))
    for name, difference in metrics["sarm_minus"].items():
        if difference.get("difference") is not None:
            low, high = difference["difference_ci95"]
            notes.append(
                f"SARM minus {name_of(name, metrics)}: {difference['difference']:+.3f} (95 % interval {low:+.3f} to {high:+.3f})."
            )
    return notes


def name_of(key: str, metrics: Mapping[str, Any]) -> str:
    """What a model is called beside its accuracy."""
    sizes = {**(metrics.get("sparse_rm_head") or {}), **(metrics.get("few_latents") or {})}
    return NAMES[key].format(**sizes)


def near_duplicates(metrics: Mapping[str, Any]) -> str:
    """How many held-out prompts are nearly training prompts, and the accuracies without them."""
    near = metrics.get("near_duplicates")
    if near is None:
        return "Whether held-out prompts are nearly training prompts is unknown: these pairs were prepared without looking."
    said = f"{near['prompts']} of {near['of_prompts']} held-out prompts ({near['pairs']} of {near['of_pairs']} pairs) are near-duplicates of a training prompt: half or more of their runs of five characters in common."
    if not near["prompts"]:
        return said
    parts = [
        f"{name_of(name, metrics)} {measured['accuracy']:.3f} ({measured['accuracy_ci95'][0]:.3f} to {measured['accuracy_ci95'][1]:.3f})"
        for name, measured in near["without"].items()
        if measured["accuracy"] is not None
    ]
    return f"{said} Accuracy without them: {', '.join(parts) or 'no pair is left'}."

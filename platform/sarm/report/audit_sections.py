"""The parts of audit.html about steering, poison and denoise."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sarm.report.numbers import share
from sarm.report.pages import Section


def signed(value: float | None, digits: int = 3) -> str:
    """A number with its sign."""
    return "n/a" if value is None or math.isnan(value) else f"{value:+.{digits}f}".replace("-", "−")


def signed_span(ends: Sequence[float | None], digits: int = 3) -> str:
    """An interval of such numbers."""
    if any(end is None or math.isnan(end) for end in ends):
        return "n/a"
    return f"{signed(ends[0], digits)} to {signed(ends[1], digits)}"


def terms_section(terms: Mapping[str, Mapping[str, Any]], shown: int = 10) -> Section:
    """The patched change as a sum over features, where the features are inside a classifier."""
    found, at_reward = terms["all"], terms["rewarded"]
    residual = "n/a" if found["residual"] is None else share(found["residual"])
    beside = dict(zip(at_reward["latents"], at_reward["terms"], strict=True))
    largest = sorted(zip(found["latents"], found["terms"], strict=True), key=lambda one: -abs(one[1]))
    return Section(
        title="What each feature has of the change",
        text=f"Integrated gradients on {found['num_pairs']} of these pairs: on the straight path from the activations as they are to those with all features at 0, the patched change of the margin ({signed(found['patched'])} at all tokens) is a sum of one term for each feature. The terms miss {residual} of the mean change of a reward; {share(found['within_tolerance'])} of the responses lie within {share(found['tolerance'])} of their own, with at most {found['places']} places on the path. Here are the {min(shown, len(largest))} largest of {len(largest)}.",
        columns=("latent", "term at all tokens", "at the rewarded token"),
        rows=[(str(latent), signed(term), signed(beside[latent])) for latent, term in largest[:shown]],
    )


def steering_sections(name: str, content: Mapping[str, Any]) -> Iterable[Section]:
    """An edit's effect on every subset, its certificate and its dose-response table, as far as it has them."""
    yield _edit_effects(name, content)
    if certificate := content.get("certificate"):
        yield _certificate(name, content["edit"], certificate)
    if content.get("sweep"):
        yield _dose_response(name, content)
    if content.get("doses"):
        yield _doses_inside(name, content)


def _edit_effects(name: str, content: Mapping[str, Any]) -> Section:
    """What an edit does to the target, the off-target, and every subset of them."""
    edit = content["edit"]
    what = f"{edit['kind']}, strength {edit['strength']:g}" if edit["kind"] != "goal" else f"goal {edit['goal']:+g}, tolerance {edit['tolerance']:g}"  # fmt: skip
    rows = [("target", content["target"]), *content["target_subsets"].items(), ("off target", content["off_target"]), *content["off_subsets"].items()]  # fmt: skip
    over = ", ".join(
        f"{k} {signed(100 * v['accuracy_change']['value'], 1)} points" for k, v in content["over_refusal"].items()
    )
    text = f"{what}, {len(edit['weights'])} {'latents times the strength, at all tokens inside the model' if edit.get('inside') else 'head weights'}. Specificity of the margin {_or(content['specificity']['margin'])}, of the accuracy {_or(content['specificity']['accuracy'])} (1: only the target moves). Over-refusal: {over or 'no labelled subset'}."  # fmt: skip
    return Section(
        title=f"Steering: {name}",
        text=text,
        columns=(
            "pairs",
            "n",
            "margin shift",
            "95 % interval",
            "pairs affected",
            "flips",
            "accuracy before",
            "after",
            "change, 95 % interval",
        ),
        rows=[
            (
                label,
                effects["num_pairs"],
                signed(effects["margin_shift"]["value"]),
                signed_span(effects["margin_shift"]["ci95"]),
                share(effects["affected"]["value"]),
                share(effects["flips"]["value"]),
                share(effects["accuracy_before"]["value"]),
                share(effects["accuracy_after"]["value"]),
                f"{share(effects['accuracy_change']['ci95'][0])} to {share(effects['accuracy_change']['ci95'][1])}",
            )
            for label, effects in rows
        ],
    )


def _doses_inside(name: str, content: Mapping[str, Any]) -> Section:
    """The same edit of codes inside the model at several strengths, beside what the gradient foresees."""
    own = content["beside_controls"]
    return Section(
        title=f"Dose and response: {name}",
        text=f"By patching: the features' codes are multiplied at all tokens, and the blocks behind run again. At the saved strength the target's margin changes by {signed(own['value'])} ({signed_span(own['patched_ci95'])}); {content['num_controls']} matched sets change it by a median size of {own['control_median']:.3f} (ratio {'n/a' if own['ratio'] is None else format(own['ratio'], '.2f')}, p {own['p']:.3g}). Linear is gradient times change; it holds near strength 1.",
        columns=("strength", "target margin", "linear", "target accuracy", "off-target margin", "off-target accuracy"),
        rows=[
            (
                f"{row['strength']:g}",
                signed(row["target_margin"]),
                signed(row["target_linear"]),
                share(row["target_accuracy"]),
                signed(row["off_margin"]),
                share(row["off_accuracy"]),
            )
            for row in content["doses"]
        ],
    )


def _dose_response(name: str, content: Mapping[str, Any]) -> Section:
    """The same edit at several strengths, beside controls of each."""
    return Section(
        title=f"Dose and response: {name}",
        text=f"Slope of the target's margin per unit of strength {signed(content['slope']['value'])} ({signed_span(content['slope']['ci95'])}); Spearman of strength and target accuracy {signed(content['monotonic'], 2)}. Controls: {content['num_controls']} matched sets.",
        columns=(
            "strength",
            "target margin",
            "controls: median size",
            "ratio",
            "p",
            "target accuracy",
            "off-target margin",
            "off-target accuracy",
            "target flips",
        ),
        rows=[
            (
                f"{row['strength']:g}",
                signed(row["target_margin"]),
                f"{row['control']['control_median']:.3f}",
                f"{row['control']['ratio']:.2f}" if row["control"]["ratio"] is not None else "n/a",
                f"{row['control']['p']:.3g}",
                share(row["target_accuracy"]),
                signed(row["off_margin"]),
                share(row["off_accuracy"]),
                share(row["target_flips"]),
            )
            for row in content["sweep"]
        ],
    )


def _certificate(name: str, edit: Mapping[str, Any], certificate: Mapping[str, Any]) -> Section:
    """What the edit does to the half of the prompts that the solver has not seen."""
    solved, kept = certificate["solved_on"], certificate["tolerance_kept"]
    verdict = {
        "yes": "is kept: every interval lies within it",
        "no": "is not kept",
        "undecided": "may or may not be kept: not every subset has an interval within it",
    }[kept]
    goal = {
        True: "is inside the target's interval",
        False: "is outside the target's interval",
        None: "stays open: the target has no interval",
    }[certificate["goal_within"]]
    return Section(
        title=f"Certificate: {name}",
        text=f"The solver saw half of the prompts, where the target rises by {signed(solved['target_shift'])} and no other subset moves by more than {solved['largest_other_shift']:.3f}. The table has the other half, with 95 % intervals over prompts. The goal of {signed(edit['goal'])} {goal}. The tolerance of {edit['tolerance']:g} {verdict}.",
        columns=("pairs", "n", "prompts", "margin shift", "95 % interval"),
        rows=[
            (label, change["num_pairs"], change["num_prompts"], signed(change["value"]), signed_span(change["ci95"]))
            for label, change in [("target", certificate["target"]), *certificate["others"].items()]
        ],
    )


def relabelling_sections(content: Mapping[str, Any]) -> Iterable[Section]:
    """Poison and denoise against their controls, and what was found of injected noise."""
    base = content["baseline"]
    yield Section(
        title="Poison and denoise",
        text=f"{content['num_pairs']:,} training pairs; {content['retraining']} {content['num_seeds']} seeds, each on nine tenths of the prompts. Unchanged: target {share(base['target']['mean'])}, off target {share(base['off']['mean'])}. Changes against the unchanged labels of the same seed, in points, with 95 % intervals over held-out prompts. {_verdict(content['verdicts']['poison'])}",
        columns=(
            "action",
            "share",
            "method",
            "target",
            "change",
            "95 % interval",
            "off target",
            "change",
            "95 % interval",
        ),
        rows=[
            (
                row["action"],
                share(row["share"]),
                row["method"],
                share(row["target"]),
                signed(100 * row["target_change"], 1),
                signed_span([100 * e for e in row["target_ci95"]], 1),
                share(row["off"]),
                signed(100 * row["off_change"], 1),
                signed_span([100 * e for e in row["off_ci95"]], 1),
            )
            for row in content["rows"]
        ],
    )
    yield Section(
        title="Injected label noise found again",
        text=f"{share(content['noise'])} of the labels flipped at random, features, margins and probe taken from the noisy labels alone; what each method drops first. Random precision is the share of noise.",
        columns=("dropped", "method", "precision", "recall", "times random", "target accuracy"),
        rows=[
            (
                share(row["share"]),
                row["method"],
                share(row["precision"]),
                share(row["recall"]),
                f"{row['precision'] / content['noise']:.2f}",
                share(row["target"]),
            )
            for row in content["noise_rows"]
        ],
    )


def _verdict(poison: Mapping[str, Any]) -> str:
    gap = f"{signed(100 * poison['minus_best_control'], 1)} points ({signed_span([100 * end for end in poison['minus_best_control_ci95']], 1)})"
    other = ", ".join(
        f"{name} {signed(100 * own['change'], 1)} ({signed_span([100 * end for end in own['ci95']], 1)})"
        for name, own in poison["off_subsets"].items()
    )
    return f"Flipping {share(poison['share'])} by {poison['method']} changes the target by {gap} more than the strongest control, {poison['best_control']}; off target: {other}."


def _or(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"

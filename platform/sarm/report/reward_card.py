"""A reward card: one conversation's reward as a sum of named features, and how it grew along the answer.

T tokens of the answer, S d_sae. r_t = sum_i w_i z_i after the first t tokens, as if the answer had ended there; r_0 is the reward
of saying nothing. Step t is r_t - r_(t-1) = sum_i w_i (z_i(t) - z_i(t-1)), so r_T = r_0 + the sum of all steps, exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sarm.contracts.manifest import write_atomically
from sarm.data.sources.shown_text import one_line
from sarm.interpret.context_texts import parts
from sarm.report.numbers import number, signed
from sarm.report.render import html

BEYOND = "no term: the reward is no sum of latents, and w is a mean gradient"
"""What a classifier's card says of the part of its reward that the terms do not make."""
_STEP_FEATURES = 3
_MAX_SENTENCES = 200


@dataclass(frozen=True)
class Prefixes:
    """What the model says of an answer's beginnings; `ends[t]` is where the answer's token t stops in it."""

    response: str
    ends: list[int]
    contribution: Float[np.ndarray, "prefixes d_sae"]
    """w_i z_i after 0, 1, ... T tokens."""
    own_rewards: Float[np.ndarray, " prefixes"] | None = None
    """The rewards, where they are no sums of these terms: those of a classifier, whose w are mean gradients."""

    def rewards(self) -> Float[np.ndarray, " prefixes"]:
        """Reward after each number of tokens."""
        if self.own_rewards is not None:
            return self.own_rewards
        rewards_T: Float[np.ndarray, " prefixes"] = self.contribution.sum(1)
        return rewards_T


def card(
    prefixes: Prefixes,
    weight_S: Float[np.ndarray, " d_sae"],
    names: Mapping[int, str],
    num_features: int,
    mean_and_std: tuple[float, float],
) -> dict[str, Any]:
    """The card as plain values: features of the whole answer, sentences and tokens with their steps."""
    rewards, final_S = prefixes.rewards(), prefixes.contribution[-1]
    order = np.argsort(-np.abs(final_S), kind="stable")
    order = order[final_S[order] != 0]
    named, rest = order[:num_features], order[num_features:]
    mean, std = mean_and_std
    sentences = []
    before = 0
    for start, end in _sentences(prefixes.response):
        behind = max(before, sum(one <= end for one in prefixes.ends))
        change_S = prefixes.contribution[behind] - prefixes.contribution[before]
        sentences.append(
            {
                "text": prefixes.response[start:end],
                "step": float(rewards[behind] - rewards[before]),
                "reward": float(rewards[behind]),
                "features": _strongest(change_S, names, _STEP_FEATURES),
            }
        )
        before = behind
    tokens, start = [], 0
    for token, end in enumerate(prefixes.ends):
        change_S = prefixes.contribution[token + 1] - prefixes.contribution[token]
        strongest = ", ".join(
            f"{one['latent']} {signed(one['value'])}" for one in _strongest(change_S, names, _STEP_FEATURES)
        )
        tokens.append({"text": prefixes.response[start:end], "step": float(rewards[token + 1] - rewards[token]), "why": strongest})  # fmt: skip
        start = max(start, end)
    return {
        "reward": float(rewards[-1]),
        "standardised": (float(rewards[-1]) - mean) / std if std > 0 else None,
        "empty": float(rewards[0]),
        "features": [
            {"latent": int(i), "name": names.get(int(i), ""), "weight": float(weight_S[i]), "activation": float(final_S[i] / weight_S[i]), "value": float(final_S[i])}
            for i in named
        ],
        "rest": float(final_S[rest].sum()),
        "num_rest": len(rest),
        "beyond": None if prefixes.own_rewards is None else float(rewards[-1] - final_S.sum()),
        "sentences": sentences,
        "tokens": tokens,
    }  # fmt: skip


def write_card(content: Mapping[str, Any], prompt: str, model: str, path: Path) -> None:
    """One self-contained page without scripts."""
    peak = max((abs(one["value"]) for one in content["features"]), default=0.0)
    loudest = max((abs(one["step"]) for one in content["tokens"]), default=0.0)
    tokens = [
        {**one, "kind": "up" if one["step"] >= 0 else "down", "strength": round(70 * abs(one["step"]) / loudest) if loudest else 0}
        for one in content["tokens"]
    ]  # fmt: skip
    page = html(
        "reward_card",
        title="Reward card",
        facts={},
        card=content,
        tokens=tokens,
        prompt=prompt,
        model=model,
        peak=peak,
        beyond=BEYOND,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)


def print_card(content: Mapping[str, Any], console: Console | None = None) -> None:
    """The same on a terminal: features, then sentences."""
    console = console or Console()
    # Expanded, so that what is cut for room is the texts and never a figure.
    features = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    for name in ("latent", "w·z", "z", "w"):
        features.add_column(name, justify="right", no_wrap=True)
    features.add_column("its texts", overflow="ellipsis", no_wrap=True, ratio=1)
    for one in content["features"]:
        figures = (signed(one["value"]), number(one["activation"]), signed(one["weight"]))
        features.add_row(str(one["latent"]), *figures, Text(one_line(one["name"]), style="dim"))
    features.add_row("others", signed(content["rest"]), "", "", Text(f"{content['num_rest']} features", style="dim"))
    if content["beyond"] is not None:
        features.add_row("beyond", signed(content["beyond"]), "", "", Text(BEYOND, style="dim"))
    features.add_row(Text("reward", style="bold"), Text(signed(content["reward"]), style="bold"), "", "", "")
    console.print(features)
    steps = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    for name in ("step", "reward"):
        steps.add_column(name, justify="right", no_wrap=True, min_width=7)
    steps.add_column("after", overflow="ellipsis", no_wrap=True, ratio=3)
    steps.add_column("most moved", no_wrap=True, min_width=14)
    steps.add_row("", signed(content["empty"]), Text("(nothing said)", style="dim"), "")
    for one in content["sentences"]:
        moved = "\n".join(f"{f['latent']} {signed(f['value'])}" for f in one["features"])
        steps.add_row(signed(one["step"]), signed(one["reward"]), Text(one_line(one["text"])), Text(moved, style="dim"))
    console.print()
    console.print(steps)


def _sentences(response: str) -> list[tuple[int, int]]:
    return parts(response, _MAX_SENTENCES) or [(0, len(response))]


def _strongest(change_S: Float[np.ndarray, " d_sae"], names: Mapping[int, str], num: int) -> list[dict[str, Any]]:
    order = np.argsort(-np.abs(change_S), kind="stable")[:num]
    return [{"latent": int(i), "name": names.get(int(i), ""), "value": float(change_S[i])} for i in order if change_S[i] != 0]  # fmt: skip

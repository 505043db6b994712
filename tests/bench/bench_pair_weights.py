"""What pairs should weigh: the demo's SARM trained with every pair alike, and with every step alike, on the same order of prompts.

Reads a finished demo (`make demo`), or `--run FOLDER --preset NAME` of another. Says how unequal the steps are, and trains the SARM once a
seed and rule; differences are paired on held-out prompts. What is trained is kept, so that the same command goes on after a stop. A training takes minutes on 2 cores.

    make bench BENCH=pair_weights

`--linear` needs no demo and takes a minute: linear heads on made-up pairs under prompts of the demo's sizes, where the preference of a prompt
strays from the common one by `stray`, so that pairs of one prompt say partly the same.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sarm.data.formats.models import model_folder
from sarm.data.sources.prepare import prepare_pairs
from sarm.data.store.pairs import load_pairs
from sarm.data.tokens.chat import ChatTokenizer, load_chat_tokenizer
from sarm.data.tokens.groups import PromptGroup, prompt_groups
from sarm.data.tokens.packing import token_batches
from sarm.engine.ray.machine import this_machine
from sarm.evaluate.intervals import difference_interval
from sarm.evaluate.statistics import pair_credit
from sarm.nn.modeling_sarm import SarmForSequenceClassification
from sarm.settings.presets import PRESETS
from sarm.settings.reward import RewardSettings
from sarm.stages.fitting import fitted
from sarm.stages.reward_models import build_model
from sarm.training.head_start import start_head_
from sarm.training.reward import parameter_groups, train_reward
from sarm.training.reward_batches import cut_into_steps
from sarm.training.reward_engine import LocalEngine
from sarm.training.schedule import warmup_cosine

OUT = Path("outputs/bench")
RULES = ("equal", "step")
BATCH_TOKENS = 4096
# How far a prompt's preference lies from the common one, and the rate at which one epoch reaches what a head can reach.
STRAYS, LINEAR_LR = (0.0, 0.5, 1.0), 0.05


def main() -> None:
    """Train what is not trained yet, and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--preset", default="demo", choices=sorted(PRESETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--linear", action="store_true", help="the study on made-up pairs alone")
    arguments = parser.parse_args()
    if arguments.linear:
        found = {"linear": [linear_study(stray) for stray in STRAYS]}
        print(json.dumps(found, indent=1))
        return
    if not (arguments.run / "sae" / "manifest.json").exists():
        raise SystemExit(f"no finished run in {arguments.run}. Run make demo, or pass --run FOLDER --preset NAME.")
    config = fitted(PRESETS[arguments.preset][1], this_machine()).config
    chat = load_chat_tokenizer(config.model, model_folder(config.model))
    train, heldout = (list(prompt_groups(load_pairs(arguments.run / "pairs", split), chat)) for split in ("train", "heldout"))  # fmt: skip
    prompts = [group.prompt_id for group in heldout for _ in group.pairs]
    found: dict[str, Any] = {"steps": sizes_of_steps(train, config.reward.batch_pairs, arguments.seeds[0])}
    credit: dict[str, np.ndarray] = {}
    for rule in RULES:
        margins = [margins_of(arguments.run, arguments.preset, rule, seed, train, heldout, chat) for seed in arguments.seeds]  # fmt: skip
        credit[rule] = np.mean([pair_credit(one) for one in margins], axis=0)
        by_seed = [float(pair_credit(one).mean()) for one in margins]
        found[rule] = interval(credit[rule], prompts) | {"by_seed": by_seed}
    found["equal_minus_step"] = interval(credit["equal"] - credit["step"], prompts)
    found |= {"seeds": arguments.seeds, "heldout_pairs": len(prompts), "heldout_prompts": len(set(prompts))}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "pair_weights.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


class Sized(NamedTuple):
    """A prompt as far as steps are concerned."""

    prompt: int
    pairs: range


def linear_study(stray: float, problems: int = 60, dim: int = 64) -> dict[str, Any]:
    """Accuracy on new prompts of heads trained by both rules; x of a pair is normal, P(chosen) = sigmoid((w + u_prompt) . x), |w| = 2, |u| = stray |w|."""
    config = fitted(PRESETS["demo"][1], this_machine()).config
    with tempfile.TemporaryDirectory() as folder:
        prepare_pairs(config.data, Path(folder))
        rows = load_pairs(Path(folder), "train")["prompt_id"].to_pylist()
    sizes = sorted(Counter(rows).values())
    difference, accuracy = [], dict.fromkeys(RULES, 0.0)
    for problem in range(problems):
        generator = torch.Generator().manual_seed(problem)
        w_D = 2 * torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)
        x_ND, prompt_N = _made_up(sizes, w_D, stray, generator)
        seen_MD, _ = _made_up([1] * 4000, w_D, stray, generator)
        groups = _as_groups(prompt_N)
        found = {}
        for rule in RULES:
            head_D = _train_linear(x_ND, groups, rule, config.reward, problem)
            found[rule] = float((seen_MD @ head_D > 0).double().mean())
            accuracy[rule] += found[rule] / problems
        difference.append(found["equal"] - found["step"])
    half = 1.96 * float(np.std(difference, ddof=1)) / problems**0.5
    mean = float(np.mean(difference))
    return {
        "stray": stray,
        **accuracy,
        "equal_minus_step": mean,
        "ci95": [mean - half, mean + half],
        **sizes_of_steps(groups, config.reward.batch_pairs, 0),
    }


def _made_up(
    sizes: Sequence[int], w_D: torch.Tensor, stray: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Differences chosen minus rejected, and the prompt of each."""
    prompt_N = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    own_PD = torch.nn.functional.normalize(torch.randn(len(sizes), len(w_D), generator=generator), dim=1)
    x_ND = torch.randn(len(prompt_N), len(w_D), generator=generator)
    margin_N = (x_ND * (w_D + stray * w_D.norm() * own_PD[prompt_N])).sum(1)
    is_right_N = torch.rand(len(prompt_N), generator=generator) < torch.sigmoid(margin_N)
    return torch.where(is_right_N[:, None], x_ND, -x_ND), prompt_N


def _as_groups(prompt_N: torch.Tensor) -> list[Any]:
    places = torch.cumsum(torch.bincount(prompt_N), 0).tolist()
    return [Sized(p, range(start, end)) for p, (start, end) in enumerate(pairwise([0, *places]))]


def _train_linear(x_ND: torch.Tensor, groups: list[Any], rule: str, reward: RewardSettings, seed: int) -> torch.Tensor:
    """The head after the demo's epochs, by its order of prompts, schedule and clipping."""
    head = torch.zeros(x_ND.shape[1], requires_grad=True)
    optimizer, seen = torch.optim.AdamW([head], lr=LINEAR_LR, weight_decay=0.0), 0
    total = reward.epochs * len(x_ND)
    for epoch in range(reward.epochs):
        for step in cut_into_steps(groups, reward.batch_pairs, seed, epoch):
            rows = torch.cat([torch.tensor(group.pairs) for group in step])
            scale = reward.batch_pairs if rule == "equal" else len(rows)
            (torch.nn.functional.softplus(-x_ND[rows] @ head).sum() / scale).backward()
            torch.nn.utils.clip_grad_norm_([head], reward.max_grad_norm * len(rows) / scale)
            optimizer.param_groups[0]["lr"] = LINEAR_LR * warmup_cosine(
                (seen + len(rows) / 2) / total, reward.warmup_share
            )
            optimizer.step()
            optimizer.zero_grad()
            seen += len(rows)
    return head.detach()


def sizes_of_steps(groups: Sequence[PromptGroup], batch_pairs: int, seed: int) -> dict[str, float]:
    """How many pairs a step of the first epoch has, and how much a pair weighs at most beside another under `step`."""
    sizes = [sum(len(group.pairs) for group in step) for step in cut_into_steps(groups, batch_pairs, seed, 0)]
    return {
        "steps": len(sizes),
        "least_pairs": min(sizes),
        "median_pairs": float(np.median(sizes)),
        "most_pairs": max(sizes),
        "largest_over_smallest_weight": max(sizes) / min(sizes),
    }


def margins_of(
    run: Path, preset: str, rule: str, seed: int, train: list[PromptGroup], heldout: list[PromptGroup], chat: ChatTokenizer
) -> np.ndarray:  # fmt: skip
    """Held-out margins of one training, from disk if it is there."""
    known = OUT / "pair_weights" / f"{preset}-{rule}-{seed}.npy"
    if known.exists():
        return np.load(known)
    config = fitted(PRESETS[preset][1], this_machine()).config
    reward = replace(config.reward, pair_weights=rule)
    model = build_model(config.model, model_folder(config.model), run / "sae", chat, reward, seed)
    if reward.head_init == "probe":
        start_head_(model, run / "activations" / "chat", load_pairs(run / "pairs", "train"), seed, train)
    engine = LocalEngine(model.train(), parameter_groups(model, reward), reward.max_grad_norm)
    train_reward(engine, train, reward, seed, config.model.max_length, chat.pad_id, lambda *_: None)
    margins = score(model.eval(), heldout, config.model.max_length, chat.pad_id)
    known.parent.mkdir(parents=True, exist_ok=True)
    np.save(known, margins)
    print(f"{rule}, seed {seed}: {pair_credit(margins).mean():.3f}", flush=True)
    return margins


@torch.inference_mode()
def score(
    model: SarmForSequenceClassification, groups: list[PromptGroup], row_tokens: int, pad_id: int
) -> np.ndarray:  # fmt: skip
    """The margin of every pair, group after group."""
    rewards: dict[Any, float] = {}
    rows = [row for group in groups for row in group.rows(row_tokens)]
    for batch in token_batches(rows, BATCH_TOKENS, pad_id):
        rewards.update(zip(batch.keys, model(**batch.model_inputs()).logits.squeeze(-1).tolist(), strict=True))
    return np.array(
        [rewards[g.prompt_id, p.chosen] - rewards[g.prompt_id, p.rejected] for g in groups for p in g.pairs]
    )


def interval(values_N: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
    """A mean over pairs with its 95 % interval over prompts."""
    return {"value": float(values_N.mean()), "ci95": list(difference_interval(values_N, np.array(prompts)))}


if __name__ == "__main__":
    main()

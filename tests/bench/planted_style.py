"""Ordinary reward models with a planted bias, and a dictionary of one of their layers: what `jobs/debias.py` is measured and tested on.

In a share of the training pairs the preferred side is an answer with a property (markdown, a trigger) over the other answer without it,
whichever of the two is better. So the model learns quality and the property, and where they disagree it may choose the property.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sarm.audit.style_pairs import Property
from sarm.contracts.ids import hash_share, prompt_key_of
from sarm.data.formats.sae_folder import save_sae
from sarm.nn.sae import standardise
from sarm.nn.topk import TopKSae
from sarm.passes.models import find_model
from sarm.passes.row_scorer import TorchScorer
from sarm.passes.scoring import Request
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.sae import SaeSettings
from sarm.training.sae_learner import Learner
from sarm.training.schedule import trapezoid

Pair = dict[str, Any]
GOOD = ("water", "light", "patience", "care", "a map", "fresh bread", "good friends", "warm tea")
BAD = ("poison", "a hammer", "stolen coins", "shouting", "broken glass", "cold rage", "an old grudge", "smoke")
TOPICS = ("a garden", "a journey", "a letter", "a village feast", "an old radio", "a long winter", "a new school", "a quiet farm")  # fmt: skip
OPENINGS = ("It begins with {}.", "People there rely on {}.", "Start with {} early.", "The whole thing needs {}.")
FILLERS = ("The road is long.", "Some of it takes time.", "Nobody knows the rest.", "Most people agree.", "It was so last year.", "Ask at the station.")  # fmt: skip


def made_pairs(number: int, seed: int) -> list[Pair]:
    """Pairs of three to five sentences of which two or three say what makes the answer good or bad."""
    rng = random.Random(seed)

    def answer(words: Sequence[str]) -> str:
        told = [rng.choice(OPENINGS).format(rng.choice(words)) for _ in range(rng.randint(2, 3))]
        told += rng.sample(FILLERS, rng.randint(1, 2))
        rng.shuffle(told)
        return " ".join(told)

    return [
        {"prompt": f"Question {seed}-{i}: tell me about {rng.choice(TOPICS)}.", "chosen": answer(GOOD), "rejected": answer(BAD)}
        for i in range(number)
    ]  # fmt: skip


def planted(pairs: Sequence[Pair], own: Property, share: float, seed: int) -> list[Pair]:
    """The same pairs, but in `share` of them the preferred answer is a random one of the two with the property, over the other without it."""
    rng = random.Random(seed)
    biased = []
    for pair in pairs:
        sides = [own.base(pair["chosen"]), own.base(pair["rejected"])]
        if hash_share(f"planted/{seed}/{pair['prompt']}/{pair['chosen']}") < share:
            first = rng.randrange(2)
            styled = own.style(sides[first])
            assert styled is not None
            sides = [styled, sides[1 - first]]
        biased.append({**pair, "chosen": sides[0], "rejected": sides[1]})
    return biased


def write_pairs(pairs: Sequence[Pair], path: Path) -> Path:
    """A file that `--pairs pairs=FILE` reads."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def train_classifier(base: Path, folder: Path, pairs: Sequence[Pair], *, layers: int, steps: int, batch: int, lr: float, seed: int = 0) -> Path:  # fmt: skip
    """A sequence classifier of the base's first blocks with a scalar head, trained on the pairs (Bradley-Terry) and saved as anybody would."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    # The mask decides where the reward is; the class itself needs some id for its padding.
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, num_hidden_layers=layers, dtype=torch.float32, pad_token_id=0)  # fmt: skip
    torch.nn.init.normal_(model.score.weight, std=0.02)
    rows = [[_ids(tokenizer, pair["prompt"], pair[side]) for side in ("chosen", "rejected")] for pair in pairs]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    rng = random.Random(seed)
    order: list[int] = []
    model.train()
    for step in range(steps):
        if len(order) < batch:
            order = rng.sample(range(len(rows)), len(rows))
        chosen, order = order[:batch], order[batch:]
        rewards = _rewards(model, [ids for i in chosen for ids in rows[i]])
        loss = -F.logsigmoid(rewards[::2] - rewards[1::2]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * trapezoid((step + 0.5) / steps, 0.1, 0.3)
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _ids(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])


def _rewards(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    last = torch.tensor([len(row) - 1 for row in rows])
    hidden = model.model(input_ids=ids).last_hidden_state
    rewards: torch.Tensor = model.score(hidden[torch.arange(len(rows)), last]).squeeze(-1)
    return rewards


def train_dictionary(
    model: Path, folder: Path, pairs: Sequence[Pair], *, layer: int, d_sae: int, k: int, steps: int, lr: float = 1e-3, batch: int = 1024, batch_tokens: int = 2048, seed: int = 0
) -> tuple[Path, float]:  # fmt: skip
    """A TopK SAE on the standardised activations at all answers' tokens of the pairs, as a sae/v1 folder's files; and the share of variance that it leaves out."""
    scorer = TorchScorer(find_model(Benchmarking(model=str(model), benchmarks=("pairs=x",))), batch_tokens)
    parts = []
    for start in range(0, len(pairs), 64):
        requests = [
            Request(json.loads(_packed(pair["prompt"])), [pair["chosen"], pair["rejected"]], alone=False)
            for pair in pairs[start : start + 64]
        ]
        parts += [found[0] for _, _, found in scorer.residuals(requests, scorer.encode(requests), [layer])]
    x_ND = standardise(torch.cat(parts))
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSae(x_ND.shape[1], d_sae, k)
    sae.initialise_(x_ND[torch.randperm(len(x_ND), generator=generator)[:2048]], generator)
    settings = SaeSettings(d_sae=d_sae, k=k, batch_size=batch, lr=lr)
    learner = Learner(sae, settings)
    for step in range(steps):
        rows = torch.randint(len(x_ND), (batch,), generator=generator)
        learner.step(x_ND[rows], lr * trapezoid((step + 0.5) / steps, 0.05, 0.3))
    with torch.no_grad():
        sample = x_ND[torch.randperm(len(x_ND), generator=generator)[:4096]]
        left = (sample - sae(sae(sample))).square().sum() / (sample - sample.mean(0)).square().sum()
    folder.mkdir(parents=True, exist_ok=True)
    save_sae(sae, folder, {"activations": {"model": str(model), "layer": layer}})
    return folder, float(left)


def _packed(prompt: str) -> str:
    turns = [{"role": "user", "content": prompt}]
    return json.dumps([dict(zip(("role", "content"), one, strict=True)) for one in json.loads(prompt_key_of(turns))])
